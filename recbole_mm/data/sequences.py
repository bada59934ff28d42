"""Users' sequences as flat arrays, and whole-sequence training batches cut from them.

Prefix augmentation makes one row of every target; a causal model needs only one row of every user,
with a target at every position. `whole_windows` cuts such rows, `epoch_plan` orders them into
batches of like length, `collate` pads a batch and `WholeTrainLoader` walks a plan where RecBole
expects a data loader.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from recbole.data.interaction import Interaction

from recbole_mm.errors import UserError

TARGETS, STARTS = "target_list", "starts"
POOL_BATCHES = 50  # batches that are sorted by length together: enough to trim, few enough to mix

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class UserSequences:
    """Every user's items, oldest first, one after another.

    Attributes:
        items: item ids. Shape: (N,).
        users: user ids, ascending. Shape: (U,).
        offsets: user i has ``items[offsets[i]:offsets[i + 1]]``. Shape: (U + 1,).
    """

    items: Ints
    users: Ints
    offsets: Ints

    def __len__(self) -> int:
        return len(self.users)

    def __getitem__(self, index: int) -> Ints:
        """The items of the user in row `index` (not: of the user with this id). Shape: (n,)."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)} users")
        row = index % len(self)
        return self.items[self.offsets[row] : self.offsets[row + 1]]

    def lengths(self) -> Ints:
        """How many items each user has. Shape: (U,)."""
        return np.diff(self.offsets)

    def select(self, rows: Ints) -> UserSequences:
        """The sequences of these rows, in ascending order of their users."""
        rows = np.sort(np.asarray(rows, dtype=np.int64))
        lengths = self.lengths()[rows]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        flat = np.arange(offsets[-1]) + np.repeat(self.offsets[rows] - offsets[:-1], lengths)
        return UserSequences(self.items[flat], self.users[rows], offsets)


def group_by_user(users: Ints, items: Ints) -> UserSequences:
    """Groups interactions by user and keeps their order within a user.

    Args:
        users: user ids in any order. Shape: (N,).
        items: the item of each interaction. Shape: (N,).
    """
    order = np.argsort(users, kind="stable")
    names, counts = np.unique(users, return_counts=True)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return UserSequences(items[order].astype(np.int64), names.astype(np.int64), offsets)


@dataclass(frozen=True)
class WholeRows:
    """Rows for training: r has inputs ``items[begin:end]``, targets ``items[begin + 1:end + 1]``.

    Attributes:
        sequences: where the items are.
        owners: the user id of each row. Shape: (R,).
        begin: first input of each row, a place in ``sequences.items``. Shape: (R,).
        end: one past the last input of each row. Shape: (R,).
        starts: the row begins at its user's first item. Shape: (R,).
    """

    sequences: UserSequences
    owners: Ints
    begin: Ints
    end: Ints
    starts: Bools

    def __len__(self) -> int:
        return len(self.begin)

    def lengths(self) -> Ints:
        """How many inputs, and targets, each row has. Shape: (R,)."""
        return self.end - self.begin


def whole_windows(sequences: UserSequences, max_len: int) -> WholeRows:
    """Cuts sequences into rows of at most `max_len` targets; every target is in exactly one row.

    A user with n items has n - 1 targets. Rows are cut from the newest target backwards, so that
    only a user's oldest row may be short; they do not overlap, and a row knows nothing of the row
    before it.
    """
    if max_len < 1:
        raise UserError(f"MAX_ITEM_LIST_LENGTH is {max_len}: set it to 1 or more.")
    targets = np.maximum(sequences.lengths() - 1, 0)
    counts = -(-targets // max_len)  # rows a user
    owner = np.repeat(np.arange(len(sequences)), counts)
    first_row = np.cumsum(counts) - counts
    place = np.arange(len(owner)) - first_row[owner]  # 0: the user's oldest row
    end = sequences.offsets[1:][owner] - 1 - (counts[owner] - 1 - place) * max_len
    begin = np.maximum(end - max_len, sequences.offsets[:-1][owner])
    return WholeRows(sequences, sequences.users[owner], begin, end, place == 0)


def epoch_plan(
    lengths: Ints, batch_size: int, seed: int, epoch: int, bucket: bool = True
) -> list[Ints]:
    """The batches of one epoch, as row numbers; a function of its arguments alone.

    With `bucket`, shuffled rows are taken in pools of `POOL_BATCHES` batches, each pool is sorted
    by length and cut, and the batches of all pools are shuffled: a batch has rows of like length,
    padded little, and no two epochs have the same batches.
    """
    if batch_size < 1:
        raise UserError(f"train_batch_size is {batch_size}: set it to 1 or more.")
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    if not bucket:
        return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    batches: list[Ints] = []
    for i in range(0, len(order), batch_size * POOL_BATCHES):
        pool = order[i : i + batch_size * POOL_BATCHES]
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        batches += [pool[j : j + batch_size] for j in range(0, len(pool), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


@dataclass(frozen=True)
class WholeFields:
    """Names of a whole-sequence batch's fields, as RecBole's configuration has them."""

    user: str = "user_id"
    items: str = "item_id_list"
    length: str = "item_length"


def collate(rows: WholeRows, index: Ints, fields: WholeFields | None = None) -> Interaction:
    """One batch: right-padded with 0 and trimmed to its longest row.

    Returns:
        Interaction with ``user_id`` (B,), ``item_id_list`` (B, L), ``item_length`` (B,),
        ``target_list`` (B, L) int64 with 0 where there is no target, and ``starts`` (B,) bool.
    """
    names = fields or WholeFields()
    length = rows.lengths()[index]
    place = rows.begin[index][:, None] + np.arange(length.max())  # (B, L)
    filled = place < rows.end[index][:, None]  # (B, L)
    place = np.where(filled, place, 0)
    items = rows.sequences.items
    batch = {
        names.user: torch.from_numpy(rows.owners[index]),
        names.items: torch.from_numpy(np.where(filled, items[place], 0)),
        names.length: torch.from_numpy(length),
        TARGETS: torch.from_numpy(np.where(filled, items[place + filled], 0)),
        STARTS: torch.from_numpy(rows.starts[index]),
    }
    return Interaction(batch)


class WholeTrainLoader:
    """Whole-sequence batches where RecBole expects a training data loader.

    Like RecBole's loaders it draws each epoch's order from `generator`, whose state a trainer may
    keep and put back.

    Attributes:
        dataset: the training part, for RecBole's collector and model constructors.
        rows: the training rows.
        generator: seeded with `seed`.
    """

    def __init__(
        self,
        dataset: Any,
        rows: WholeRows,
        batch_size: int,
        seed: int,
        fields: WholeFields | None = None,
        *,
        shuffle: bool = True,
        bucket: bool = True,
    ) -> None:
        self.dataset = self._dataset = dataset
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.fields = fields or WholeFields()
        self.shuffle, self.bucket = shuffle, bucket
        self.generator = torch.Generator().manual_seed(seed)

    def plan(self, epoch: int) -> list[Ints]:
        """The batches of an epoch as row numbers, in the order of the rows if `shuffle` is off."""
        if self.shuffle:
            return epoch_plan(self.rows.lengths(), self.batch_size, self.seed, epoch, self.bucket)
        order = np.arange(len(self.rows))
        return [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[Interaction]:
        epoch = int(torch.randint(2**31, (), generator=self.generator))
        for index in self.plan(epoch):
            yield collate(self.rows, index, self.fields)

"""RecBole's datasets with quick augmentation, users' sequences and a sample of users.

Parts adapted from RecBole (MIT, (c) 2020 RUCAIBox).

Every class gives the numbers that RecBole's own gives, but for the order of times that differ by
less than float32 tells apart (a minute or two, as unix seconds): RecBole keeps the file's order
there, which may take another interaction than a user's last for the test. Side files (texts,
images, features) are read elsewhere, by item token, and never enter the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from recbole.data.dataset import (
    Dataset,
    DecisionTreeDataset,
    DIENDataset,
    KGSeqDataset,
    KnowledgeBasedDataset,
    SequentialDataset,
)
from recbole.data.interaction import Interaction
from recbole.utils import FeatureType, ModelType
from torch import Tensor

from recbole_mm.data import splits
from recbole_mm.data.frames import FrameMends
from recbole_mm.data.sequences import Ints, UserSequences, group_by_user
from recbole_mm.errors import UserError


@dataclass(frozen=True)
class Prefixes:
    """RecBole's prefix rows over interactions sorted by user and time.

    Row r has the interactions ``[begin[r], target[r])`` as history and ``target[r]`` as target.

    Attributes:
        begin: first interaction of each history. Shape: (R,).
        target: the target of each row. Shape: (R,).
        firsts: every user's first interaction. Shape: (U,).
    """

    begin: Tensor
    target: Tensor
    firsts: Tensor

    @property
    def length(self) -> Tensor:
        """Length of each history. Shape: (R,)."""
        return self.target - self.begin


def prefix_rows(users: Tensor, max_len: int) -> Prefixes:
    """Makes a row of every interaction but each user's first, with at most `max_len` before it.

    Args:
        users: user of each interaction, equal ones together. Shape: (N,).
        max_len: longest history.
    """
    place = torch.arange(len(users))
    new_user = torch.ones(len(users), dtype=torch.bool)
    new_user[1:] = users[1:] != users[:-1]
    user_begin = torch.where(new_user, place, 0).cummax(0).values if len(users) else place
    target = place[~new_user]
    begin = torch.maximum(user_begin[target], target - max_len)
    return Prefixes(begin, target, place[new_user])


def gather_lists(
    values: Tensor, rows: Prefixes, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """The values of each row's history, padded with 0 on the right.

    Args:
        values: one field of the sorted interactions. Shape: (N, *).
        rows: which of them each row takes.
        shape: (L, *) of a row; dimensions after the first may be larger than those of `values`.
        dtype: of the result.

    Returns:
        Shape: (R, *shape).
    """
    inner = values.shape[1:]
    padded = torch.cat([values, values.new_zeros((shape[0], *inner))]).to(dtype)
    windows = padded.unfold(0, shape[0], 1).movedim(-1, 1)  # (N + 1, L, *), a view
    lists = windows[rows.begin].contiguous()  # (R, L, *)
    beyond = torch.arange(shape[0]) >= rows.length[:, None]  # (R, L)
    lists.masked_fill_(beyond[(..., *[None] * len(inner))], 0)
    if inner == tuple(shape[1:]):
        return lists
    wide = torch.zeros((len(lists), *shape), dtype=dtype)
    wide[(slice(None), slice(None), *(slice(0, size) for size in inner))] = lists
    return wide


class MMParts(FrameMends):
    """What all our datasets add to RecBole's.

    After `build`, every part has ``sequences``, everything that each user did, and the training
    part has ``train_sequences``, what its users did before anything that is held out. Where that is
    not what a user of another part did before its target, the part has ``histories``; where
    training users are not cut as those are (`history_source`), it has ``train_lists``, cut.
    """

    inter_feat: Any
    sequences: UserSequences | None = None
    train_sequences: UserSequences | None = None
    histories: UserSequences | None = None
    train_lists: UserSequences | None = None
    first_target = 0  # place in a user's sequence of its first row

    def _filter_by_inter_num(self) -> None:
        super()._filter_by_inter_num()
        if self.inter_feat.empty:
            raise UserError(
                f"{self.dataset_name}: the filters leave no interaction: lower "
                "user_inter_num_interval and item_inter_num_interval, or widen val_interval."
            )
        self._limit_users()

    def _limit_users(self) -> None:
        """Keeps a seeded sample of ``limit_users`` users and what they touched.

        Sampling comes after the filters, so that every sampled user passes them. A smaller sample
        of one seed is part of a larger one.
        """
        limit = self.config["limit_users"]
        if limit is None:
            return
        if limit < 1:
            raise UserError(f"limit_users is {limit}: set it to 1 or more, or leave it out.")
        users = np.sort(self.inter_feat[self.uid_field].unique().astype(np.str_))
        rng = np.random.default_rng(self.config["seed"])
        kept = users[rng.permutation(len(users))[:limit]]
        rows = self.inter_feat[self.uid_field].isin(kept.tolist())
        self.inter_feat = self.inter_feat[rows]
        for frame, field in (("user_feat", self.uid_field), ("item_feat", self.iid_field)):
            feat = getattr(self, frame)
            if feat is not None:
                setattr(self, frame, feat[feat[field].isin(self.inter_feat[field])])

    def _data_processing(self) -> None:
        if self.benchmark_filename_list is not None and self.config["limit_users"] is not None:
            raise UserError(
                "limit_users cannot cut the ready-made split of benchmark_filename: "
                "leave one of the two out."
            )
        super()._data_processing()

    def _fill_nan(self) -> None:
        super()._fill_nan()
        self._sort_by_time()  # ids are given and times are neither scaled nor bucketed yet

    def _sort_by_time(self) -> None:
        """Orders interactions by their float64 times; RecBole's stable float32 sort keeps that."""
        if self.config["eval_args"]["order"] != "TO" or self.benchmark_filename_list is not None:
            return
        self.inter_feat = self.inter_feat.sort_values(
            self.time_field, kind="stable", ignore_index=True
        )

    def item_tokens(self) -> list[str]:
        """The raw token of every item id; row 0 is ``[PAD]``."""
        return [str(token) for token in self.field2id_token[self.iid_field]]

    def _first_interactions(self) -> tuple[Tensor, Tensor]:
        """Users and items of interactions that no part has a row for. Shape: (n,) each."""
        return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)

    def build(self) -> list[Any]:
        """Splits as RecBole does, or as `splits` does, and tells the parts the users' whole
        sequences."""
        if self.benchmark_filename_list is not None or not (self.uid_field and self.iid_field):
            return list(super().build())
        kind, shares = next(iter(self.config["eval_args"]["split"].items()))
        whole: UserSequences | None = None
        lists: UserSequences | None = None
        if self.config["history_source"] == "official_topfreq":
            whole = group_by_user(*self._ids())
            lists = self._keep_most_frequent(kind, shares)
        if kind in splits.KINDS:
            parts = self._own_parts(kind, shares)
        else:
            parts = list(super().build())
            self._tell_sequences(parts)
        for part in parts if whole is not None else ():
            part.sequences = whole
        if lists is not None and kind == "US":
            trained = np.isin(lists.users, parts[0].train_sequences.users)
            parts[0].train_lists = lists.select(np.flatnonzero(trained))
        return parts

    def _ids(self) -> tuple[Ints, Ints]:
        """Users and items of all interactions, before RecBole makes tensors of them. (N,) each."""
        frame = self.inter_feat
        return frame[self.uid_field].to_numpy(), frame[self.iid_field].to_numpy()

    def _keep_most_frequent(self, kind: str, shares: Sequence[float]) -> UserSequences:
        """Cuts what users did, with `history_source: official_topfreq`; returns what is left of
        each. Users who only train stay whole: they are learnt from and not asked about."""
        users, items = self._ids()
        kept = splits.most_frequent(users, items, self.config["topfreq_items"])
        lists = group_by_user(users[kept], items[kept])
        if kind == "US":
            kept |= self._user_parts(shares)[users] == 0
        self.inter_feat = self.inter_feat[kept].reset_index(drop=True)
        return lists

    def _user_parts(self, shares: Sequence[float]) -> Ints:
        """The part of each user id. Shape: (users,)."""
        tokens = self.field2id_token[self.uid_field][1:].tolist()  # without the pad
        return np.concatenate([[-1], splits.user_parts(tokens, shares)])

    def _own_parts(self, kind: str, shares: Sequence[float]) -> list[Any]:
        """Training, validation and test by users or by time."""
        taken = group_by_user(*self._ids())
        every_time = self.inter_feat[self.time_field].to_numpy()
        self._change_feat_format()
        self.sort(by=self.time_field)
        users = self.inter_feat[self.uid_field].numpy()
        places = splits.places_of(users) + self.first_target
        if kind == "US":
            rows = splits.split_by_users(users, places > 0, self._user_parts(shares))
        else:
            times = self.inter_feat[self.time_field].numpy()
            own = every_time.astype(times.dtype)  # RecBole's tensors are of fewer digits
            rows = splits.split_by_time(users, places > 0, times, own, shares)
        self._drop_unused_col()
        parts = [self.copy(self.inter_feat[index]) for index in rows]
        self._tell_own(parts, taken, [(users[index], places[index]) for index in rows])
        return parts

    def _tell_own(
        self, parts: list[Any], taken: UserSequences, rows: list[tuple[Ints, Ints]]
    ) -> None:
        for part, (users, places) in zip(parts[1:], rows[1:], strict=True):
            part.histories = splits.prefixes(taken, users, places)
        for part in parts:
            part.sequences = taken
        users, counts = np.unique(rows[0][0], return_counts=True)
        parts[0].train_sequences = splits.prefixes(taken, users, counts + self.first_target)

    def _tell_sequences(self, parts: list[Any]) -> None:
        rows = [self._first_interactions()]  # then those of training, validation and test
        rows += [(p.inter_feat[self.uid_field], p.inter_feat[self.iid_field]) for p in parts]
        everything = _grouped(rows)
        for part in parts:
            part.sequences = everything
        known = _grouped(rows[:2])
        trained = np.isin(known.users, rows[1][0].numpy())
        parts[0].train_sequences = known.select(np.flatnonzero(trained))


def _grouped(rows: list[tuple[Tensor, Tensor]]) -> UserSequences:
    users, items = (torch.cat(column).numpy() for column in zip(*rows, strict=True))
    return group_by_user(users, items)


class MMDataset(MMParts):
    """For general and context-aware models; evaluates whom `MMSequentialDataset` evaluates."""

    def _split_index_by_leave_one_out(
        self, grouped_index: Iterable[Sequence[int]], leave_one_num: int
    ) -> list[list[int]]:
        """Leaves targets out as for sequential models, whose first interaction is never a target.

        RecBole evaluates a user of two interactions with general models but not with sequential
        ones, and a user of three in validation too: one table could not hold both.
        """
        parts: list[list[int]] = [[] for _ in range(leave_one_num + 1)]
        for index in map(list, grouped_index):
            left_out = min(leave_one_num, max(len(index) - 2, 0))
            cut = len(index) - left_out
            parts[0].extend(index[:cut])
            for part, row in zip(parts[len(parts) - left_out :], index[cut:], strict=True):
                part.append(row)
        return parts


def general_part(train_part: MMParts) -> MMDataset:
    """A general model's training part out of a sequential one's: each interaction of the training
    users is a row, their first ones too."""
    known = train_part.train_sequences
    if known is None:
        raise ValueError("a ready-made split tells no sequences")
    users = np.repeat(known.users, known.lengths())
    fields = {train_part.uid_field: users, train_part.iid_field: known.items}
    part = MMDataset.__new__(MMDataset)  # nothing is read anew
    part.__dict__.update(train_part.__dict__)
    part.inter_feat = Interaction({k: torch.from_numpy(v) for k, v in fields.items()})
    return part


class MMSequentialDataset(MMParts, SequentialDataset):
    """RecBole's prefix rows, tensor for tensor, without its double loop."""

    first_target = 1
    _firsts: tuple[Tensor, Tensor] | None = None

    def _first_interactions(self) -> tuple[Tensor, Tensor]:
        return self._firsts or super()._first_interactions()

    def data_augmentation(self) -> None:
        """Makes a row of each interaction but each user's first: its history, itself as target."""
        self._aug_presets()
        self.sort(by=[self.uid_field, self.time_field], ascending=True)
        sorted_feat = self.inter_feat
        rows = prefix_rows(sorted_feat[self.uid_field], self.config["MAX_ITEM_LIST_LENGTH"])
        fields = {name: sorted_feat[name][rows.target] for name in sorted_feat}
        fields[self.item_list_length_field] = rows.length
        for name in sorted_feat:
            if name != self.uid_field:
                fields.update(self._lists_of(name, sorted_feat[name], rows))
        self._firsts = (
            sorted_feat[self.uid_field][rows.firsts],
            sorted_feat[self.iid_field][rows.firsts],
        )
        self.inter_feat = Interaction(fields)

    def _lists_of(self, field: str, values: Tensor, rows: Prefixes) -> dict[str, Tensor]:
        """The history fields that one field of the interactions gives."""
        list_field = getattr(self, f"{field}_list_field")
        return {list_field: gather_lists(values, rows, self._list_shape(field), values.dtype)}

    def _list_shape(self, field: str) -> tuple[int, ...]:
        """Shape of one row's history: (L,), (L, n) for sequences; 2 more where bucketed."""
        size = self.field2seqlen[getattr(self, f"{field}_list_field")]
        shape: tuple[int, ...] = (size,) if isinstance(size, int) else tuple(size)
        is_float = self.field2type[field] in (FeatureType.FLOAT, FeatureType.FLOAT_SEQ)
        return (*shape, 2) if is_float and field in self.config["numerical_features"] else shape


class MMDIENDataset(MMSequentialDataset, DIENDataset):
    """RecBole's `DIENDataset`: a history of sampled items, not taken, beside the real one."""

    def _lists_of(self, field: str, values: Tensor, rows: Prefixes) -> dict[str, Tensor]:
        list_field = getattr(self, f"{field}_list_field")
        is_token = self.field2type[list_field] in (FeatureType.TOKEN, FeatureType.TOKEN_SEQ)
        dtype = torch.int64 if is_token else torch.float64
        shape = self._list_shape(field)
        lists = {list_field: gather_lists(values, rows, shape, dtype)}
        if field == self.iid_field:
            lists[self.neg_item_list_field] = gather_lists(self.neg_item_list, rows, shape, dtype)
        return lists


class _KnowledgeFiles(FrameMends):
    def _needed_files(self) -> list[str]:
        return [*super()._needed_files(), "kg", "link"]


class MMKnowledgeDataset(_KnowledgeFiles, MMDataset, KnowledgeBasedDataset):
    """RecBole's `KnowledgeBasedDataset` (``.kg`` and ``.link`` files)."""


class MMKGSeqDataset(_KnowledgeFiles, MMSequentialDataset, KGSeqDataset):
    """RecBole's `KGSeqDataset`: sequences and a knowledge graph."""


class MMDecisionTreeDataset(MMDataset, DecisionTreeDataset):
    """RecBole's `DecisionTreeDataset`, for its external libraries."""


BY_MODEL: dict[str, type[Dataset]] = {
    "DIEN": MMDIENDataset,
    "GRU4RecKG": MMKGSeqDataset,
    "KSR": MMKGSeqDataset,
}

BY_TYPE: dict[ModelType, type[Dataset]] = {
    ModelType.GENERAL: MMDataset,
    ModelType.SEQUENTIAL: MMSequentialDataset,
    ModelType.CONTEXT: MMDataset,
    ModelType.KNOWLEDGE: MMKnowledgeDataset,
    ModelType.TRADITIONAL: MMDataset,
    ModelType.DECISIONTREE: MMDecisionTreeDataset,
}

"""What the papers leave out of their datasets: flags that converters share, and what they do.

They apply in this order, which docs/data.md repeats:

1. `--require` and `--max_title` leave out items by what is known about them;
2. `--min_inter` leaves out users and items with too few interactions until none has (the core);
3. `--order_from` puts the interactions of each user in a published order (see `order`);
4. `--sample_users` draws users among those that are left;
5. `--top_frequency` keeps of each user the interactions with the items that are taken most.

What each leaves out is counted in the dataset's card.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from recbole_mm.data.atomic import IMAGE, ITEM
from recbole_mm.errors import UserError, nearest

USER = "user_id"
SEED = 2020
Mask = NDArray[np.bool_]
Codes = NDArray[np.int64]
Reorder = Callable[[pd.DataFrame], tuple[pd.DataFrame, list[str]]]


def add_filters(parser: argparse.ArgumentParser, least: str, of_items: str) -> None:
    """The flags.

    Args:
        parser: of the converter.
        least: default of `--min_inter`.
        of_items: what `--require` may name, in words.
    """
    add = parser.add_argument
    add("--require", default="", metavar="A,B", help=f"keep items that have these: {of_items}")
    add("--max_title", type=int, default=0, metavar="N", help="longest title in letters (0: any)")
    add(
        "--min_inter",
        default=least,
        metavar="N|U,I",
        help=f"least interactions of users and items, repeated until all have them ({least})",
    )
    add("--sample_users", type=int, default=0, metavar="N", help="draw so many users (0: all)")
    add("--seed", type=int, default=SEED, help=f"of the drawing ({SEED})")
    add(
        "--top_frequency",
        type=int,
        default=0,
        metavar="N",
        help="keep each user's N interactions with the most frequent items (0: all)",
    )


def filter_words(arguments: argparse.Namespace, least: str) -> list[str]:
    """The flags as a command has them, those at their default left out."""
    plain = {"require": "", "max_title": 0, "min_inter": least, "sample_users": 0}
    plain |= {"seed": SEED, "top_frequency": 0}
    found = ((name, getattr(arguments, name)) for name in plain)
    return [f"--{name} {shlex.quote(str(value))}" for name, value in found if value != plain[name]]


def parse_least(text: str) -> tuple[int, int]:
    """Reads ``--min_inter``: ``N``, or ``U,I`` for users and items.

    Raises:
        UserError: it is neither.
    """
    words = text.split(",")
    if len(words) > 2 or not all(word.strip().isdecimal() for word in words):
        raise UserError(f"--min_inter '{text}': give N, or U,I for users and items, as in 6,5.")
    return int(words[0]), int(words[-1])


def check_counts(arguments: argparse.Namespace, *flags: str) -> None:
    """Raises `UserError` where one of the flags is negative."""
    for flag in flags:
        if (number := getattr(arguments, flag)) < 0:
            raise UserError(f"--{flag} is {number}: give 0 or more.")


@dataclass(frozen=True)
class Filters:
    """The flags, read.

    Attributes:
        require: attributes that an item must have, or ``image``.
        max_title: longest title, 0 for any.
        least: interactions of a user and of an item.
        sample_users: how many are drawn, 0 for all.
        seed: of the drawing.
        top_frequency: interactions of a user that are kept, 0 for all.
    """

    require: tuple[str, ...]
    max_title: int
    least: tuple[int, int]
    sample_users: int
    seed: int
    top_frequency: int

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Filters:
        """Reads the flags.

        Raises:
            UserError: one makes no sense.
        """
        check_counts(arguments, "max_title", "sample_users", "seed", "top_frequency")
        return cls(
            tuple(filter(None, (word.strip() for word in arguments.require.split(",")))),
            arguments.max_title,
            parse_least(arguments.min_inter),
            arguments.sample_users,
            arguments.seed,
            arguments.top_frequency,
        )

    def check_required(self, attributes: Sequence[str]) -> None:
        """Raises `UserError` where `require` names what no item can have."""
        known = [*attributes, IMAGE]
        for name in self.require:
            if name not in known:
                raise UserError(
                    f"--require: '{name}' is none of {', '.join(known)}{nearest(name, known)}."
                )

    def misfits(
        self, has: Callable[[str], Mask], title_lengths: NDArray[np.int32]
    ) -> NDArray[np.uint8]:
        """What is wrong with each item: 0 nothing, n the n-th of `_reasons`. Shape: (V,).

        Args:
            has: which items have an attribute or an ``image``.
            title_lengths: letters of their titles. Shape: (V,).
        """
        why = np.zeros(len(title_lengths), dtype=np.uint8)
        for number, name in enumerate(self.require, 1):
            why[(why == 0) & ~has(name)] = number
        if self.max_title:
            why[(why == 0) & (title_lengths > self.max_title)] = len(self.require) + 1
        return why

    def narrow(
        self, rows: pd.DataFrame, why: NDArray[np.uint8], reorder: Reorder | None = None
    ) -> tuple[pd.DataFrame, list[str]]:
        """Applies all filters; see the module for their order.

        Args:
            rows: columns user_id and item_id, a user's rows together and oldest first.
            why: of `misfits`, for the item of each row. Shape: (N,).
            reorder: puts the rows of each user in another order and says so.

        Returns:
            The rows that are left, and sentences for the card.

        Raises:
            UserError: none is left.
        """
        fitting, notes = self._fitting(rows, why)
        left = core(fitting, *self.least)
        if dropped := len(fitting) - len(left):
            flag = f"--min_inter {self.least[0]},{self.least[1]}"
            notes.append(f"left out by {flag}: {_difference(fitting, left, dropped)}")
        if reorder:
            left, said = reorder(left)
            notes += said
        frequent = top_frequency(left, self.top_frequency) if self.top_frequency else None
        drawn, said = self._drawn(left)
        kept = drawn if frequent is None else drawn & frequent
        if beyond := int(drawn.sum() - kept.sum()):
            said.append(
                f"left out by --top_frequency {self.top_frequency}: {beyond:,} interactions"
            )
        return left if kept.all() else left[kept].reset_index(drop=True), notes + said

    def _reasons(self) -> list[str]:
        long = [f"with a title longer than {self.max_title}"] if self.max_title else []
        return [*(f"without {name}" for name in self.require), *long]

    def _fitting(
        self, rows: pd.DataFrame, why: NDArray[np.uint8]
    ) -> tuple[pd.DataFrame, list[str]]:
        if not why.any():
            return rows, []
        notes = []
        for number, reason in enumerate(self._reasons(), 1):
            if len(bad := rows[ITEM][why == number]):
                notes.append(
                    f"left out, items {reason}: {bad.nunique():,} ({len(bad):,} interactions)"
                )
        if why.all():
            raise UserError(
                f"No item of the interactions is left by --require and --max_title: all are "
                f"{' or '.join(self._reasons())}."
            )
        return rows[why == 0].reset_index(drop=True), notes

    def _drawn(self, rows: pd.DataFrame) -> tuple[Mask, list[str]]:
        """Which rows are of users that were drawn; a smaller sample is part of a larger one."""
        codes, known = pd.factorize(rows[USER])
        if not self.sample_users:
            return np.ones(len(rows), dtype=bool), []
        is_drawn = np.zeros(len(known), dtype=bool)
        rng = np.random.default_rng(self.seed)
        is_drawn[rng.permutation(len(known))[: self.sample_users]] = True
        said = f"users drawn by seed {self.seed}: {is_drawn.sum():,} of {len(known):,}"
        return is_drawn[codes], [said]


def core(rows: pd.DataFrame, users: int, items: int) -> pd.DataFrame:
    """Drops users and items with too few interactions until none has.

    Args:
        rows: with columns user_id and item_id.
        users: least interactions of a user.
        items: least interactions of an item.

    Raises:
        UserError: nothing is left.
    """
    user, item = (pd.factorize(rows[name])[0] for name in (USER, ITEM))
    left = np.arange(len(rows))  # (N,)
    while True:
        enough = (np.bincount(user[left])[user[left]] >= users) & (
            np.bincount(item[left])[item[left]] >= items
        )
        if not enough.any():
            raise UserError(f"--min_inter {users},{items} leaves no interaction; lower it.")
        if enough.all():
            return rows.iloc[left].reset_index(drop=True)
        left = left[enough]


def top_frequency(rows: pd.DataFrame, count: int) -> Mask:
    """Which rows are each user's `count` ones with the most frequent items; of equally frequent
    ones the earlier. Shape: (N,).

    Args:
        rows: columns user_id and item_id, a user's rows together and oldest first.
        count: of rows a user.
    """
    user, item = (pd.factorize(rows[name])[0] for name in (USER, ITEM))
    place = np.arange(len(rows))
    order = np.lexsort((place, -np.bincount(item)[item], user))  # (N,)
    starts = np.searchsorted(user[order], user[order])  # where the user of each begins
    kept = np.zeros(len(rows), dtype=bool)
    kept[order[place - starts < count]] = True
    return kept


def _difference(before: pd.DataFrame, after: pd.DataFrame, rows: int) -> str:
    users, items = (before[name].nunique() - after[name].nunique() for name in (USER, ITEM))
    return f"{users:,} users, {items:,} items, {rows:,} interactions"

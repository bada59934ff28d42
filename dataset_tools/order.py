"""A published sequence file that defines the order of each user's interactions.

Times of whole days leave the order within a day open, and papers that share one file of sequences
share its order. `--order_from` names such a file: a line a user, ``user item item …``, as S3-Rec
and P5 have them, or a table as `table --sequences` takes it. `--order_ids` names the file that
says which ids of the source its numbers stand for: P5's `datamaps.json`.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dataset_tools.sequences import sequences
from dataset_tools.sources import SUFFIXES, read
from recbole_mm.data.atomic import ITEM
from recbole_mm.errors import UserError

Sequences = Iterator[tuple[str, Sequence[str]]]


def add_order(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    add = parser.add_argument
    add("--order_from", metavar="FILE", help="sequences whose order each user's rows take")
    add("--order_ids", metavar="FILE", help="P5's datamaps.json, where their ids are numbers of it")


@dataclass(frozen=True)
class Order:
    """A published order.

    Attributes:
        path: file of sequences.
        users, items: ids of the source by those of the file; None where they are the same.
    """

    path: Path
    users: Mapping[str, str] | None = None
    items: Mapping[str, str] | None = None

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Order | None:
        """Reads the flags; None without them.

        Raises:
            UserError: a file is missing or cannot be read.
        """
        if not arguments.order_from:
            if arguments.order_ids:
                raise UserError("--order_ids says what the ids of --order_from are: give both.")
            return None
        path = Path(arguments.order_from)
        if not path.is_file():
            raise UserError(f"--order_from: there is no file {path}.")
        if not arguments.order_ids:
            return cls(path)
        return cls(path, *_read_ids(Path(arguments.order_ids)))

    def sequences(self) -> Sequences:
        """Each user with its items, by the ids of the source; those unknown are left out.

        Raises:
            UserError: the file cannot be read.
        """
        is_table = self.path.suffix.lower() in SUFFIXES
        for user, items in (_rows if is_table else _lines)(self.path):
            known = user if self.users is None else self.users.get(user)
            if known is not None:
                yield known, items if self.items is None else [self.items.get(i, "") for i in items]

    def apply(
        self, rows: pd.DataFrame, users: Mapping[str, int], items: Mapping[str, int]
    ) -> tuple[pd.DataFrame, list[str]]:
        """Puts the rows of each user in the published order, where that holds the same items and
        never goes back in time; else they stay.

        Args:
            rows: columns user_id and item_id as numbers, timestamp; a user's rows together.
            users, items: number of each id of the source.

        Returns:
            The rows, and sentences for the card.

        Raises:
            UserError: the order fits no user.
        """
        places = _Places(rows)
        for user, sequence in self.sequences():
            places.put(users.get(user, -1), [items.get(item, -1) for item in sequence])
        if not places.done:
            raise UserError(
                f"--order_from {self.path} fits no user: none has the same items there and in the "
                "source. Is it of another dataset, and are its ids those of the source, or of "
                "--order_ids?"
            )
        return rows.iloc[places.order].reset_index(drop=True), places.said(self.path.name)


class _Places:
    """Where each row goes.

    Attributes:
        order: number of the row at each place. Shape: (N,).
        done: how many users are in the published order.
    """

    def __init__(self, rows: pd.DataFrame) -> None:
        self.order, self.done = np.arange(len(rows)), 0
        self._kept: Counter[str] = Counter()  # users that keep their own, by the reason
        self._seen: set[int] = set()
        self._items, self._times = rows[ITEM].to_numpy(), rows["timestamp"].to_numpy()
        user = rows["user_id"].to_numpy()
        starts = np.flatnonzero(np.diff(user, prepend=-1))  # numbers of users begin with 0
        bounds = zip(starts.tolist(), [*starts[1:].tolist(), len(user)], strict=True)
        self._bounds = dict(zip(user[starts].tolist(), bounds, strict=True))

    def put(self, user: int, sequence: Sequence[int]) -> None:
        """Takes the order of one user; of two, the first counts."""
        if user not in self._bounds or user in self._seen:
            return
        self._seen.add(user)
        start, end = self._bounds[user]
        found = _matched(self._items[start:end].tolist(), sequence)
        if found is None:
            self._kept["have other items there"] += 1
        elif (np.diff(self._times[start:end][found]) < 0).any():
            self._kept["would go back in time"] += 1
        else:
            self.order[start:end] = start + np.array(found)
            self.done += 1

    def said(self, name: str) -> list[str]:
        """How many users have the order, and how many keep their own."""
        kept = {**self._kept, "are not there": len(self._bounds) - len(self._seen)}
        lines = [f"order of {name}: {self.done:,} users"]
        lines += [
            f"users that keep their own order because they {why}: {count:,}"
            for why, count in sorted(kept.items())
            if count
        ]
        return lines


def _matched(own: Sequence[int], published: Sequence[int]) -> list[int] | None:
    """For each published item the place of it among one's own, equal ones in turn; or None."""
    if len(own) != len(published):
        return None
    places: dict[int, list[int]] = defaultdict(list)
    for place in range(len(own) - 1, -1, -1):
        places[own[place]].append(place)
    found = []
    for item in published:
        if not places[item]:
            return None
        found.append(places[item].pop())
    return found


# ---------------------------------------------------------------- files


def _lines(path: Path) -> Sequences:
    """``user item item …`` a line."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            for line in file:
                if words := line.split():
                    yield words[0], words[1:]
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason}); re-encode it.") from None


def _rows(path: Path) -> Sequences:
    """A table's."""
    yield from zip(*sequences(read(path), {}), strict=True)


def _read_ids(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    if not path.is_file():
        raise UserError(f"--order_ids: there is no file {path}.")
    try:
        maps = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"--order_ids: {path} is no JSON ({error}).") from None
    if not isinstance(maps, dict):
        raise UserError(f"--order_ids: {path} is no JSON object.")
    return _ids(path, maps, "user"), _ids(path, maps, "item")


def _ids(path: Path, maps: Mapping[str, Any], what: str) -> dict[str, str]:
    """Source ids by published ones, of `id2user`, or of `user2id` turned round."""
    there, back = maps.get(f"id2{what}"), maps.get(f"{what}2id")
    if isinstance(there, dict):
        return {str(number): str(raw) for number, raw in there.items()}
    if isinstance(back, dict):
        return {str(number): str(raw) for raw, number in back.items()}
    raise UserError(
        f"--order_ids: {path} has neither an object 'id2{what}' nor '{what}2id', as P5's "
        "datamaps.json has them."
    )

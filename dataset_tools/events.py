"""Interactions while they are read: tens of bytes each, however long the ids are."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dataset_tools.write import Interactions
from recbole_mm.data.atomic import ITEM, safe_token

Ints = NDArray[np.int64]
_CHUNK = 1 << 16  # rows that are text at a time


class Events:
    """Interactions in the order they come, with ids as numbers.

    Attributes:
        users: number of each user id.
        items: number of each item id.
    """

    def __init__(self) -> None:
        self.users: dict[str, int] = {}
        self.items: dict[str, int] = {}
        self._user, self._item = array("i"), array("i")
        self._time, self._rating = array("q"), array("f")

    def __len__(self) -> int:
        return len(self._user)

    def add(self, user: str, item: str, time: int, rating: float) -> None:
        """One more; a rating that is not known is NaN."""
        self._user.append(self.users.setdefault(user, len(self.users)))
        self._item.append(self.items.setdefault(item, len(self.items)))
        self._time.append(time)
        self._rating.append(rating)

    def coded(self) -> pd.DataFrame:
        """Columns user_id and item_id as numbers, timestamp, rating; by user in order of
        appearance, then by time, equal times as they came."""
        user, time = np.asarray(self._user), np.asarray(self._time)
        order = np.lexsort((time, user))
        return pd.DataFrame(
            {
                "user_id": user[order],
                ITEM: np.asarray(self._item)[order],
                "timestamp": time[order],
                "rating": np.asarray(self._rating)[order],
            }
        )

    def decoded(self, rows: pd.DataFrame) -> Interactions:
        """The same rows as `write_dataset` takes them, made text a chunk at a time."""
        kept = ["user_id", ITEM, "timestamp"]
        kept += ["rating"] if rows["rating"].notna().all() else []
        users = _tokens(self.users, rows["user_id"].to_numpy())
        items = _tokens(self.items, rows[ITEM].to_numpy())
        cells = _cells(rows[kept], {"user_id": users, ITEM: items})
        return Interactions(kept, cells, len(users), len(items), len(rows))


def _tokens(ids: Mapping[str, int], codes: Ints) -> dict[int, str]:
    """The id of each code that occurs, safe for RecBole."""
    occurs = np.zeros(len(ids), dtype=bool)
    occurs[codes] = True
    return {code: safe_token(raw) for raw, code in ids.items() if occurs[code]}


def _cells(rows: pd.DataFrame, tokens: Mapping[str, Mapping[int, str]]) -> Iterator[Sequence[str]]:
    columns = [(name, rows[name].to_numpy()) for name in rows.columns]
    for start in range(0, len(rows), _CHUNK):
        parts = [(name, values[start : start + _CHUNK].tolist()) for name, values in columns]
        yield from zip(*(_texts(values, tokens.get(name)) for name, values in parts), strict=True)


def _texts(values: list[Any], tokens: Mapping[int, str] | None) -> Iterator[str]:
    if tokens is not None:
        return map(tokens.__getitem__, values)
    is_float = bool(values) and isinstance(values[0], float)
    return map("{:.7g}".format if is_float else str, values)  # seven digits are what float32 has

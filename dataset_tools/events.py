"""Interactions while they are read: tens of bytes each, however long the ids are."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from recbole_mm.data.atomic import ITEM, safe_token

Ints = NDArray[np.int64]


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

    def coded(self, keep: Callable[[str], bool] = lambda item: True) -> pd.DataFrame:
        """Columns user_id and item_id as numbers, timestamp, rating; by user in order of
        appearance, then by time, equal times as they came.

        Args:
            keep: which item ids are taken.
        """
        user, item = np.asarray(self._user), np.asarray(self._item)
        time = np.asarray(self._time)
        kept = np.fromiter(map(keep, self.items), dtype=bool, count=len(self.items))
        order = np.lexsort((time, user))
        order = order[kept[item[order]]]
        return pd.DataFrame(
            {
                "user_id": user[order],
                ITEM: item[order],
                "timestamp": time[order],
                "rating": np.asarray(self._rating)[order],
            }
        )

    def decoded(self, rows: pd.DataFrame) -> pd.DataFrame:
        """The same rows as `write_dataset` takes them: all text, equal cells one object."""
        found = {
            "user_id": _tokens(self.users, rows["user_id"].to_numpy()),
            ITEM: _tokens(self.items, rows[ITEM].to_numpy()),
            "timestamp": _texts(rows["timestamp"].to_numpy()),
        }
        if rows["rating"].notna().all():
            found["rating"] = _texts(rows["rating"].to_numpy())
        return pd.DataFrame(found)


def _tokens(ids: dict[str, int], codes: Ints) -> NDArray[np.object_]:
    """The id of each code, safe for RecBole; of those alone that occur. Shape: (N,)."""
    known, at = np.unique(codes, return_inverse=True)
    raw = list(ids)
    return np.array([safe_token(raw[code]) for code in known.tolist()], dtype=object)[at]


def _texts(numbers: NDArray[Any]) -> NDArray[np.object_]:
    known, at = np.unique(numbers, return_inverse=True)
    form = "{:.10g}" if known.dtype.kind == "f" else "{}"
    return np.array([form.format(number) for number in known.tolist()], dtype=object)[at]

"""Vectors of histories that are computed once as long as weights stay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]
MOST = 1 << 18  # histories: more users than an evaluation has, and no end of memory in a service


def make_room(kept: dict[Any, Any], most: int = MOST) -> None:
    """Drops the oldest of what is kept beyond so many."""
    for key in list(islice(kept, max(0, len(kept) - most))):
        del kept[key]


class KeptVectors:
    """Vectors by history; equal histories are read once, until `forget`.

    Args:
        most: how many are kept beside those asked for last.
    """

    def __init__(self, most: int = MOST) -> None:
        self.most = most
        self._kept: dict[bytes, Tensor] = {}

    def of(self, histories: Sequence[Ints], compute: Callable[[list[Ints]], Tensor]) -> Tensor:
        """A vector for each history.

        Args:
            histories: item ids, oldest first. Length: B.
            compute: makes the vectors of n histories that are new. Shape: (n, H).

        Returns:
            Shape: (B, H).
        """
        make_room(self._kept, self.most)
        keys = [history.tobytes() for history in histories]
        pairs = zip(keys, histories, strict=True)
        if new := {key: history for key, history in pairs if key not in self._kept}:
            self._kept.update(zip(new, compute(list(new.values())), strict=True))
        return torch.stack([self._kept[key] for key in keys])

    def forget(self) -> None:
        """To be called when weights have changed."""
        self._kept.clear()

"""Vectors of histories that are computed once as long as weights stay."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]


class KeptVectors:
    """Vectors by history; equal histories are read once, until `forget`."""

    def __init__(self) -> None:
        self._kept: dict[bytes, Tensor] = {}

    def of(self, histories: Sequence[Ints], compute: Callable[[list[Ints]], Tensor]) -> Tensor:
        """A vector for each history.

        Args:
            histories: item ids, oldest first. Length: B.
            compute: makes the vectors of n histories that are new. Shape: (n, H).

        Returns:
            Shape: (B, H).
        """
        keys = [history.tobytes() for history in histories]
        pairs = zip(keys, histories, strict=True)
        if new := {key: history for key, history in pairs if key not in self._kept}:
            self._kept.update(zip(new, compute(list(new.values())), strict=True))
        return torch.stack([self._kept[key] for key in keys])

    def forget(self) -> None:
        """To be called when weights have changed."""
        self._kept.clear()

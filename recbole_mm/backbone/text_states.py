"""Text states of a frozen language model, computed once and kept on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from recbole_mm.backbone.batch import by_length
from recbole_mm.backbone.text_model import TextModel
from recbole_mm.backbone.vision import FeatureLog

Ids = NDArray[np.int64]
TOKENS_AT_ONCE = 8192  # padded tokens in one forward pass


class TextStates:
    """The mean state of each text that enters each layer, without prefix; float16 on disk.

    Args:
        model: whose states.
        cache: the folder of all caches.
        frozen: whether the model stays as it is; the states of one that is trained are computed
            when asked for.
    """

    def __init__(self, model: TextModel, cache: Path, frozen: bool) -> None:
        self.model, self.frozen = model, frozen
        key = hashlib.sha256(f"{model.version} {model.model.dtype}".encode()).hexdigest()[:16]
        self.log = FeatureLog(cache / f"text-states-{key}", model.reads.width, torch.float16)

    def fill(self, rows: Sequence[Ids], show_progress: bool) -> None:
        """Computes and keeps what is not kept yet; a killed run goes on."""
        if not self.frozen:
            return
        new = {_key(row): row for row in rows}
        missing = [row for key, row in new.items() if self.log.grid(key) is None]
        if not missing:
            return
        with tqdm(
            total=len(missing),
            desc="Text states",
            unit="text",
            disable=not show_progress,
            ncols=100,
        ) as bar:
            for group in by_length(list(map(len, missing)), TOKENS_AT_ONCE):
                self._compute([missing[row] for row in group])
                bar.update(len(group))

    def get(self, rows: Sequence[Ids]) -> Tensor:
        """Shape: (N, B, H), float32."""
        if not self.frozen:
            return self.model.layer_means(self.model.padded(rows))
        self.fill(rows, show_progress=False)
        kept = [self.log.read(_key(row)) for row in rows]
        return torch.stack([state.float() for state in kept if state is not None], dim=1)

    def _compute(self, rows: Sequence[Ids]) -> None:
        states = self.model.layer_means(self.model.padded(rows))  # (N, B, H)
        for place, row in enumerate(rows):
            self.log.append(_key(row), (1, 1, len(states)), states[:, place])


def _key(row: Ids) -> str:
    return hashlib.sha256(row.tobytes()).hexdigest()

"""Prompts of different lengths as one right-padded batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recbole_mm.backbone.prompt import Prompt


@dataclass(frozen=True)
class PromptBatch:
    """What one forward pass reads.

    Padding stands on the right, where causal attention never looks back from: no mask is needed,
    except where other tokens are to follow; then it stands on the left.

    Attributes:
        ids: token ids. Shape: (B, T).
        positions: rotary positions. Shape: (A, B, T).
        last: index of each prompt's last token. Shape: (B,).
        items: the items whose images are in the batch, each once.
        image_at: where image rows go, as indices into the flattened ids. Shape: (n,).
        image_row: which of the rows of all `items` goes there, one behind the other. Shape: (n,).
    """

    ids: Tensor
    positions: Tensor
    last: Tensor
    items: list[int]
    image_at: Tensor
    image_row: Tensor

    def to(self, device: torch.device) -> PromptBatch:
        """The batch on another device."""
        return PromptBatch(
            self.ids.to(device),
            self.positions.to(device),
            self.last.to(device),
            self.items,
            self.image_at.to(device),
            self.image_row.to(device),
        )


def collate(prompts: Sequence[Prompt], pad_id: int, left: bool = False) -> PromptBatch:
    """Pads prompts to the longest, on the right or on the left, and gathers their image slots."""
    B, T = len(prompts), max(len(prompt) for prompt in prompts)
    starts = [T - len(prompt) if left else 0 for prompt in prompts]
    ids = np.full((B, T), pad_id, dtype=np.int64)
    positions = np.zeros((prompts[0].positions.shape[0], B, T), dtype=np.int64)
    for row, (prompt, start) in enumerate(zip(prompts, starts, strict=True)):
        ids[row, start : start + len(prompt)] = prompt.ids
        positions[:, row, start : start + len(prompt)] = prompt.positions
        # Padding behind a prompt counts on: positions that began anew would be read as another
        # prompt packed into the row, and attention would need a mask.
        behind = T - start - len(prompt)
        positions[:, row, start + len(prompt) :] = prompt.span + np.arange(behind)
    items, image_at, image_row = _slots(prompts, starts, T)
    return PromptBatch(
        torch.from_numpy(ids),
        torch.from_numpy(positions),
        torch.tensor([start + len(p) - 1 for p, start in zip(prompts, starts, strict=True)]),
        items,
        torch.from_numpy(image_at),
        torch.from_numpy(image_row),
    )


def _slots(
    prompts: Sequence[Prompt], starts: Sequence[int], T: int
) -> tuple[list[int], NDArray[np.int64], NDArray[np.int64]]:
    first_row: dict[int, int] = {}
    total = 0
    at, rows = [], []
    for b, (prompt, start) in enumerate(zip(prompts, starts, strict=True)):
        for slot in prompt.slots:
            if slot.item not in first_row:
                first_row[slot.item] = total
                total += slot.count
            span = np.arange(slot.count, dtype=np.int64)
            at.append(span + (b * T + start + slot.start))
            rows.append(span + first_row[slot.item])
    if not at:
        none = np.zeros(0, dtype=np.int64)
        return [], none, none
    return list(first_row), np.concatenate(at), np.concatenate(rows)


def by_length(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Splits prompts, longest first, into batches of like length.

    Args:
        lengths: tokens of each prompt.
        max_tokens: padded tokens in a batch, at most; a single longer prompt is a batch of one.

    Yields:
        Indices into `lengths`; each index once.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    start = 0
    while start < len(order):
        fits = max(1, max_tokens // max(1, lengths[order[start]]))
        yield order[start : start + fits]
        start += fits

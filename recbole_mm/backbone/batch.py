"""Prompts of different lengths as one right-padded batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recbole_mm.backbone.prompt import Fork, Prompt


@dataclass(frozen=True)
class PromptBatch:
    """What one forward pass reads.

    Padding stands on the right, where causal attention never looks back from: no mask is needed,
    except between the branches of forks.

    Attributes:
        ids: token ids. Shape: (B, T).
        positions: rotary positions. Shape: (A, B, T).
        last: index of the last token of each prompt, or of each branch. Shape: (B, S).
        items: the items whose images are in the batch, each once.
        image_at: where image rows go, as indices into the flattened ids. Shape: (n,).
        image_row: which of the rows of all `items` goes there, one behind the other. Shape: (n,).
        branch: of forks: 0 in the trunk, then the branch's number; None for prompts. Shape: (B, T).
    """

    ids: Tensor
    positions: Tensor
    last: Tensor
    items: list[int]
    image_at: Tensor
    image_row: Tensor
    branch: Tensor | None = None

    def to(self, device: torch.device) -> PromptBatch:
        """The batch on another device."""
        return PromptBatch(
            self.ids.to(device),
            self.positions.to(device),
            self.last.to(device),
            self.items,
            self.image_at.to(device),
            self.image_row.to(device),
            None if self.branch is None else self.branch.to(device),
        )


def collate(prompts: Sequence[Prompt], pad_id: int) -> PromptBatch:
    """Pads prompts on the right to the longest and gathers their image slots."""
    B, T = len(prompts), max(len(prompt) for prompt in prompts)
    ids = np.full((B, T), pad_id, dtype=np.int64)
    positions = np.zeros((prompts[0].positions.shape[0], B, T), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt.ids
        positions[:, row, : len(prompt)] = prompt.positions
    items, image_at, image_row = _slots(prompts, T)
    return PromptBatch(
        torch.from_numpy(ids),
        torch.from_numpy(positions),
        torch.tensor([[len(prompt) - 1] for prompt in prompts]),
        items,
        torch.from_numpy(image_at),
        torch.from_numpy(image_row),
    )


def collate_forks(forks: Sequence[Fork], pad_id: int) -> PromptBatch:
    """Pads forks, all of as many branches, on the right to the longest."""
    batch = collate([fork.prompt for fork in forks], pad_id)
    ends = [[*fork.starts[1:], len(fork)] for fork in forks]
    starts = torch.tensor([fork.starts for fork in forks])  # (B, S)
    place = torch.arange(batch.ids.shape[1])
    branch = (place[:, None] >= starts[:, None, :]).sum(2)  # (B, T)
    return replace(batch, last=torch.tensor(ends) - 1, branch=branch)


def branch_mask(branch: Tensor, dtype: torch.dtype) -> Tensor:
    """What each token of a fork attends to: the trunk, and its own branch up to itself.

    Args:
        branch: see `PromptBatch`. Shape: (B, T).
        dtype: of the mask: 0 where it attends and the lowest number elsewhere, which every
            implementation of attention takes.

    Returns:
        Shape: (B, 1, T, T).
    """
    T = branch.shape[1]
    unseen = branch[:, :, None] != branch[:, None, :]  # (B, T, T)
    unseen &= (branch != 0)[:, None, :]
    unseen |= torch.ones(T, T, dtype=torch.bool, device=branch.device).triu(1)
    mask = torch.zeros(unseen.shape, dtype=dtype, device=branch.device)
    return mask.masked_fill_(unseen, torch.finfo(dtype).min)[:, None]


def _slots(
    prompts: Sequence[Prompt], T: int
) -> tuple[list[int], NDArray[np.int64], NDArray[np.int64]]:
    first_row: dict[int, int] = {}
    total = 0
    at, rows = [], []
    for b, prompt in enumerate(prompts):
        for slot in prompt.slots:
            if slot.item not in first_row:
                first_row[slot.item] = total
                total += slot.count
            span = np.arange(slot.count, dtype=np.int64)
            at.append(span + (b * T + slot.start))
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

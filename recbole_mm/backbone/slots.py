"""Vectors in place of tokens, for any causal language model of Hugging Face.

A slot is a piece of a prompt: one placeholder token, whose embedding gives way to a vector. Where
slots stand is kept while the prompt is assembled and never searched for, so that no text can make
one. Prompts that begin alike may be packed into one row: the beginning stands there once, and
neither of the branches behind it sees another (block mask, positions that go on from the trunk).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from recbole_mm.backbone.prompt import Fork, ImageSlot, Prompt, join

Ints = NDArray[np.int64]
READ = 0  # the slot of the learnt vector whose state is read; the others are called by their items
_PADDING = -1  # as a branch


def slot_piece(key: int, placeholder: int) -> Prompt:
    """A piece that is one slot.

    Args:
        key: whose vector stands there: an item's id, or `READ`.
        placeholder: id of any token; its embedding is never looked at.
    """
    ids = np.array([placeholder], dtype=np.int64)
    return Prompt(ids, np.zeros((1, 1), dtype=np.int64), 1, (ImageSlot(key, 0, 1),))


@dataclass(frozen=True)
class Packed:
    """A trunk and its branches in one row.

    Attributes:
        prompt: all tokens; positions of each branch go on from the trunk's.
        branch: 0 of the trunk, from 1 on of the branches. Shape: (T,).
        answers: as many tokens at the end of each branch are what a model has to say.
    """

    prompt: Prompt
    branch: Ints
    answers: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt)


def pack(split: Fork, answers: Sequence[int] | None = None) -> Packed:
    """One row of a fork.

    Args:
        split: the trunk with its branches.
        answers: tokens of an answer at the end of each branch; None: there is none.

    Raises:
        ValueError: a branch is its answer alone: no state of its own tells the first token.
    """
    answers = answers or [0] * len(split.branches)
    if any(n >= len(b) for n, b in zip(answers, split.branches, strict=True)):
        raise ValueError("an answer needs something of its branch before it")
    pieces = (split.trunk, *split.branches)
    row = replace(join(pieces), positions=np.concatenate([p.positions for p in pieces], axis=1))
    branch = np.repeat(np.arange(len(pieces)), [len(piece) for piece in pieces])
    return Packed(row, branch, tuple(answers))


@dataclass(frozen=True)
class SlotBatch:
    """Rows of like length, padded on the right; places are indices into the flattened (B, T).

    Attributes:
        ids: token ids, placeholders in the slots. Shape: (B, T).
        positions: shape (B, T).
        branch: see `Packed`; -1 is padding. Shape: (B, T).
        keys: whose vectors stand in slots, each once; `READ` is not among them. Length: n.
        slot_at: places of their slots. Shape: (slots,).
        slot_key: which of `keys` stands there. Shape: (slots,).
        read_at: places of the slots `READ`, row by row. Shape: (reads,).
        answer_at: places whose states are to tell the next token. Shape: (answer tokens,).
        answer_ids: those tokens. Shape: (answer tokens,).
    """

    ids: Tensor
    positions: Tensor
    branch: Tensor
    keys: list[int]
    slot_at: Tensor
    slot_key: Tensor
    read_at: Tensor
    answer_at: Tensor
    answer_ids: Tensor

    @property
    def is_forked(self) -> bool:
        """Whether some row has two branches: then attention needs a mask."""
        return bool((self.branch > 1).any())

    def to(self, device: torch.device) -> SlotBatch:
        """The batch on another device."""
        moved: dict[str, Any] = {
            k: v.to(device) if isinstance(v, Tensor) else v for k, v in vars(self).items()
        }
        return SlotBatch(**moved)


def collate_packed(rows: Sequence[Packed], pad_id: int) -> SlotBatch:
    """Pads rows to the longest and gathers what is to be known of their tokens."""
    B, T = len(rows), max(map(len, rows))
    ids = np.full((B, T), pad_id, dtype=np.int64)
    branch = np.full((B, T), _PADDING, dtype=np.int64)
    positions = np.zeros((B, T), dtype=np.int64)
    for b, row in enumerate(rows):
        n = len(row)
        ids[b, :n], branch[b, :n] = row.prompt.ids, row.branch
        # Padding counts on: positions that began anew would be read as another prompt in the row.
        positions[b, :n] = row.prompt.positions[0]
        positions[b, n:] = row.prompt.positions[0, -1] + 1 + np.arange(T - n)
    slots = [(b * T + s.start, s.item) for b, row in enumerate(rows) for s in row.prompt.slots]
    filled = [(at, key) for at, key in slots if key != READ]
    keys = list(dict.fromkeys(key for _, key in filled))
    place = {key: i for i, key in enumerate(keys)}
    answers = np.concatenate([_answers(row) + b * T for b, row in enumerate(rows)])
    return SlotBatch(
        torch.from_numpy(ids),
        torch.from_numpy(positions),
        torch.from_numpy(branch),
        keys,
        _longs([at for at, _ in filled]),
        _longs([place[key] for _, key in filled]),
        _longs([at for at, key in slots if key == READ]),
        torch.from_numpy(answers - 1),
        torch.from_numpy(ids.reshape(-1)[answers]),
    )


def _answers(row: Packed) -> Ints:
    """Where a row's answer tokens stand."""
    ends = [int(np.flatnonzero(row.branch == b + 1)[-1]) + 1 for b in range(len(row.answers))]
    spans = [np.arange(end - n, end) for end, n in zip(ends, row.answers, strict=True)]
    return np.concatenate(spans).astype(np.int64)


def _longs(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def block_mask(branch: Tensor) -> Tensor:
    """What each token sees: itself and, of what stands before it, the trunk and its own branch.

    Args:
        branch: see `SlotBatch`. Shape: (B, T).

    Returns:
        Shape: (B, 1, T, T), bool; queries by keys.
    """
    T = branch.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=branch.device).tril()
    asked, asking = branch[:, None, :], branch[:, :, None]
    return (causal & ((asked == 0) | (asked == asking)))[:, None]


class SlotModel(nn.Module):
    """A causal language model that reads prompts with slots.

    Args:
        model: a `...ForCausalLM` of `transformers` whose logits are its head's of the last states.

    Attributes:
        width: of the vectors that stand in slots, and of the states.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.width = int(model.get_input_embeddings().weight.shape[1])

    @property
    def dtype(self) -> torch.dtype:
        """Of the layers' arithmetic, as their norms have it; what is trained may be wider."""
        norms = [p for p in self.base.parameters() if p.ndim == 1]
        return norms[-1].dtype

    @property
    def base(self) -> Any:
        """The model without its head."""
        model: Any = self.model
        return model.base_model

    def forward(self, batch: SlotBatch, vectors: Tensor, read: Tensor) -> Tensor:
        """Last states of all tokens.

        Args:
            batch: on the model's device.
            vectors: of `batch.keys`, in their order. Shape: (n, width).
            read: the vector of the slots `READ`. Shape: (width,).

        Returns:
            Shape: (B * T, width), of the model's type.
        """
        model: Any = self.model
        embeds = model.get_input_embeddings()(batch.ids).flatten(0, 1)  # (B * T, width)
        if len(batch.slot_at):
            filling = vectors.to(embeds)[batch.slot_key]  # (slots, width)
            embeds = embeds.index_copy(0, batch.slot_at, filling)
        if len(batch.read_at):
            filling = read.to(embeds).expand(len(batch.read_at), -1)  # (reads, width)
            embeds = embeds.index_copy(0, batch.read_at, filling)
        found = self.base(
            inputs_embeds=embeds.view(*batch.ids.shape, -1).to(self.dtype),  # (B, T, width)
            attention_mask=self._mask(batch),
            position_ids=batch.positions,
            use_cache=False,
        )
        states: Tensor = found.last_hidden_state  # (B, T, width)
        return states.flatten(0, 1)

    def logits(self, states: Tensor) -> Tensor:
        """The head's, float32. (n, width) -> (n, vocabulary)."""
        model: Any = self.model
        head = model.get_output_embeddings()
        found: Tensor = head(states.to(head.weight.dtype))
        return found.float()

    def _mask(self, batch: SlotBatch) -> Tensor | None:
        """None where padding stands behind one prompt a row, which never looks there."""
        if not batch.is_forked:
            return None
        seen = block_mask(batch.branch)
        if self.base.config._attn_implementation == "sdpa":
            return seen
        least = torch.finfo(self.dtype).min
        return torch.zeros_like(seen, dtype=self.dtype).masked_fill(~seen, least)

"""A language model that reads users and items as texts with their ID vectors (RA-Rec, figure 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from recbole_mm.model.layers.alignment import Alignment, Concatenation, InputAlignment

Ints = NDArray[np.int64]
_FIRST_SCALE = 20.0  # of cosines


@dataclass(frozen=True)
class AlignmentSettings:
    """How ID vectors come into a language model, and what is trained.

    Attributes:
        inject: prefix, inputs, project_inputs, or concatenate (beside a text's vector).
        projector: per_layer or shared.
        use_id: whether there are ID vectors at all.
        n_instructions: learnt vectors before the ID's.
        tune: alignment, language_model or both.
        score_norm: none, or cosine: vectors of length 1 and a learnt scale.
        tokens_at_once: padded tokens in one forward pass.
    """

    inject: str
    projector: str
    use_id: bool
    n_instructions: int
    tune: str
    score_norm: str
    tokens_at_once: int


class AlignedModel(nn.Module):
    """A language model whose users and items are texts with ID vectors in them.

    Args:
        language_model: a `TextModel`.
        id_size: D of the ID vectors.
        how: it is aligned.

    Attributes:
        use_id: whether there are ID vectors at all.
        sides: the alignment of ``user`` and of ``item``.
        contrasts: whether there are projected vectors in every layer to be contrasted.
    """

    def __init__(self, language_model: Any, id_size: int, how: AlignmentSettings) -> None:
        super().__init__()
        self.language_model = language_model
        self.inject, self.tokens_at_once = how.inject, how.tokens_at_once
        self.use_id = how.use_id
        trains = {"alignment": (True, False), "both": (True, True), "language_model": (False, True)}
        has_prefix, self.trains_model = trains[how.tune]
        if self.trains_model:
            language_model.model.float().requires_grad_(True)
        self._plain: dict[bytes, Tensor] = {}  # vectors of texts, by a frozen language model alone
        self.sides = nn.ModuleDict()
        if has_prefix:
            self.sides.update({side: self._side(id_size, how) for side in ("user", "item")})
            # Both begin as one: the product of what they make is then near that of the ID vectors.
            self.sides["item"].load_state_dict(self.sides["user"].state_dict())
        self.contrasts = has_prefix and how.inject == "prefix" and how.use_id
        self.log_scale: nn.Parameter | None = None
        if how.score_norm == "cosine":
            self.log_scale = nn.Parameter(torch.tensor(_FIRST_SCALE).log())

    def train(self, mode: bool = True) -> AlignedModel:
        """A frozen language model stays as it is evaluated, without dropout."""
        super().train(mode)
        if not self.trains_model:
            self.language_model.eval()
        return self

    def _side(self, id_size: int, how: AlignmentSettings) -> nn.Module:
        reads, n = self.language_model.reads, how.n_instructions
        if how.inject == "prefix":
            shared = how.projector == "shared"
            return Alignment(reads.n_layers, id_size, reads.width, n, how.use_id, shared)
        if how.inject == "concatenate":
            return Concatenation(id_size, self.language_model.width)
        words = reads.word_embeddings
        # A copy: they stay as they were where the model's own are trained, on every device.
        given = words.detach().clone() if how.inject == "project_inputs" else None
        return InputAlignment(id_size, words.shape[1], n, given)

    @property
    def scale(self) -> Tensor:
        """Of a score: 1, or a learnt one of cosines. Shape: ()."""
        return torch.ones(()) if self.log_scale is None else self.log_scale.exp()

    def users(self, texts: Sequence[Ints], vectors: Tensor) -> Tensor:
        """Vectors of users by their texts and scaled ID vectors. (B, D) -> (B, H)."""
        return self._encode("user", texts, vectors)

    def items(self, texts: Sequence[Ints], vectors: Tensor) -> Tensor:
        """Vectors of items likewise. (B, D) -> (B, H)."""
        return self._encode("item", texts, vectors)

    def _encode(self, side: str, texts: Sequence[Ints], vectors: Tensor) -> Tensor:
        """In groups of like length, so that little is padding."""
        from recbole_mm.backbone.batch import by_length

        groups = list(by_length(list(map(len, texts)), self.tokens_at_once))
        parts = [self._group(side, [texts[row] for row in rows], vectors[rows]) for rows in groups]
        order = torch.tensor([row for rows in groups for row in rows], device=vectors.device)
        found = torch.cat(parts)[order.argsort()]
        return F.normalize(found, dim=1) if self.log_scale is not None else found

    def _group(self, side: str, texts: list[Ints], vectors: Tensor) -> Tensor:
        if self.inject == "concatenate":
            return self.sides[side](vectors, self._texts(texts))  # type: ignore[no-any-return]
        batch = self.language_model.padded(texts)
        if side not in self.sides:
            return self.language_model.vectors(batch)  # type: ignore[no-any-return]
        extra = self.sides[side](vectors)
        how = {"prefix" if self.inject == "prefix" else "inputs": extra}
        return self.language_model.vectors(batch, **how)  # type: ignore[no-any-return]

    @torch.no_grad()
    def _texts(self, texts: list[Ints]) -> Tensor:
        """Vectors of texts without any prefix, each computed once. (B, H)"""
        keys = [text.tobytes() for text in texts]
        new = [(k, t) for k, t in zip(keys, texts, strict=True) if k not in self._plain]
        if new:
            batch = self.language_model.padded([text for _, text in new])
            found = self.language_model.vectors(batch)
            self._plain.update(zip([key for key, _ in new], found, strict=True))
        return torch.stack([self._plain[key] for key in keys])

"""What sequential models share: rows moved to the right end, and scores that are products."""

from __future__ import annotations

from typing import Any

import torch
from recbole.data.interaction import Interaction
from torch import Tensor, nn


def to_the_right(item_seq: Tensor, lengths: Tensor) -> Tensor:
    """Moves right-padded rows to the right end of the grid. (B, L), (B,) -> (B, L)."""
    L = item_seq.shape[1]
    place = torch.arange(L, device=item_seq.device) - (L - lengths[:, None])  # (B, L)
    return item_seq.gather(1, place.clamp(min=0)).masked_fill(place < 0, 0)


class ProductScores:
    """Scores of a model whose `forward` gives a vector a row: products with ``item_embedding``."""

    forward: Any
    item_embedding: nn.Embedding
    ITEM_SEQ: str
    ITEM_SEQ_LEN: str
    ITEM_ID: str

    def predict(self, interaction: Interaction) -> Tensor:
        """Scores of one item a row. Shape: (B,)."""
        hidden = self.forward(interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN])
        scores: Tensor = (hidden * self.item_embedding(interaction[self.ITEM_ID])).sum(1)
        return scores

    def full_sort_predict(self, interaction: Interaction) -> Tensor:
        """Scores of all items. Shape: (B, V)."""
        hidden = self.forward(interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN])
        return hidden @ self.item_embedding.weight.T

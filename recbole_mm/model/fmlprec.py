"""FMLP-Rec: sequences filtered in the frequency domain instead of attended to.

Paper: Zhou et al., "Filter-enhanced MLP is All You Need for Sequential Recommendation", WWW 2022
(https://arxiv.org/abs/2202.13556). Official code: https://github.com/RUCAIBox/FMLP-Rec.

Differs from the official code:
- `loss_type: CE`, cross entropy over all items, is the default, as for RecBole's sequential models
  (and PRIME's baselines); BPR with a sampled negative is the paper's.
- Rows come right-padded, as RecBole's do, and are moved to the right end inside: the filter and the
  positions are then those of the official left-padded rows.
"""

from __future__ import annotations

from typing import Any

import torch
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import SequentialRecommender
from recbole.model.loss import BPRLoss
from torch import Tensor, nn
from torch.nn import functional as F

from recbole_mm.model.layers.rows import ProductScores, to_the_right


class FilterLayer(nn.Module):
    """A learnable filter of the whole row: a circular convolution with a kernel as long as the row.

    Args:
        length: L.
        hidden_size: D; each channel has its own filter.
        dropout_prob: of the filtered row.
        std: of the filter's normal initialisation, real and imaginary part.
        eps: of LayerNorm.
    """

    def __init__(
        self, length: int, hidden_size: int, dropout_prob: float, std: float, eps: float
    ) -> None:
        super().__init__()
        self.length = length
        self.filter = nn.Parameter(torch.randn(length // 2 + 1, hidden_size, 2) * std)
        self.dropout = nn.Dropout(dropout_prob)
        self.layer_norm = nn.LayerNorm(hidden_size, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """Equations 6 to 9. (B, L, D) -> (B, L, D)."""
        spectrum = torch.fft.rfft(x, dim=1, norm="ortho")  # (B, L // 2 + 1, D), complex
        filtered = spectrum * torch.view_as_complex(self.filter)
        y = torch.fft.irfft(filtered, n=self.length, dim=1, norm="ortho")  # (B, L, D)
        normed: Tensor = self.layer_norm(x + self.dropout(y))
        return normed


class FeedForward(nn.Module):
    """LN(x + dropout(W2 gelu(W1 x))), equations 10 and 11; the paper writes ReLU, its code GELU."""

    def __init__(self, hidden_size: int, inner_size: int, dropout_prob: float, eps: float) -> None:
        super().__init__()
        self.inner = nn.Linear(hidden_size, inner_size)
        self.outer = nn.Linear(inner_size, hidden_size)
        self.dropout = nn.Dropout(dropout_prob)
        self.layer_norm = nn.LayerNorm(hidden_size, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        normed: Tensor = self.layer_norm(x + self.dropout(self.outer(F.gelu(self.inner(x)))))
        return normed


class FMLPRec(ProductScores, SequentialRecommender):
    """FMLP-Rec behind RecBole's interface."""

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        D, eps = config["hidden_size"], config["layer_norm_eps"]
        dropout, std = config["hidden_dropout_prob"], config["initializer_range"]
        self.loss_type: str = config["loss_type"]
        self.item_embedding = nn.Embedding(self.n_items, D, padding_idx=0)
        self.position_embedding = nn.Embedding(self.max_seq_length, D)
        self.layer_norm = nn.LayerNorm(D, eps=eps)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(
                    FilterLayer(self.max_seq_length, D, dropout, std, eps),
                    FeedForward(D, config["inner_size"], dropout, eps),
                )
                for _ in range(config["n_layers"])
            )
        )
        self.apply(lambda module: _initialise(module, std))

    def forward(self, item_seq: Tensor, item_seq_len: Tensor) -> Tensor:
        """The state at each row's last item. (B, L), (B,) -> (B, D)."""
        short = self.max_seq_length - item_seq.shape[1]  # a filter has a length of its own
        items = to_the_right(F.pad(item_seq, (0, short)), item_seq_len)  # (B, L)
        x = self.item_embedding(items) + self.position_embedding.weight  # (B, L, D)
        states: Tensor = self.blocks(self.dropout(self.layer_norm(x)))
        return states[:, -1]

    def calculate_loss(self, interaction: Interaction) -> Tensor:
        """Cross entropy over all items, or BPR with RecBole's sampled negatives. Shape: ()."""
        hidden = self.forward(interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN])  # (B, D)
        target = interaction[self.POS_ITEM_ID]
        if self.loss_type == "CE":
            return F.cross_entropy(hidden @ self.item_embedding.weight.T, target)
        pairs = torch.stack([target, interaction[self.NEG_ITEM_ID]])  # (2, B)
        liked, other = (hidden * self.item_embedding(pairs)).sum(2)  # (B,), (B,)
        loss: Tensor = BPRLoss()(liked, other)
        return loss


def _initialise(module: nn.Module, std: float) -> None:
    """Normal weights, of the pad's embedding too as in the official code, and zero biases."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=std)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)

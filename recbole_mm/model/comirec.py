"""ComiRec-SA: a user is several interests, each an attention-weighted sum of the items bought.

Paper: Cen et al., "Controllable Multi-Interest Framework for Recommendation", KDD 2020
(https://arxiv.org/abs/2005.09347). Official code: https://github.com/THUDM/ComiRec.

Differs from the official code:
- Of its two ways to extract interests the self-attentive one (SA), not dynamic routing (DR).
- `softmax: full`, cross entropy over all items, is the default; `sampled` draws items as the
  official code does, log-uniformly by popularity, but with replacement, and weighs them so that the
  full softmax's sum is estimated without bias; TensorFlow's corrects the target's score too.
- Every prefix of a user trains; the official code cuts each user at a random place, after four
  items or more. In `train_mode: whole` all prefixes of a user come from one forward pass.
- An item's score is its best over the interests, for any item. The paper asks each interest for its
  N nearest items and keeps the best N of all, which is the same list.
- No controllable aggregation: the paper's greedy list that trades scores for diversity (lambda)
  reorders a finished list and has no part in training.
- Users are split leave-one-out, not into users to train on and users to test on.
"""

from __future__ import annotations

from functools import reduce
from math import inf
from typing import Any, ClassVar

import torch
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import SequentialRecommender
from torch import Tensor, nn

from recbole_mm.data.sequences import TARGETS
from recbole_mm.model.layers.losses import full_softmax_loss
from recbole_mm.model.layers.sampled_softmax import LogUniform, sampled_softmax_loss


class Interests(nn.Module):
    """Self-attentive extraction: softmax over the items of W2^T tanh(W1 (e + p)), K times.

    Positions are read by the attention alone; what it weighs are the items' embeddings.

    Args:
        length: L, the most items of a row.
        hidden_size: D.
        inner_size: width of the attention's hidden layer.
        n_interests: K.
    """

    def __init__(self, length: int, hidden_size: int, inner_size: int, n_interests: int) -> None:
        super().__init__()
        self.position_embedding = nn.Embedding(length, hidden_size)
        self.inner = nn.Linear(hidden_size, inner_size, bias=False)  # W1
        self.outer = nn.Linear(inner_size, n_interests, bias=False)  # W2

    def forward(self, x: Tensor, filled: Tensor) -> Tensor:
        """The interests of whole rows; a row without items has zeros where its pads are zeros.

        Args:
            x: item embeddings. Shape: (B, L, D).
            filled: where there is an item. Shape: (B, L), bool.

        Returns:
            Shape: (B, K, D).
        """
        return _attention(self._logits(x), filled[:, None]) @ x  # (B, K, L) @ (B, L, D)

    def everywhere(self, x: Tensor) -> Tensor:
        """The interests after every item, of the items so far. (B, L, D) -> (B, L, K, D)."""
        L = x.shape[1]
        so_far = torch.ones(L, L, dtype=torch.bool, device=x.device).tril()
        logits = self._logits(x)[:, :, None]  # (B, K, 1, L)
        weights = _attention(logits.expand(-1, -1, L, -1), so_far)  # (B, K, L, L)
        return (weights @ x[:, None]).transpose(1, 2)  # (B, L, K, D)

    def _logits(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, K, L)."""
        placed = x + self.position_embedding.weight[: x.shape[1]]
        logits: Tensor = self.outer(torch.tanh(self.inner(placed)))  # (B, L, K)
        return logits.transpose(1, 2)


def _attention(logits: Tensor, filled: Tensor) -> Tensor:
    """Softmax over the last dimension where `filled`, uniform where nothing is."""
    return logits.masked_fill(~filled, torch.finfo(logits.dtype).min).softmax(-1)


class ComiRec(SequentialRecommender):
    """ComiRec-SA behind RecBole's interface.

    Attributes:
        sampler: of negatives in ``softmax: sampled``, else None.
    """

    train_modes = ("prefix", "whole")
    choices: ClassVar[dict[str, tuple[str, ...]]] = {
        "loss_type": ("CE",),
        "softmax": ("full", "sampled"),
    }
    bounds: ClassVar[dict[str, tuple[float, float]]] = {
        "n_interests": (1, inf),
        "n_negatives": (1, inf),
    }

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        D, std = config["hidden_size"], config["initializer_range"]
        self.n_negatives: int = config["n_negatives"]
        self.item_embedding = nn.Embedding(self.n_items, D, padding_idx=0)
        self.interests = Interests(
            self.max_seq_length, D, config["inner_size"], config["n_interests"]
        )
        for module in self.modules():
            _initialise(module, std)
        self.sampler: LogUniform | None = None
        if config["softmax"] == "sampled":
            bought = dataset.inter_feat[self.POS_ITEM_ID]
            self.sampler = LogUniform(torch.bincount(bought, minlength=self.n_items))

    # --- users -----------------------------------------------------------------------
    def user_vectors(self, item_seq: Tensor, item_seq_len: Tensor) -> Tensor:
        """The interests of each row; zeros where it has no item. (B, L), (B,) -> (B, K, D)."""
        filled = torch.arange(item_seq.shape[1], device=item_seq.device) < item_seq_len[:, None]
        vectors: Tensor = self.interests(self.item_embedding(item_seq), filled)
        return vectors

    def forward(self, item_seq: Tensor, item_seq_len: Tensor) -> Tensor:
        """One vector a row. (B, L), (B,) -> (B, D).

        With one interest that is it, and its products with the items' embeddings are the scores.
        With several it is their mean, whose products are the means over interests while scores are
        the largest: a summary for models that take one vector.
        """
        return self.user_vectors(item_seq, item_seq_len).mean(1)

    # --- training --------------------------------------------------------------------
    def calculate_loss(self, interaction: Interaction) -> Tensor:
        """Cross entropy of each target for the interest nearest to it. Shape: ()."""
        item_seq = interaction[self.ITEM_SEQ]
        if TARGETS in interaction:
            valid = interaction[TARGETS] > 0  # (B, L)
            vectors, target = self._vectors_at(item_seq, valid), interaction[TARGETS][valid]
        else:
            vectors = self.user_vectors(item_seq, interaction[self.ITEM_SEQ_LEN])
            target = interaction[self.POS_ITEM_ID]
        hidden = self.nearest(vectors, target)  # (N, D)
        table = self.item_embedding.weight
        if self.sampler is None:
            return full_softmax_loss(hidden, table[1:], None, target - 1)
        drawn, log_expected = self.sampler(self.n_negatives * len(item_seq))
        return sampled_softmax_loss(hidden, table, target, drawn, log_expected)

    def nearest(self, vectors: Tensor, target: Tensor) -> Tensor:
        """Hard attention: the interest with the largest product. (N, K, D), (N,) -> (N, D)."""
        likeness = (vectors @ self.item_embedding(target)[:, :, None])[:, :, 0]  # (N, K)
        rows = torch.arange(len(target), device=target.device)
        return vectors[rows, likeness.argmax(1)]

    def _vectors_at(self, item_seq: Tensor, wanted: Tensor) -> Tensor:
        """Interests after every wanted place. (B, L), (B, L) -> (N, K, D)."""
        every: Tensor = self.interests.everywhere(self.item_embedding(item_seq))  # (B, L, K, D)
        return every[wanted]

    # --- scores ----------------------------------------------------------------------
    def predict(self, interaction: Interaction) -> Tensor:
        """Scores of one item a row. Shape: (B,)."""
        vectors = self.user_vectors(interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN])
        items = self.item_embedding(interaction[self.ITEM_ID])  # (B, D)
        return (vectors * items[:, None]).sum(2).amax(1)

    def full_sort_predict(self, interaction: Interaction) -> Tensor:
        """Scores of all items. Shape: (B, V)."""
        vectors = self.user_vectors(interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN])
        return self._scores(vectors)

    def scores_at(self, item_seq: Tensor, wanted: Tensor) -> Tensor:
        """Scores of all items after every wanted place, from one pass. (B, L), (B, L) -> (N, V)."""
        return self._scores(self._vectors_at(item_seq, wanted))

    def _scores(self, vectors: Tensor) -> Tensor:
        """An item's best score; never K tables of scores at once. (N, K, D) -> (N, V)."""
        table = self.item_embedding.weight
        return reduce(torch.maximum, (vector @ table.T for vector in vectors.unbind(1)))


def _initialise(module: nn.Module, std: float) -> None:
    """Normal embeddings, but for the pad's zeros; the attention's weights as Xavier has them."""
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=std)
        if module.padding_idx is not None:
            nn.init.zeros_(module.weight[module.padding_idx])
    elif isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)

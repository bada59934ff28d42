"""Cross entropy over a large catalogue, estimated from a few drawn items."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LogUniform(nn.Module):
    """Draws items, popular ones more often: rank r has P(r) = log((r + 2) / (r + 1)) / log(V).

    Ranks count from 0, the most popular item; V - 1 items have one. The pad is never drawn.

    Args:
        counts: how popular each item is; the pad's is not read. Shape: (V,).
    """

    by_rank: Tensor
    log_prob: Tensor

    def __init__(self, counts: Tensor) -> None:
        super().__init__()
        by_rank = counts[1:].argsort(descending=True, stable=True) + 1  # (V - 1,)
        ranks = torch.arange(len(by_rank), dtype=torch.float64)
        prob = torch.log((ranks + 2) / (ranks + 1)) / math.log(len(counts))
        log_prob = torch.full((len(counts),), -math.inf)
        log_prob[by_rank] = prob.log().float()
        self.register_buffer("by_rank", by_rank, persistent=False)
        self.register_buffer("log_prob", log_prob, persistent=False)

    def forward(self, n: int) -> tuple[Tensor, Tensor]:
        """Draws with replacement.

        Returns:
            Items, and the logarithm of how often each is expected among the n. Shapes: (n,).
        """
        u = torch.rand(n, dtype=torch.float64, device=self.by_rank.device)
        ranks = torch.exp(u * math.log(len(self.log_prob))).long() - 1
        items = self.by_rank[ranks.clamp(max=len(self.by_rank) - 1)]
        return items, self.log_prob[items] + math.log(n)


def sampled_softmax_loss(
    hidden: Tensor, table: Tensor, targets: Tensor, drawn: Tensor, log_expected: Tensor
) -> Tensor:
    """Mean of ``log(exp(s_t) + sum over drawn j != t of exp(s_j) / expected_j) - s_t``.

    The sum estimates that over all items but the target without bias (importance sampling), so
    that the loss tends to the full cross entropy as more items are drawn.

    Args:
        hidden: states. Shape: (N, D).
        table: item embeddings. Shape: (V, D).
        targets: item ids. Shape: (N,).
        drawn: item ids, the same for all states. Shape: (S,).
        log_expected: logarithm of how often each of them is expected in ``drawn``. Shape: (S,).

    Returns:
        Shape: ().
    """
    wanted = (hidden * table[targets]).sum(1, keepdim=True)  # (N, 1)
    others = hidden @ table[drawn].T - log_expected.to(hidden.dtype)  # (N, S)
    others = others.masked_fill(drawn == targets[:, None], -math.inf)
    logits = torch.cat([wanted, others], dim=1)  # (N, 1 + S)
    return F.cross_entropy(logits, torch.zeros_like(targets))

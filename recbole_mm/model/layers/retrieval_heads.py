"""I-LLMRec's projectors: items' features and a user's state in shared spaces, one a feature type.

Source: Kim et al., "Image is All You Need", 2025, equations 1, 4 and 6; sizes as in the official
code.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_EPS = 1e-8  # of LayerNorm, as in the official code
ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU}


class Projector(nn.Sequential):
    """Linear, LayerNorm, activation, Linear.

    Args:
        n_in: numbers of an input.
        hidden: of the inner layer.
        n_out: of an output.
        activation: one of `ACTIVATIONS`.
        norm: whether there is a LayerNorm.
    """

    def __init__(
        self, n_in: int, hidden: int, n_out: int, activation: str = "relu", norm: bool = True
    ) -> None:
        middle = [nn.LayerNorm(hidden, eps=_EPS)] if norm else []
        super().__init__(
            nn.Linear(n_in, hidden), *middle, ACTIVATIONS[activation](), nn.Linear(hidden, n_out)
        )


class RetrievalHeads(nn.Module):
    """F_u and F_i of each feature type; a score is the sum of their products.

    Args:
        n_user: size of the state that all user heads read.
        widths: size of the items' features by type, e.g. ``{"img": 1152, "cf": 50}``.
        hidden: of all heads.
        d_s: size of the shared spaces.
    """

    def __init__(self, n_user: int, widths: Mapping[str, int], hidden: int, d_s: int) -> None:
        super().__init__()
        self.of_users = nn.ModuleDict({t: Projector(n_user, hidden, d_s) for t in widths})
        self.of_items = nn.ModuleDict({t: Projector(n, hidden, d_s) for t, n in widths.items()})

    @property
    def types(self) -> list[str]:
        """The feature types in their order."""
        return list(self.of_items)

    def users(self, states: Tensor) -> Tensor:
        """Users in all spaces. (B, n_user) -> (B, types, d_s)."""
        return torch.stack([self.of_users[t](states) for t in self.types], dim=1)

    def items(self, features: Mapping[str, Tensor]) -> Tensor:
        """Items in all spaces, by their features of each type. (n, width) -> (n, types, d_s)."""
        return torch.stack([self.of_items[t](features[t]) for t in self.types], dim=1)


def retrieval_loss(liked: Tensor, others: Tensor, reduction: str = "sum") -> Tensor:
    """Equation 5 of every type: the target up, items that were drawn down.

    Args:
        liked: scores of the targets. Shape: (B, types).
        others: of N items for each. Shape: (B, N, types).
        reduction: ``sum`` over types (equation 7), or ``mean``.

    Returns:
        Means over the batch, and over N. Shape: ().
    """
    up = -F.logsigmoid(liked).mean(0)  # (types,)
    down = -F.logsigmoid(-others).mean((0, 1))  # (types,)
    total = up + down
    return total.sum() if reduction == "sum" else total.mean()

"""Scores of all items by models that score (user, item) pairs alone."""

from __future__ import annotations

from typing import Any

import torch
from recbole.data.interaction import Interaction
from torch import Tensor

# Pairs given to a model at once: DIN's take much.
_PAIRS_AT_ONCE = 1 << 12


def score_pairs(model: Any, rows: Interaction, item_features: Interaction) -> Tensor:
    """Every pair is scored, those of some users at a time.

    Args:
        model: has RecBole's `predict`.
        rows: B users, on the model's device.
        item_features: of all V items, their ids among them, on the same device.

    Returns:
        Shape: (B, V).
    """
    n_items = len(item_features)
    users_at_once = max(_PAIRS_AT_ONCE // n_items, 1)
    blocks = []
    for start in range(0, len(rows), users_at_once):
        part: Interaction = rows[start : start + users_at_once]
        pairs = part.repeat_interleave(n_items)
        pairs.update(item_features.repeat(len(part)))
        blocks.append(model.predict(pairs).view(-1, n_items))
    return torch.cat(blocks)

"""MPNet with a prefix: it has no cache, and its attention no place for one, so its layers run here.

With sdpa, where stock MPNet knows eager attention alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Instead of infinity, with which a row without any token would be NaN; fp16 still holds it.
_UNSEEN = -65504.0


def run_mpnet(
    model: Any,
    embeds: Tensor,
    mask: Tensor,
    positions: Tensor,
    prefix: Tensor,
    keep_states: bool = False,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The forward pass of an `MPNetModel`, by its own parts.

    Args:
        model: the model.
        embeds: of words. Shape: (B, T, H).
        mask: of the prefix and of the text. Shape: (B, P + T).
        positions: of the text, as MPNet counts them. Shape: (B, T).
        prefix: of every layer. Shape: (n_layers, B, P, H).
        keep_states: whether to return the states that enter each layer.

    Returns:
        The last states (B, T, H), and those that enter each layer, or nothing.
    """
    h = model.embeddings(inputs_embeds=embeds, position_ids=positions)
    bias = _bias(model.encoder, mask, positions)
    entering = []
    for layer, d in zip(model.encoder.layer, prefix, strict=True):
        if keep_states:
            entering.append(h)
        seen = layer.attention.dropout(_attend(layer.attention.attn, h, d, bias))
        h = layer.attention.LayerNorm(seen + h)
        h = layer.output(layer.intermediate(h), h)
    return h, tuple(entering)


def _bias(encoder: Any, mask: Tensor, positions: Tensor) -> Tensor:
    """What is added to the products of queries and keys: of a prefix nothing. (B, heads, T, P + T)

    By the tokens' positions, where stock MPNet takes their places in the row: the same for a text
    padded on one side, and it lets vectors before the text stand at the first token's position.
    """
    distances = positions[:, None, :] - positions[:, :, None]  # (B, T, T), of a key from a query
    buckets = encoder.relative_position_bucket(distances)
    bias = encoder.relative_attention_bias(buckets).permute(0, 3, 1, 2).contiguous()
    bias = F.pad(bias, (mask.shape[1] - positions.shape[1], 0))
    return bias.masked_fill(mask[:, None, None] == 0, _UNSEEN)


def _attend(attention: Any, h: Tensor, d: Tensor, bias: Tensor) -> Tensor:
    """Equations 8 to 11 of RA-Rec. (B, T, H)"""
    both = torch.cat([d, h], dim=1)  # (B, P + T, H)
    q, k, v = (
        each.unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)
        for each in (attention.q(h), attention.k(both), attention.v(both))
    )
    dropout = attention.dropout.p if attention.training else 0.0
    seen = F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype), dropout)
    out: Tensor = attention.o(seen.transpose(1, 2).flatten(2))
    return out

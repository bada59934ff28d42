"""Two slow spots of Qwen's vision towers, mended without a change to their weights or results.

Without flash attention, `transformers` calls attention picture by picture; and patches go through a
three-dimensional convolution though each is a row of its own. With many small pictures that is a
quarter of a training step on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# `transformers` hands the pictures' boundaries only to an attention whose name has "flash" in it.
_NAME = "pictures_of_like_length_flash"


def speed_up(tower: Any) -> None:
    """Mends a tower of `transformers`' classes in place; one with flash attention keeps that."""
    from transformers import AttentionInterface

    AttentionInterface.register(_NAME, segment_attention)
    if tower.config._attn_implementation == "sdpa":
        tower.config._attn_implementation = _NAME
    convolution = tower.patch_embed.proj
    if type(convolution) is nn.Conv3d and convolution.stride == convolution.kernel_size:
        convolution.__class__ = _PatchProjection


class _PatchProjection(nn.Conv3d):
    """A convolution of inputs that are one patch each: a matrix product."""

    def forward(self, input: Tensor) -> Tensor:
        if input.shape[2:] != self.kernel_size:
            return super().forward(input)
        return F.linear(input.flatten(1), self.weight.flatten(1), self.bias)[:, :, None, None, None]


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention within segments that stand one behind the other, all of one length at once.

    Args:
        module: unused; the signature of `transformers`' attention functions.
        query: shape (1, heads, N, D).
        key: the same.
        value: the same.
        attention_mask: unused: a segment sees all of itself.
        scaling: of the products; None: 1 / sqrt(D).
        dropout: of the attention weights.
        cu_seq_lens_q: where segments begin, and N. Shape: (segments + 1,).

    Returns:
        Shape: (1, N, heads, D), and no weights.
    """
    ends = query.new_tensor([0, query.shape[2]]).long() if cu_seq_lens_q is None else cu_seq_lens_q
    starts, lengths = ends[:-1].long(), ends.diff().long()
    out = torch.empty_like(query[0]).transpose(0, 1)  # (N, heads, D)
    for length in lengths.unique().tolist():
        rows = starts[lengths == length, None] + torch.arange(
            length, device=starts.device
        )  # (n, L)
        q, k, v = (of[0, :, rows].transpose(0, 1) for of in (query, key, value))  # (n, heads, L, D)
        seen = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling)
        if len(rows) * length == len(out):  # in their order
            return seen.transpose(1, 2).flatten(0, 1)[None], None
        out = out.index_copy(0, rows.flatten(), seen.transpose(1, 2).flatten(0, 1))
    return out[None], None

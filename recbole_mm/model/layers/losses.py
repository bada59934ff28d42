"""Cross entropy over the whole catalogue, taken at the target cells only and a few rows at a time.

The logits of a batch, (N, V), are by far the largest tensor of a sequential recommender. Here they
never exist as a whole: each chunk of rows is projected, turned into its own gradient in place and
reduced before the next one is projected. Value and gradients are those of
``F.cross_entropy(F.linear(hidden, table, bias), targets)``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Logits held at once. A chunk that stays in the processor's cache is a third faster than one that
# does not; a GPU wants large matrix products instead.
_CHUNK_LOGITS_CPU = 1 << 19
_CHUNK_LOGITS_GPU = 1 << 27


def full_softmax_loss(
    hidden: Tensor,
    table: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    chunk: int | None = None,
) -> Tensor:
    """Mean of ``-log softmax(hidden @ table.T + bias)[target]``, in the table's precision.

    Args:
        hidden: states at the target cells. Shape: (N, D).
        table: item embeddings; row 0 (the pad) stays in the softmax. Shape: (V, D).
        bias: a bias for each item, or None. Shape: (V,).
        targets: item ids. Shape: (N,).
        chunk: rows projected at a time; by default as many as suit the device.

    Returns:
        The mean loss, 0 when there is no target. Shape: ().
    """
    limit = _CHUNK_LOGITS_GPU if hidden.is_cuda else _CHUNK_LOGITS_CPU
    rows = chunk or max(1, limit // table.shape[0])
    bias = table.new_zeros(table.shape[0]) if bias is None else bias
    differentiate = torch.is_grad_enabled()
    with torch.autocast(hidden.device.type, enabled=False):
        return _FullSoftmax.apply(hidden.to(table.dtype), table, bias, targets, rows, differentiate)


class _FullSoftmax(torch.autograd.Function):
    """The gradients are made in the forward pass, while a chunk's probabilities are at hand."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        table: Tensor,
        bias: Tensor,
        targets: Tensor,
        rows: int,
        differentiate: bool,
    ) -> Tensor:
        total = hidden.new_zeros(())
        grads = [torch.zeros_like(x) for x in (hidden, table, bias)] if differentiate else []
        for x, y, start in zip(
            hidden.split(rows), targets.split(rows), range(0, len(hidden), rows), strict=False
        ):
            logits = torch.addmm(bias, x, table.T)  # (rows, V)
            top = logits.amax(1)  # (rows,)
            wanted = logits.gather(1, y[:, None]).squeeze(1)  # (rows,)
            error = torch.softmax(logits, 1)  # (rows, V)
            # log-sum-exp from the largest probability, which never underflows.
            total += (top - error.amax(1).log() - wanted).sum()
            if differentiate:
                error[torch.arange(len(y), device=y.device), y] -= 1
                torch.mm(error, table, out=grads[0][start : start + rows])
                grads[1].addmm_(error.T, x)
                grads[2] += error.sum(0)
        ctx.count = max(1, len(hidden))
        ctx.save_for_backward(*grads)
        return total / ctx.count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scale = grad / ctx.count
        hidden, table, bias = ctx.saved_tensors
        return hidden * scale, table * scale, bias * scale, None, None, None

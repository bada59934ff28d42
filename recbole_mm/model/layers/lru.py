"""Linear recurrent units for sequential recommendation, in real arithmetic and without padding.

Paper: Yue et al., "Linear Recurrent Units for Sequential Recommendation", WSDM 2024
(https://arxiv.org/abs/2310.02367); the unit itself: Orvieto et al., "Resurrecting Recurrent Neural
Networks for Long Sequences", ICML 2023 (https://arxiv.org/abs/2303.06349).

A batch is not a padded grid here but the list of its N real cells (`Cells`), so that no time goes
into padding: every pointwise layer takes (N, D), and only the recurrence knows which cell follows
which. Letters: B rows, L longest row, N real cells, D hidden size, H complex states.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Cells:
    """The real cells of B right-padded rows: every row's first item, then every second one, ...

    Rows are taken longest first, so the cells of step t continue the first cells of step t - 1 (the
    layout of torch's ``PackedSequence``).

    Attributes:
        index: position of each cell in the flattened (B, L) grid. Shape: (N,).
        slots: position of each cell in the (steps, B) grid of the sorted rows. Shape: (N,).
        last: where each row's last cell stands in the list. Shape: (B,).
        sizes: rows alive at each step; their sum is N.
    """

    index: Tensor
    slots: Tensor
    last: Tensor
    sizes: list[int]


def real_cells(lengths: Tensor, width: int) -> Cells:
    """Lists the cells of right-padded rows.

    Args:
        lengths: cells of each row, 1 to `width`. Shape: (B,).
        width: of the padded grid, L.
    """
    rows = len(lengths)
    order = torch.argsort(lengths, descending=True, stable=True)  # (B,)
    steps = torch.arange(int(lengths.max()), device=lengths.device)
    alive = steps[:, None] < lengths[order]  # (steps, B)
    slots = alive.flatten().nonzero().squeeze(1)  # (N,)
    index = order[slots % rows] * width + slots // rows  # (N,)
    sizes = alive.sum(1)  # (steps,)
    first = sizes.cumsum(0) - sizes  # (steps,) cells before the step
    last = first[lengths - 1] + torch.argsort(order)  # (B,)
    return Cells(index, slots, last, sizes.tolist())


def recurrence(u: Tensor, lam: Tensor, cells: Cells) -> Tensor:
    """h_t = lam * h_{t-1} + u_t along each row, from h_0 = 0.

    A loop over time on a CPU, where it beats every parallel scan at these lengths; a scan of
    log2(L) levels elsewhere.

    Args:
        u: complex inputs. Shape: (N, H).
        lam: complex decay of each state. Shape: (H,).
        cells: which cell follows which.

    Returns:
        Complex states. Shape: (N, H).
    """
    if u.device.type == "cpu":
        return recurrence_loop(u, lam, cells)
    return recurrence_doubling(u, lam, cells)


def recurrence_loop(u: Tensor, lam: Tensor, cells: Cells) -> Tensor:
    """`recurrence` as one step after another, forwards and backwards."""
    return _Loop.apply(u, lam, cells.sizes)


def recurrence_doubling(u: Tensor, lam: Tensor, cells: Cells) -> Tensor:
    """`recurrence` as a scan by doubling (Hillis and Steele) over the padded grid."""
    rows = cells.sizes[0]
    grid = u.new_zeros(len(cells.sizes) * rows, u.shape[1]).index_copy(0, cells.slots, u)
    h = grid.view(-1, rows, u.shape[1])  # (L, B, H)
    shift = 1
    while shift < len(h):
        # h holds the sum of the last `shift` inputs, each decayed by its age; lam is lam**shift.
        h = torch.cat([h[:shift], h[shift:] + lam * h[:-shift]])
        lam, shift = lam * lam, 2 * shift
    return h.flatten(0, 1)[cells.slots]  # (N, H)


def _blocks(sizes: list[int]) -> Iterator[tuple[slice, slice]]:
    """For each step from the second: the cells it continues and its own cells."""
    starts = [0, *accumulate(sizes)]
    for t in range(1, len(sizes)):
        before = starts[t - 1]
        yield slice(before, before + sizes[t]), slice(starts[t], starts[t + 1])


class _Loop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, lam: Tensor, sizes: list[int]) -> Tensor:
        h = u.clone(memory_format=torch.contiguous_format)
        for before, here in _blocks(sizes):
            h[here].addcmul_(lam, h[before])
        ctx.sizes = sizes
        ctx.save_for_backward(h, lam)
        return h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        h, lam = ctx.saved_tensors
        conj = lam.conj().resolve_conj()
        delta = grad.clone(memory_format=torch.contiguous_format)
        for before, here in reversed(list(_blocks(ctx.sizes))):
            delta[before].addcmul_(conj, delta[here])
        sizes = torch.tensor(ctx.sizes)
        fed = torch.arange(ctx.sizes[0], len(h))  # cells that continue another one
        fed -= torch.repeat_interleave(sizes[:-1], sizes[1:])
        d_lam = (h[fed].conj() * delta[ctx.sizes[0] :]).sum(0)  # (H,)
        return delta, d_lam, None


class LRULayer(nn.Module):
    """LayerNorm(Dropout(Re(C h + c)) + x) with h_t = lam * h_{t-1} + gamma * (B x_t + b).

    Paper, equations 3 to 6. `in_proj` holds (B, b) and `out_proj` holds (Re C, -Im C, Re c), real
    and imaginary parts side by side, so that one real product stands for each complex one.

    Args:
        hidden_size: D.
        n_states: H, the number of complex states.
        dropout_prob: of the output.
        radius: where \\|lam\\| starts, uniform over the ring's area.
    """

    def __init__(
        self,
        hidden_size: int,
        n_states: int,
        dropout_prob: float = 0.0,
        radius: tuple[float, float] = (0.8, 0.99),
    ) -> None:
        super().__init__()
        self.n_states = n_states
        self.params_log = nn.Parameter(ring_init(n_states, *radius))  # (3, H)
        self.in_proj = nn.Linear(hidden_size, 2 * n_states)
        self.out_proj = nn.Linear(2 * n_states, hidden_size)
        self.dropout = nn.Dropout(dropout_prob)
        self.layer_norm = nn.LayerNorm(hidden_size)

    def decay(self) -> Tensor:
        """lam = exp(-exp(nu_log) + i exp(theta_log)). Shape: (H,), complex."""
        nu, theta, _ = self.params_log.exp()
        return torch.polar((-nu).exp(), theta)

    def forward(self, x: Tensor, cells: Cells) -> Tensor:
        """(N, D) -> (N, D)."""
        return self._read(recurrence(self._drive(x), self.decay(), cells), x)

    def step(self, state: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """One more cell of each row: state (B, H), x (B, D) -> output (B, D), state (B, H)."""
        state = self.decay() * state + self._drive(x)
        return self._read(state, x), state

    def _drive(self, x: Tensor) -> Tensor:
        """gamma * (B x + b). (N, D) -> (N, H), complex."""
        gamma = self.params_log[2].exp().repeat_interleave(2)  # (2H,)
        # gamma is folded into the small weight rather than multiplied into the large result.
        u = F.linear(x, self.in_proj.weight * gamma[:, None], self.in_proj.bias * gamma)  # (N, 2H)
        # Under autocast the recurrence keeps its full precision.
        return torch.view_as_complex(u.to(gamma.dtype).unflatten(1, (-1, 2)))

    def _read(self, h: Tensor, x: Tensor) -> Tensor:
        """LayerNorm(Dropout(Re(C h + c)) + x). (N, H), (N, D) -> (N, D)."""
        y = self.out_proj(torch.view_as_real(h).flatten(1))  # (N, D)
        return self.layer_norm(self.dropout(y) + x)


class FeedForward(nn.Module):
    """LayerNorm(Dropout(W2 Dropout(GELU(W1 x + b1)) + b2) + x), exact GELU. (N, D) -> (N, D)."""

    def __init__(self, hidden_size: int, inner_size: int, dropout_prob: float = 0.0) -> None:
        super().__init__()
        self.w_1 = nn.Linear(hidden_size, inner_size)
        self.w_2 = nn.Linear(inner_size, hidden_size)
        self.dropout = nn.Dropout(dropout_prob)
        self.layer_norm = nn.LayerNorm(hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.dropout(F.gelu(self.w_1(x)))  # (N, inner)
        return self.layer_norm(self.dropout(self.w_2(inner)) + x)


class LRUBlock(nn.Module):
    """An `LRULayer` followed by a `FeedForward`, each with its residual and norm behind it."""

    def __init__(self, lru: LRULayer, feed_forward: FeedForward) -> None:
        super().__init__()
        self.lru, self.feed_forward = lru, feed_forward

    def forward(self, x: Tensor, cells: Cells) -> Tensor:
        """(N, D) -> (N, D)."""
        return self.feed_forward(self.lru(x, cells))

    def step(self, state: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """One more cell of each row: state (B, H), x (B, D) -> output (B, D), state (B, H)."""
        y, state = self.lru.step(state, x)
        return self.feed_forward(y), state


def ring_init(n_states: int, r_min: float, r_max: float) -> Tensor:
    """Draws nu_log, theta_log, gamma_log: \\|lam\\| uniform on the ring's area, any phase.

    gamma starts at sqrt(1 - \\|lam\\|^2) and is free from then on. Shape: (3, H).
    """
    u1, u2 = torch.rand(2, n_states)
    nu = -0.5 * torch.log(u1 * (r_max**2 - r_min**2) + r_min**2)
    gamma = torch.sqrt(1 - torch.exp(-2 * nu))
    return torch.stack([nu, 2 * math.pi * u2, gamma]).log()  # (3, H)


def truncated_normal_init(module: nn.Module, std: float = 0.02) -> None:
    """Draws every parameter from N(0, std^2) cut at two std, save LayerNorm and `params_log`.

    Biases and the pad's embedding are drawn too, as in the official code.
    """
    for name, parameter in module.named_parameters():
        if "layer_norm" not in name and "params_log" not in name:
            nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std)

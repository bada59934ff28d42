"""The recurrent layers and the loss against naive references, values and gradients in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

from recbole_mm.model.layers.losses import full_softmax_loss
from recbole_mm.model.layers.lru import (
    Cells,
    FeedForward,
    LRUBlock,
    LRULayer,
    real_cells,
    recurrence,
    recurrence_doubling,
    recurrence_loop,
    ring_init,
    truncated_normal_init,
)

D, H, L = 6, 10, 9
FORMS = (recurrence_loop, recurrence_doubling)


@pytest.fixture(autouse=True)
def _fp64_and_seed() -> object:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def lengths_of(kind: str) -> Tensor:
    return torch.tensor(
        {"ragged": [3, 9, 1, 1, 6], "equal": [4, 4, 4], "ones": [1, 1], "one row": [9]}[kind]
    )


KINDS = ("ragged", "equal", "ones", "one row")


def block(dropout: float = 0.0) -> LRUBlock:
    made = LRUBlock(LRULayer(D, H, dropout), FeedForward(D, 4 * D, dropout))
    truncated_normal_init(made, std=0.3)
    return made


def complex_weights(layer: LRULayer) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The paper's B, b, C and Re(c), out of the layer's real matrices."""
    w, b, out = layer.in_proj.weight, layer.in_proj.bias, layer.out_proj.weight
    return (
        torch.complex(w[0::2], w[1::2]),  # (H, D)
        torch.complex(b[0::2], b[1::2]),  # (H,)
        torch.complex(out[:, 0::2], -out[:, 1::2]),  # (D, H)
        layer.out_proj.bias,
    )


def naive_layer(layer: LRULayer, x: Tensor) -> Tensor:
    """Equation by equation for one row, in complex arithmetic. (n, D) -> (n, D)."""
    nu, theta, gamma = layer.params_log.exp()
    lam = torch.exp(torch.complex(-nu, theta))
    B, b, C, c = complex_weights(layer)
    h = torch.zeros(H, dtype=torch.complex128)
    rows = []
    for x_t in x:
        h = lam * h + gamma * (B @ x_t.to(torch.complex128) + b)
        rows.append((C @ h).real + c + x_t)
    norm = layer.layer_norm
    return F.layer_norm(torch.stack(rows), (D,), norm.weight, norm.bias, norm.eps)


def naive_block(made: LRUBlock, x: Tensor) -> Tensor:
    y = naive_layer(made.lru, x)
    ff = made.feed_forward
    inner = ff.w_1.weight @ y.T + ff.w_1.bias[:, None]
    inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
    out = (ff.w_2.weight @ inner).T + ff.w_2.bias + y
    return F.layer_norm(out, (D,), ff.layer_norm.weight, ff.layer_norm.bias, ff.layer_norm.eps)


def listed(grid: Tensor, cells: Cells) -> Tensor:
    """(B, L, D) -> (N, D)."""
    return grid.flatten(0, 1)[cells.index]


# --- cells ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_cells_are_in_the_order_of_torch_packed_sequences(kind: str) -> None:
    lengths = lengths_of(kind)
    grid = torch.arange(len(lengths) * L).view(len(lengths), L)
    packed = pack_padded_sequence(grid, lengths, batch_first=True, enforce_sorted=False)
    cells = real_cells(lengths, L)
    assert cells.sizes == packed.batch_sizes.tolist()
    assert sum(cells.sizes) == int(lengths.sum())
    # Equal lengths may come in another order: compare step by step, as sets.
    ours, theirs = grid.flatten()[cells.index], packed.data
    for a, b in zip(ours.split(cells.sizes), theirs.split(cells.sizes), strict=True):
        assert sorted(a.tolist()) == sorted(b.tolist())


def test_last_cell_of_every_row() -> None:
    lengths = lengths_of("ragged")
    cells = real_cells(lengths, L)
    assert cells.index[cells.last].tolist() == [b * L + n - 1 for b, n in enumerate(lengths)]


# --- recurrence -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_recurrence_matches_a_naive_loop_with_gradients(form: object, kind: str) -> None:
    lengths = lengths_of(kind)
    grid = torch.randn(len(lengths), L, H, dtype=torch.complex128, requires_grad=True)
    lam = (torch.rand(H, dtype=torch.complex128) * 0.7).requires_grad_()
    weight = torch.randn(len(lengths), L, H, dtype=torch.complex128)
    cells = real_cells(lengths, L)

    ours = form(listed(grid, cells), lam, cells)
    (ours * listed(weight, cells)).sum().abs().backward()
    # Rows of one cell never read lam: no gradient is a gradient of 0.
    d_lam = torch.zeros_like(lam) if lam.grad is None else lam.grad
    got = ours.detach(), grid.grad, d_lam
    grid.grad = lam.grad = None

    total: Tensor | float = 0.0
    states = torch.zeros(len(lengths), L, H, dtype=torch.complex128)
    for row, n in enumerate(lengths.tolist()):
        h: Tensor | float = 0.0
        for t in range(n):
            h = lam * h + grid[row, t]
            states[row, t] = h.detach()
            total = total + (h * weight[row, t]).sum()
    total.abs().backward()
    for a, b in zip(got, (listed(states, cells), grid.grad, lam.grad), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_recurrence_loop_passes_gradcheck() -> None:
    cells = real_cells(torch.tensor([3, 1, 2]), 3)
    u = torch.randn(6, 2, dtype=torch.complex128, requires_grad=True)
    lam = torch.randn(2, dtype=torch.complex128, requires_grad=True)
    assert torch.autograd.gradcheck(lambda u, lam: recurrence_loop(u, lam, cells), (u, lam))


def test_recurrence_leaves_its_input_alone_and_picks_the_loop_on_a_cpu() -> None:
    cells = real_cells(lengths_of("ragged"), L)
    u, lam = torch.randn(20, H, dtype=torch.complex128), torch.rand(H, dtype=torch.complex128)
    before = u.clone()
    assert torch.equal(recurrence(u, lam, cells), recurrence_loop(u, lam, cells))
    assert torch.equal(u, before)


def test_forms_agree_in_fp32_over_a_long_row() -> None:
    cells = real_cells(torch.tensor([1000, 37]), 1000)
    lam = torch.polar(torch.full((H,), 0.999), torch.rand(H) * 6).to(torch.complex64)
    u = torch.randn(1037, H, dtype=torch.complex64)
    exact = recurrence_loop(u.to(torch.complex128), lam.to(torch.complex128), cells)
    for form in FORMS:
        error = (form(u, lam, cells) - exact).abs().max() / exact.abs().max()
        assert error < 1e-5


# --- layers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_block_matches_complex_reference_with_gradients(kind: str) -> None:
    made, lengths = block(), lengths_of(kind)
    grid = torch.randn(len(lengths), L, D, requires_grad=True)
    weight = torch.randn(len(lengths), L, D)
    cells = real_cells(lengths, L)
    leaves = [grid, *made.parameters()]

    ours = made(listed(grid, cells), cells)
    got = torch.autograd.grad((ours * listed(weight, cells)).sum(), leaves)

    naive = [naive_block(made, grid[row, :n]) for row, n in enumerate(lengths.tolist())]
    padded = torch.nn.utils.rnn.pad_sequence(naive, batch_first=True)
    padded = F.pad(padded, (0, 0, 0, L - padded.shape[1]))
    torch.testing.assert_close(ours, listed(padded, cells), rtol=0, atol=1e-10)
    total = sum((y * weight[row, : len(y)]).sum() for row, y in enumerate(naive))
    for a, b in zip(got, torch.autograd.grad(total, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_states_depend_on_no_later_cell_and_no_other_row() -> None:
    made, lengths = block(), lengths_of("ragged")
    grid = torch.randn(len(lengths), L, D)
    cells = real_cells(lengths, L)
    before = made(listed(grid, cells), cells)
    changed = grid.clone()
    changed[1, 4] += 1.0
    after = made(listed(changed, cells), cells)
    row, time = cells.index // L, cells.index % L
    touched = (row == 1) & (time >= 4)
    assert torch.equal(before[~touched], after[~touched])
    assert not torch.isclose(before[touched], after[touched]).all(1).any()


def test_padding_and_company_do_not_matter() -> None:
    made, lengths = block(), lengths_of("ragged")
    grid = torch.randn(len(lengths), L, D)
    cells = real_cells(lengths, L)
    together = made(listed(grid, cells), cells)[cells.last]
    wide = F.pad(grid, (0, 0, 0, 7), value=99.0)
    wider = real_cells(lengths, L + 7)
    assert torch.equal(together, made(listed(wide, wider), wider)[wider.last])
    for row, n in enumerate(lengths.tolist()):
        alone = real_cells(torch.tensor([n]), n)
        torch.testing.assert_close(
            made(grid[row, :n], alone)[-1], together[row], rtol=0, atol=1e-12
        )


def test_steps_give_the_states_of_the_whole_row() -> None:
    made = block()
    grid = torch.randn(3, L, D)
    cells = real_cells(torch.full((3,), L), L)
    whole = made(listed(grid, cells), cells).view(L, 3, D)
    order = (cells.index[:3] // L).tolist()
    state = torch.zeros(3, H, dtype=torch.complex128)
    for t in range(L):
        y, state = made.step(state, grid[:, t])
        torch.testing.assert_close(y[order], whole[t], rtol=0, atol=1e-12)


def test_dropout_acts_where_the_paper_has_it() -> None:
    made, cells = block(dropout=0.5), real_cells(lengths_of("ragged"), L)
    x = torch.randn(20, D)
    assert not torch.equal(made(x, cells), made(x, cells))
    made.eval()
    assert torch.equal(made(x, cells), made(x, cells))
    # All of the recurrence's output dropped: only the residual is left.
    layer = LRULayer(D, H, dropout_prob=1.0)
    torch.testing.assert_close(layer(x, cells), layer.layer_norm(x))


def test_autocast_keeps_the_recurrence_in_full_precision() -> None:
    torch.set_default_dtype(torch.float32)
    made, cells = block(), real_cells(torch.tensor([200]), 200)
    x = torch.randn(200, D)
    exact = made(x, cells)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = made(x, cells)
        state = made.step(torch.zeros(1, H, dtype=torch.complex64), x[:1])[1]
    assert state.dtype == torch.complex64
    assert (rough - exact).abs().max() < 0.1


# --- initialisation -------------------------------------------------------------------------------


def test_ring_init() -> None:
    nu_log, theta_log, gamma_log = ring_init(20_000, 0.8, 0.99)
    radius = torch.exp(-nu_log.exp())
    assert radius.min() >= 0.8
    assert radius.max() <= 0.99
    # Uniform over the area: |lambda|^2 is uniform between its bounds.
    area = ((radius**2 - 0.8**2) / (0.99**2 - 0.8**2)).sort().values
    assert (area - torch.linspace(0, 1, 20_000)).abs().max() < 0.015
    phase = (theta_log.exp() / (2 * torch.pi)).sort().values
    assert (phase - torch.linspace(0, 1, 20_000)).abs().max() < 0.015
    torch.testing.assert_close(gamma_log.exp() ** 2 + radius**2, torch.ones(20_000))


def test_every_other_parameter_is_a_truncated_normal() -> None:
    made = LRUBlock(LRULayer(32, 64), FeedForward(32, 128))
    ring = made.lru.params_log.clone()
    truncated_normal_init(made)
    for name, parameter in made.named_parameters():
        if "layer_norm" in name:
            assert torch.equal(parameter, torch.full_like(parameter, float("weight" in name)))
        elif "params_log" not in name:
            assert 0 < parameter.abs().max() <= 0.04
            assert (parameter != 0).all()
    weights = made.feed_forward.w_1.weight
    # Cutting a normal at two standard deviations leaves 0.88 of it.
    assert 0.85 < weights.std() / 0.02 < 0.91
    assert torch.equal(made.lru.params_log, ring)


# --- loss -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [None, 1, 3, 7, 100])
@pytest.mark.parametrize("with_bias", [True, False])
def test_full_softmax_loss_is_cross_entropy_with_gradients(
    chunk: int | None, with_bias: bool
) -> None:
    hidden = torch.randn(7, D, requires_grad=True)
    table, bias = torch.randn(23, D, requires_grad=True), torch.randn(23, requires_grad=True)
    targets = torch.tensor([1, 22, 5, 5, 9, 1, 13])
    leaves = [hidden, table] + ([bias] if with_bias else [])
    offset = bias if with_bias else None
    ours = full_softmax_loss(hidden, table, offset, targets, chunk)
    naive = F.cross_entropy(F.linear(hidden, table, offset), targets)
    torch.testing.assert_close(ours, naive, rtol=0, atol=1e-12)
    got = torch.autograd.grad(3 * ours, leaves)
    for a, b in zip(got, torch.autograd.grad(3 * naive, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_full_softmax_loss_survives_logits_beyond_the_range_of_exp() -> None:
    hidden = torch.tensor([[1000.0], [-1000.0]], dtype=torch.float32, requires_grad=True)
    table = torch.tensor([[0.0], [1.0], [-1.0]], dtype=torch.float32)
    loss = full_softmax_loss(hidden, table, None, torch.tensor([2, 1]))
    assert loss.item() == 2000.0
    loss.backward()
    assert hidden.grad is not None
    assert hidden.grad.flatten().tolist() == [1.0, -1.0]


def test_full_softmax_loss_without_gradients_or_targets() -> None:
    hidden, table, targets = torch.randn(4, D), torch.randn(9, D), torch.tensor([1, 2, 3, 4])
    with torch.no_grad():
        loss = full_softmax_loss(hidden.requires_grad_(), table, None, targets)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, F.cross_entropy(hidden @ table.T, targets))
    empty = full_softmax_loss(hidden[:0], table, None, targets[:0])
    assert empty.item() == 0.0
    empty.backward()
    assert torch.equal(hidden.grad, torch.zeros(4, D))


def test_full_softmax_loss_is_fp32_under_autocast() -> None:
    torch.set_default_dtype(torch.float32)
    hidden, table = torch.randn(5, D), torch.randn(9, D)
    targets = torch.tensor([1, 2, 3, 4, 5])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = full_softmax_loss(hidden, table, None, targets)
    assert torch.equal(loss, full_softmax_loss(hidden, table, None, targets))

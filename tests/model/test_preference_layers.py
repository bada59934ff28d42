"""Candidate sets, their probabilities and the odds-ratio loss, against exact references."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from itertools import permutations

import pytest
import torch
from torch import Tensor

from recbole_mm.errors import UserError
from recbole_mm.model.layers import preference
from recbole_mm.model.layers.preference import (
    draw_sets,
    log_odds,
    odds_ratio_loss,
    preferred_first,
    set_log_prob,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- sets ---
def test_sets_have_distinct_items_and_never_the_pad() -> None:
    scores = torch.randn(40, 9, generator=generator())
    scores[:, 0] = 50.0
    sets = draw_sets(scores, 8, 2, generator())
    assert sets.shape == (40, 2, 8)
    assert torch.equal(sets.sort(dim=2).values, torch.arange(1, 9).expand(40, 2, 8))


def test_ordered_draws_have_the_probabilities_of_drawing_without_replacement() -> None:
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    scores = torch.cat([torch.tensor([9.0]), p.log() + 3.0]).expand(60_000, 5)
    sets = draw_sets(scores, 2, 2, generator(1)) - 1
    for drawn in sets.unbind(1):
        for a, b in permutations(range(4), 2):
            share = ((drawn[:, 0] == a) & (drawn[:, 1] == b)).double().mean().item()
            assert share == pytest.approx(float(p[a] * p[b] / (1 - p[a])), abs=0.007)


def test_the_two_sets_of_a_row_are_independent() -> None:
    p = torch.tensor([0.0, 0.6, 0.4])
    first, second = draw_sets(p.log().expand(40_000, 3), 1, 2, generator(2))[:, :, 0].unbind(1)
    both = ((first == 1) & (second == 1)).double().mean().item()
    assert both == pytest.approx(0.36, abs=0.01)


def test_items_of_no_probability_are_not_drawn_and_a_seed_gives_the_same_sets() -> None:
    scores = torch.randn(30, 12, generator=generator(3))
    scores[:, 5:] = -torch.inf
    sets = draw_sets(scores, 4, 2, generator(4))
    assert int(sets.max()) == 4
    assert torch.equal(sets, draw_sets(scores, 4, 2, generator(4)))
    assert not torch.equal(sets, draw_sets(scores, 4, 2, generator(5)))


def test_noise_is_drawn_in_parts_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preference, "_NOISE_AT_ONCE", 2 * 7 * 3)
    draw, rows = preference._draw, []
    monkeypatch.setattr(preference, "_draw", lambda s, *more: rows.append(len(s)) or draw(s, *more))
    sets = draw_sets(torch.zeros(10, 7), 3, 2, generator())
    assert rows == [3, 3, 3, 1]
    assert sets.shape == (10, 2, 3)
    assert len({tuple(items) for items in sets.flatten(0, 1).tolist()}) > 15


def test_where_too_few_items_are_free_others_fill_up_but_never_the_pad() -> None:
    scores = torch.randn(50, 6, generator=generator(3))
    scores[:, 3:] = torch.finfo(torch.float32).min
    sets = draw_sets(scores, 4, 2, generator(4))
    assert (sets[:, :, :2].sort(dim=2).values == torch.tensor([1, 2])).all()
    assert (sets[:, :, 2:] >= 3).all()
    assert (sets[:, :, 2] != sets[:, :, 3]).all()


# --- probabilities ---
def exact_log_odds(log_p: list[float], how: str) -> float:
    """In 400 digits."""
    with localcontext() as context:
        context.prec = 400
        p = [Decimal(x).exp() for x in log_p]
        product = math.prod(p, start=Decimal(1))
        total = {
            "mean": sum(p, Decimal(0)) / len(p),
            "geomean": (product.ln() / len(p)).exp(),
            "product": product,
        }[how]
        return float((total / (1 - total)).ln())


@pytest.mark.parametrize("how", ["mean", "geomean", "product"])
@pytest.mark.parametrize("log_p", [
    [-0.7, -0.8], [-1e-9, -25.0], [-3.0] * 25, [-700.0, -690.0, -1.0], [-80.0] * 25,
    [-0.01, -6.0, -90.0],
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_odds_are_exact_at_the_extremes(
    how: str, log_p: list[float], dtype: torch.dtype
) -> None:
    given = torch.tensor(log_p, dtype=dtype)
    mine = log_odds(set_log_prob(given, how)).item()
    digits = 2e-6 if dtype == torch.float32 else 1e-13
    assert mine == pytest.approx(exact_log_odds(given.tolist(), how), rel=digits, abs=digits)


@pytest.mark.parametrize("log_p", [0.0, -1e-9, -1e-4, -0.6931, -0.6932, -40.0, -2000.0])
def test_log_odds_and_their_gradient_are_finite_everywhere(log_p: float) -> None:
    x = torch.tensor(log_p, requires_grad=True)
    y = log_odds(x)
    y.backward()
    assert math.isfinite(y.item())
    assert math.isfinite(x.grad.item())  # type: ignore[union-attr]


def test_the_gradient_of_log_odds_is_one_over_one_minus_p() -> None:
    x = torch.tensor([-5.0, -1.0, -0.69, -0.1, -0.001], dtype=torch.float64, requires_grad=True)
    log_odds(x).sum().backward()
    torch.testing.assert_close(x.grad, 1 / (1 - x.detach().exp()), rtol=1e-12, atol=0)


def test_a_set_of_the_mean_is_never_more_likely_than_one_in_k() -> None:
    log_p = torch.randn(50, 30, generator=generator(6)).mul(20).log_softmax(1)
    chosen = log_p.topk(25, dim=1).values
    assert set_log_prob(chosen, "mean").exp().max().item() <= 1 / 25 + 1e-7


def test_an_unknown_set_prob_is_told() -> None:
    with pytest.raises(UserError, match=r"set_prob is 'median': use mean, geomean, product"):
        set_log_prob(torch.zeros(2, 3), "median")


# --- the loss ---
@pytest.mark.parametrize("how", ["mean", "geomean", "product"])
def test_the_loss_and_its_gradient_are_those_of_the_equations(how: str) -> None:
    logits = torch.randn(6, 20, generator=generator(7), dtype=torch.float64, requires_grad=True)
    sets = draw_sets(logits.detach(), 3, 2, generator(8))

    def naive(logits: Tensor) -> Tensor:
        total = logits.new_zeros(())
        for row in range(6):
            p = logits[row].exp() / logits[row].exp().sum()
            odds = []
            for items in sets[row]:
                likelihood = {
                    "mean": p[items].mean(),
                    "geomean": p[items].prod() ** (1 / 3),
                    "product": p[items].prod(),
                }[how]
                odds.append(likelihood / (1 - likelihood))
            total = total - torch.log(torch.sigmoid(torch.log(odds[0] / odds[1])))
        return total / 6

    log_p = logits.log_softmax(1)
    mine = odds_ratio_loss(log_p.gather(1, sets[:, 0]), log_p.gather(1, sets[:, 1]), how)
    (mine_grad,) = torch.autograd.grad(mine, logits, retain_graph=True)
    expected = naive(logits)
    (expected_grad,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(mine, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(mine_grad, expected_grad, rtol=1e-9, atol=1e-15)


def test_the_loss_of_no_pair_is_zero_and_has_a_graph() -> None:
    log_p = torch.zeros(0, 4, requires_grad=True)
    loss = odds_ratio_loss(log_p, log_p, "mean")
    loss.backward()
    assert loss.item() == 0.0


# --- preference ---
def test_the_set_in_which_the_target_ranks_higher_is_preferred() -> None:
    first = torch.tensor([[0.5, 0.2, 0.3], [0.2, 0.5, 0.3], [0.6, 0.3, 0.1], [0.3, 0.3, 0.4]])
    second = torch.tensor([[0.1, 0.7, 0.2], [0.9, 0.05, 0.05], [0.7, 0.2, 0.1], [0.3, 0.3, 0.4]])
    targets = torch.tensor([[0, 0], [0, 0], [0, 0], [0, 1]])
    chosen = preferred_first(torch.stack([first, second], 1).log(), targets)
    # higher; lower; both at the top, less sure; alike in everything
    assert chosen.tolist() == [True, False, False, True]

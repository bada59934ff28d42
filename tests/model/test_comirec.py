"""ComiRec-SA against its equations written out, and as a model among others."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recbole.data.interaction import Interaction
from torch import Tensor

from recbole_mm import quick_start
from recbole_mm.config import MMConfig
from recbole_mm.data.sequences import TARGETS
from recbole_mm.errors import UserError
from recbole_mm.model.comirec import ComiRec, Interests
from recbole_mm.model.layers.sampled_softmax import LogUniform, sampled_softmax_loss
from tests.model.toy import keys, losses_of, toy_data

LENGTHS = [5, 9, 12] * 3


def model_of(
    folder: Path, lengths: list[int] = LENGTHS, scale: float = 30, **more: Any
) -> tuple[ComiRec, Any]:
    """In double precision; embeddings are scaled, so that attention is far from uniform."""
    config, loaders = toy_data(folder, "ComiRec", lengths, **{"hidden_size": 16, **more})
    torch.manual_seed(0)
    model = ComiRec(config, loaders[0].dataset).double()
    for weight in (model.item_embedding.weight, model.interests.position_embedding.weight):
        weight.data *= scale
    return model, loaders


def weights_of(model: ComiRec) -> tuple[Tensor, ...]:
    """Items, positions, W1 and W2 of the equations."""
    inner, outer = model.interests.inner.weight, model.interests.outer.weight
    return model.item_embedding.weight, model.interests.position_embedding.weight, inner.T, outer.T


def naive_interests(weights: tuple[Tensor, ...], items: list[int]) -> list[Tensor]:
    """V = A H with A = softmax(W2^T tanh(W1 (h + p))), one interest and one item at a time."""
    table, positions, w1, w2 = weights
    interests = []
    for k in range(w2.shape[1]):
        powers = []
        for t, item in enumerate(items):
            hidden = [torch.tanh((table[item] + positions[t]) @ w1[:, j]) for j in range(len(w2))]
            powers.append(torch.exp(sum(w2[j, k] * hidden[j] for j in range(len(w2)))))
        total = sum(powers)
        interests.append(sum(p / total * table[i] for p, i in zip(powers, items, strict=True)))
    return interests


def naive_loss(weights: tuple[Tensor, ...], items: list[int], target: int) -> Tensor:
    """The nearest interest's cross entropy over all items; the pad is none."""
    table = weights[0]
    interests = naive_interests(weights, items)
    likeness = [(u @ table[target]).item() for u in interests]
    user = interests[likeness.index(max(likeness))]
    total = sum(torch.exp(user @ table[i]) for i in range(1, len(table)))
    return torch.log(total) - user @ table[target]


def histories(batch: Interaction) -> list[list[int]]:
    rows = zip(batch["item_id_list"].tolist(), batch["item_length"].tolist(), strict=True)
    return [items[:n] for items, n in rows]


# --- the paper's equations ---
@pytest.mark.parametrize("n_interests", [1, 3])
def test_loss_and_gradients_are_those_of_the_equations(in_folder: Path, n_interests: int) -> None:
    model, (train, _, _) = model_of(in_folder, n_interests=n_interests, inner_size=6)
    batch = next(iter(train))[:9]
    found = model.calculate_loss(batch)
    pairs = zip(histories(batch), batch["item_id"].tolist(), strict=True)
    losses = [naive_loss(weights_of(model), items, target) for items, target in pairs]
    expected = sum(losses) / len(losses)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    mine, naive = (torch.autograd.grad(x, list(model.parameters())) for x in (found, expected))
    for a, b in zip(mine, naive, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        assert a.abs().max() > 1e-4


@torch.no_grad()
def test_scores_are_the_best_of_all_interests(in_folder: Path) -> None:
    model, (_, _, test) = model_of(in_folder, n_interests=3, inner_size=6)
    batch = next(iter(test))[0]
    scores = model.full_sort_predict(batch)
    table = model.item_embedding.weight
    best = set()
    for row, items in enumerate(histories(batch)):
        interests = naive_interests(weights_of(model), items)
        for item in range(1, len(table)):
            every = [float(u @ table[item]) for u in interests]
            assert float(scores[row, item]) == pytest.approx(max(every), rel=1e-10)
            best.add(every.index(max(every)))
    assert best == {0, 1, 2}
    for item in range(1, len(table)):
        one = Interaction({**batch.interaction, "item_id": torch.full((len(batch),), item)})
        torch.testing.assert_close(model.predict(one), scores[:, item])


@torch.no_grad()
def test_one_vector_a_user(in_folder: Path) -> None:
    """With one interest its products are the scores; with several it is their mean."""
    model, (train, _, _) = model_of(in_folder, n_interests=1)
    batch = next(iter(train))
    items, lengths = batch["item_id_list"], batch["item_length"]
    user = model(items, lengths)
    assert user.shape == (len(batch), 16)
    scores = user @ model.item_embedding.weight.T
    torch.testing.assert_close(scores, model.full_sort_predict(batch))
    several, _ = model_of(in_folder, n_interests=3)
    vectors = several.user_vectors(items, lengths)
    assert vectors.shape == (len(batch), 3, 16)
    torch.testing.assert_close(several(items, lengths), vectors.mean(1))


# --- rows ---
@torch.no_grad()
def test_padding_and_other_rows_change_nothing(in_folder: Path) -> None:
    model, (train, _, _) = model_of(in_folder)
    batch = next(iter(train))
    items, lengths = batch["item_id_list"], batch["item_length"]
    together = model.user_vectors(items, lengths)
    for row, n in enumerate(lengths.tolist()):
        alone = model.user_vectors(items[row : row + 1, :n], lengths[row : row + 1])
        torch.testing.assert_close(alone, together[row : row + 1], atol=1e-12, rtol=0)


@torch.no_grad()
def test_a_row_without_items_is_zeros(in_folder: Path) -> None:
    model, _ = model_of(in_folder)
    items = torch.tensor([[0, 0, 0], [4, 5, 0]])
    vectors = model.user_vectors(items, torch.tensor([0, 2]))
    assert (vectors[0] == 0).all()
    assert (vectors[1] != 0).all()


@torch.no_grad()
def test_no_place_knows_what_comes_after_it() -> None:
    torch.manual_seed(0)
    leaf = Interests(6, 8, 10, 2).double()
    x = torch.randn(3, 6, 8, dtype=torch.float64)
    every = leaf.everywhere(x)  # (B, L, K, D)
    for place in range(6):
        changed = x.clone()
        changed[:, place + 1 :] = torch.randn_like(changed[:, place + 1 :])
        torch.testing.assert_close(leaf.everywhere(changed)[:, place], every[:, place])
        filled = (torch.arange(6) <= place).expand(3, -1)
        torch.testing.assert_close(leaf(x, filled), every[:, place])


def test_whole_loss_is_the_mean_of_prefix_losses(in_folder: Path) -> None:
    lengths = [3, 4, 6, 9, 11] * 3  # at most 8 inputs: no window is cut
    sums = []
    for mode in ("whole", "prefix"):
        model, (train, _, _) = model_of(in_folder, lengths, train_mode=mode, train_batch_size=7)
        total, count = 0.0, 0
        for batch in train:
            n = int((batch[TARGETS] > 0).sum()) if TARGETS in batch else len(batch)
            total, count = total + model.calculate_loss(batch) * n, count + n
        (total / count).backward()
        sums.append((total / count, [p.grad for p in model.parameters()], count))
    assert sums[0][2] == sums[1][2]
    torch.testing.assert_close(sums[0][0], sums[1][0], rtol=1e-12, atol=0)
    for a, b in zip(sums[0][1], sums[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


# --- sampled softmax ---
def test_log_uniform_draws_popular_items_as_often_as_it_says() -> None:
    counts = torch.tensor([99, 5, 0, 7, 5, 1])  # ranks: 3, 1, 4, 5, 2
    sampler = LogUniform(counts)
    expected = {item: math.log((r + 2) / (r + 1)) / math.log(6)
                for r, item in enumerate([3, 1, 4, 5, 2])}  # fmt: skip
    assert sum(expected.values()) == pytest.approx(1)
    torch.manual_seed(0)
    drawn, log_expected = sampler(200_000)
    shares = torch.bincount(drawn, minlength=6) / len(drawn)
    assert shares[0] == 0
    for item, share in expected.items():
        assert shares[item].item() == pytest.approx(share, abs=0.005)
        weight = log_expected[drawn == item][0]
        assert weight.item() == pytest.approx(math.log(share * 200_000), abs=1e-5)


def test_sampled_softmax_is_that_of_the_formula_values_and_gradients() -> None:
    torch.manual_seed(0)
    hidden, table = (torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (3, 7))
    targets, drawn = torch.tensor([1, 6, 2]), torch.tensor([2, 2, 5, 1])
    log_expected = torch.randn(4, dtype=torch.float64)
    losses = []
    for row, target in zip(hidden, targets.tolist(), strict=True):
        total = torch.exp(row @ table[target])
        for item, log_count in zip(drawn.tolist(), log_expected, strict=True):
            if item != target:
                total = total + torch.exp(row @ table[item]) / torch.exp(log_count)
        losses.append(torch.log(total) - row @ table[target])
    expected = sum(losses) / 3
    found = sampled_softmax_loss(hidden, table, targets, drawn, log_expected)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    mine, naive = (torch.autograd.grad(x, [hidden, table]) for x in (found, expected))
    torch.testing.assert_close(mine, naive, rtol=1e-10, atol=1e-12)


def test_every_item_once_is_the_full_softmax() -> None:
    torch.manual_seed(0)
    hidden, table = (torch.randn(n, 4, dtype=torch.float64) for n in (3, 7))
    targets, drawn = torch.tensor([1, 6, 2]), torch.arange(1, 7)
    found = sampled_softmax_loss(hidden, table, targets, drawn, torch.zeros(6))
    expected = torch.nn.functional.cross_entropy(hidden @ table[1:].T, targets - 1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_sampled_loss_tends_to_the_full_one(in_folder: Path) -> None:
    full, (train, _, _) = model_of(in_folder)
    batch = next(iter(train))
    expected = full.calculate_loss(batch)
    wanted = list(full.parameters())
    gradients = torch.autograd.grad(expected, wanted)
    sampled, _ = model_of(in_folder, softmax="sampled", n_negatives=500)
    sampled.load_state_dict(full.state_dict())
    found = sampled.calculate_loss(batch)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=0)
    mine = torch.autograd.grad(found, list(sampled.parameters()))
    for a, b in zip(mine, gradients, strict=True):
        assert (a - b).norm() < 0.1 * b.norm()


def test_popularity_is_that_of_training(in_folder: Path) -> None:
    model, (train, _, _) = model_of(in_folder, softmax="sampled")
    counts = torch.zeros(model.n_items, dtype=torch.int64)
    for batch in train:
        counts += torch.bincount(batch["item_id"], minlength=model.n_items)
    ranked = counts[model.sampler.by_rank]
    assert (ranked[:-1] >= ranked[1:]).all()
    assert sorted(model.sampler.by_rank.tolist()) == list(range(1, model.n_items))


# --- a model among others ---
@pytest.mark.parametrize(
    "more", [{}, {"n_interests": 1}, {"train_mode": "whole"}, {"softmax": "sampled"}]
)
def test_it_learns_eight_users(in_folder: Path, more: dict[str, Any]) -> None:
    model, (train, _, _) = model_of(in_folder, [7] * 8, scale=1, **more)
    assert (model.item_embedding.weight[0] == 0).all()
    losses = losses_of(model, train, 0.02, 80)
    # A user is among the items bought, which score high themselves: no fit is perfect.
    assert np.mean(losses[-5:]) < 0.5 * losses[0]
    assert (model.item_embedding.weight[0] == 0).all()


@pytest.mark.parametrize(
    ("keys_", "told"),
    [
        ({"loss_type": "BPR"}, "loss_type is 'BPR': use CE"),
        ({"softmax": "half"}, "softmax is 'half': use full, sampled"),
        ({"n_interests": "0"}, "n_interests is 0: it must be 1 or more"),
        ({"n_negatives": "0"}, "n_negatives is 0: it must be 1 or more"),
        ({"n_interest": "2"}, r"ComiRec has no key 'n_interest' \(did you mean 'n_interests'\?\)"),
    ],
)
def test_mistakes_are_told(keys_: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        MMConfig("ComiRec", "nowhere", (), keys_)
    if told.startswith("n_"):
        with pytest.raises(UserError, match=told):  # also inside another model
            MMConfig("PRIME", "nowhere", (), {"retriever": "ComiRec", "backbone": "tiny", **keys_})


@pytest.mark.parametrize("more", [{}, {"train_mode": "whole", "softmax": "sampled"}])
def test_it_runs_from_the_name_and_loads_again(in_folder: Path, more: dict[str, str]) -> None:
    model_of(in_folder, [7] * 12)
    shop = {"data_path": str(in_folder), "user_inter_num_interval": "[1,inf)", **more}
    first = quick_start.run("ComiRec", "toy", overrides=keys(in_folder, **shop))
    again = quick_start.load(Path(first["run_dir"]))
    assert again["test"] == first["test"]
    assert first["train_mode"] == more.get("train_mode", "prefix")


def test_the_same_seed_gives_the_same_numbers(in_folder: Path) -> None:
    model_of(in_folder, [7] * 12)
    shop = {"data_path": str(in_folder), "user_inter_num_interval": "[1,inf)", "epochs": 3}
    drawn = keys(in_folder, **shop, softmax="sampled", n_negatives=2)
    first, second = (quick_start.run("ComiRec", "toy", overrides=drawn) for _ in range(2))
    assert first["test"] == second["test"]
    assert first["valid"] == second["valid"]

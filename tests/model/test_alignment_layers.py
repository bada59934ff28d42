"""RA-Rec's leaves against its equations, written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from recbole_mm.model.layers.alignment import (
    INIT_STD,
    Alignment,
    Concatenation,
    InputAlignment,
    bpr,
    distillation,
    in_batch_softmax,
    info_nce,
)
from recbole_mm.model.layers.kept_vectors import KeptVectors

N, B, D, H = 3, 4, 5, 6


def trainable(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_papers_sizes_have_the_papers_parameters() -> None:
    """BERT-base, 64-wide ID vectors, one instruction, two towers."""
    assert 2 * trainable(Alignment(12, 64, 768)) == 1_216_512
    # what its table 6 counts is the instructions alone
    assert 2 * Alignment(12, 64, 768).instructions.numel() == 18_432


def test_prefixes_are_instructions_then_the_projected_vector_of_each_layer() -> None:
    module = Alignment(N, D, H, n_instructions=2).double()
    vectors = torch.randn(B, D, dtype=torch.float64)
    found = module(vectors)
    assert found.shape == (N, B, 3, H)
    for layer in range(N):
        for row in range(B):
            p = module.weight[layer] @ vectors[row] + module.bias[layer]
            torch.testing.assert_close(found[layer, row, 2], p)
            torch.testing.assert_close(found[layer, row, :2], module.instructions[layer])


def test_variants_leave_their_part_out() -> None:
    vectors = torch.randn(B, D)
    without_id = Alignment(N, D, H, n_instructions=2, use_id=False)
    assert trainable(without_id) == N * 2 * H
    assert torch.equal(without_id(vectors), without_id(torch.randn(B, D)))
    shared = Alignment(N, D, H, shared=True)
    assert trainable(shared) == H * D + H + N * H
    assert torch.equal(shared.project(vectors)[0], shared.project(vectors)[2])
    alone = Alignment(N, D, H, n_instructions=0)
    assert alone(vectors).shape == (N, B, 1, H)
    with pytest.raises(ValueError, match="needs an ID vector or instructions"):
        Alignment(N, D, H, n_instructions=0, use_id=False)


def test_weights_begin_within_the_papers_range_and_all_are_drawn() -> None:
    torch.manual_seed(0)
    for module in (Alignment(4, 16, 32), InputAlignment(16, 32)):  # enough to tell a deviation
        for parameter in module.parameters():
            assert parameter.abs().max() <= INIT_STD
            assert parameter.std() > INIT_STD / 4


def test_every_parameter_gets_a_gradient() -> None:
    words = torch.randn(9, H)
    modules = (Alignment(N, D, H), Alignment(N, D, H, shared=True), InputAlignment(D, H, 1, words))
    for module in modules:
        module(torch.randn(B, D)).square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


def test_inputs_stand_before_the_words_as_themselves_or_as_words() -> None:
    vectors, words = torch.randn(B, D), torch.randn(9, H)
    plain = InputAlignment(D, H)
    assert plain(vectors).shape == (B, 2, H)
    torch.testing.assert_close(plain(vectors)[:, 1], plain.projector(vectors))
    worded = InputAlignment(D, H, 1, words)
    query = worded.projector(vectors)
    for row in range(B):
        weights = torch.softmax(torch.stack([query[row] @ w / H**0.5 for w in words]), dim=0)
        expected = sum(weight * word for weight, word in zip(weights, words, strict=True))
        torch.testing.assert_close(worded(vectors)[row, 1], expected)
    assert not [name for name in worded.state_dict() if "words" in name]  # they are the model's


def test_bpr_is_equation_13_negated() -> None:
    liked, other = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 3.0])
    expected = -sum(math.log(1 / (1 + math.exp(-d))) for d in (1.5, -4.0)) / 2
    assert bpr(liked, other).item() == pytest.approx(expected)
    assert bpr(torch.tensor([-1e4]), torch.tensor([0.0])).item() == pytest.approx(1e4)


def naive_info_nce(p: torch.Tensor, t: torch.Tensor, ids: list[int], tau: float) -> torch.Tensor:
    total = torch.zeros((), dtype=p.dtype)
    for layer in range(len(p)):
        for k in range(len(ids)):
            top = torch.exp(F.cosine_similarity(p[layer, k], t[layer, k], dim=0) / tau)
            below = top.clone()
            for j in range(len(ids)):
                if ids[j] != ids[k]:
                    below = below + torch.exp(
                        F.cosine_similarity(p[layer, k], t[layer, j], dim=0) / tau
                    )
            total = total - torch.log(top / below)
    return total / (len(p) * len(ids))


@pytest.mark.parametrize("ids", [[1, 2, 3, 4], [1, 2, 1, 2], [5, 5, 5, 5]])
def test_info_nce_is_the_corrected_equations_14_and_15(ids: list[int]) -> None:
    p = torch.randn(N, B, H, dtype=torch.float64, requires_grad=True)
    t = torch.randn(N, B, H, dtype=torch.float64)
    found = info_nce(p, t, torch.tensor(ids), 0.5)
    (gradient,) = torch.autograd.grad(found, p)
    expected = naive_info_nce(p, t, ids, 0.5)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, p)[0])


def test_in_batch_softmax_leaves_out_what_the_user_took() -> None:
    scores = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    log_share = torch.log(torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64))
    taken = torch.eye(4, dtype=torch.bool)
    taken[0, 2] = taken[3, 1] = True
    expected = torch.zeros((), dtype=torch.float64)
    for row in range(4):
        rivals = [j for j in range(4) if j == row or not taken[row, j]]
        odds = (scores[row, rivals] - log_share[rivals]).exp()
        own = (scores[row, row] - log_share[row]).exp()
        expected = expected - torch.log(own / odds.sum()) / 4
    found = in_batch_softmax(scores, log_share, taken)
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found, scores, retain_graph=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, scores)[0])
    assert gradient[0, 2] == 0


def test_a_teachers_distribution_is_met() -> None:
    generator = torch.Generator().manual_seed(1)
    scores, teacher = (torch.randn(3, 5, generator=generator).double() for _ in range(2))
    scores.requires_grad_(True)
    found, losses = distillation(scores, teacher), []
    for ours, theirs in zip(scores.exp(), teacher.exp(), strict=True):
        losses += [
            -(t / theirs.sum()) * (o / ours.sum()).log() for o, t in zip(ours, theirs, strict=True)
        ]
    expected = sum(losses) / 3
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(loss, scores)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients)
    own = torch.autograd.grad(distillation(scores, scores.detach() + 2.0), scores)[0]
    assert own.abs().max() < 1e-12  # met, whatever is added to a row


def test_in_batch_softmax_finds_probabilities_whatever_the_samples_are_drawn_by() -> None:
    """Samples drawn evenly over popularity teach the same scores as samples drawn as they come."""
    rng = torch.Generator().manual_seed(0)
    likes = torch.tensor([[0.6, 0.2, 0.1, 0.1], [0.1, 0.2, 0.2, 0.5]])  # p(item | user)
    share = likes.mean(dim=0)
    for drawn_by in (torch.ones(4), 1 / share):
        of_pairs = (likes * drawn_by).flatten()
        table = torch.zeros(2, 4, requires_grad=True)
        optimizer = torch.optim.Adam([table], lr=0.05)
        for _ in range(150):
            pairs = torch.multinomial(of_pairs, 512, replacement=True, generator=rng)
            users, items = pairs // 4, pairs % 4
            never = torch.zeros(512, 512, dtype=torch.bool)
            loss = in_batch_softmax(table[users][:, items], share.log()[items], never)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        torch.testing.assert_close(table.softmax(dim=1).detach(), likes, atol=0.06, rtol=0)


def test_concatenation_reads_both() -> None:
    network = Concatenation(3, 5)
    vectors, texts = torch.randn(2, 3), torch.randn(2, 5)
    found = network(vectors, texts)
    assert found.shape == (2, 5)
    assert not torch.allclose(network(vectors + 1, texts), found)
    assert not torch.allclose(network(vectors, texts + 1), found)


def test_no_more_vectors_are_kept_than_the_newest() -> None:
    asked: list[list[int]] = []

    def compute(histories: list[np.ndarray]) -> torch.Tensor:
        asked.append([int(h[0]) for h in histories])
        return torch.tensor([[float(h[0])] for h in histories])

    kept = KeptVectors(most=2)
    for items in ([1, 2, 3], [3, 1], [2, 3], [4, 3]):
        found = kept.of([np.array([item]) for item in items], compute)
        assert found.flatten().tolist() == items
    assert asked == [[1, 2, 3], [1], [2], [4, 3]]  # 1, 2 and 3 were the oldest of three in turn
    assert len(kept._kept) == 4  # two, and those of the last call

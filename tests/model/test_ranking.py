"""Samples, negatives, candidates and final lists of a two-stage ranker, against their words."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_mm.data.sequences import UserSequences
from recbole_mm.errors import UserError
from recbole_mm.model.layers.ranking import (
    ALPHAS,
    NEGATIVE_SOURCES,
    NegativeSampler,
    choose_alpha,
    fuse,
    item_counts,
    lettered,
    lift,
    ndcg,
    prefix_samples,
    rows_moved,
    top_candidates,
)

V = 12


def sequences(lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Items 1, 2, 3 … one behind the other, and where each user begins."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return np.arange(1, offsets[-1] + 1), offsets


def of(items: np.ndarray, offsets: np.ndarray) -> UserSequences:
    return UserSequences(items, 7 + np.arange(len(offsets) - 1), offsets)


def naive_samples(items: np.ndarray, offsets: np.ndarray) -> list[tuple[list[int], int]]:
    """The rule, spelt out: fewer than 5 items are one sample, n items the prefixes of 5 to n."""
    found = []
    for start, end in pairwise(offsets.tolist()):
        user = items[start:end].tolist()
        if len(user) < 2:
            continue
        cuts = [len(user)] if len(user) < 5 else list(range(5, len(user) + 1))
        found += [(user[: cut - 1], user[cut - 1]) for cut in cuts]
    return found


# --- samples --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lengths", [[], [0], [1], [2], [4], [5], [6], [30], [3, 1, 7, 0, 5, 2, 12, 4]]
)
def test_samples_follow_the_rule(lengths: list[int]) -> None:
    items, offsets = sequences(lengths)
    samples = prefix_samples(of(items, offsets))
    expected = naive_samples(items, offsets)
    assert len(samples) == len(expected)
    for row, (history, label) in enumerate(expected):
        assert samples.history(row, 1000).tolist() == history
        assert samples.labels(np.array([row])).tolist() == [label]


@given(st.lists(st.integers(0, 12), max_size=15))
def test_samples_follow_the_rule_for_any_lengths(lengths: list[int]) -> None:
    items, offsets = sequences(lengths)
    samples = prefix_samples(of(items, offsets))
    expected = naive_samples(items, offsets)
    assert len(samples) == len(expected) == sum(max(n - 4, 1) for n in lengths if n >= 2)
    assert [samples.history(row, 1000).tolist() for row in range(len(samples))] == [
        history for history, _ in expected
    ]


def test_a_history_is_the_newest_items_and_never_another_users() -> None:
    items, offsets = sequences([3, 8])
    samples = prefix_samples(of(items, offsets))
    last = len(samples) - 1
    assert samples.labels(np.array([last])).tolist() == [11]
    assert samples.history(last, 3).tolist() == [8, 9, 10]
    assert samples.history(last, 100).tolist() == [4, 5, 6, 7, 8, 9, 10]
    assert samples.history(0, 2).tolist() == [1, 2]
    assert samples.users.tolist() == [7, *[8] * last]


def test_real_beauty_has_82869_samples(shared_data: Path) -> None:
    """What PRIME's own preparation counts, from users' items but their last two."""
    lines = (shared_data / "amazon-beauty" / "sequences.tsv").read_text().splitlines()[1:]
    users = [[int(item) for item in line.split("\t")[2].split()][:-2] for line in lines]
    assert len(users) == 22_363
    offsets = np.concatenate([[0], np.cumsum([len(user) for user in users])])
    samples = prefix_samples(of(np.concatenate([np.array(user) for user in users]), offsets))
    assert len(samples) == 82_869


# --- negatives ------------------------------------------------------------------------------


def retrieve(samples: np.ndarray) -> torch.Tensor:
    """The same scores for every sample: items are better the larger their id, the pad best."""
    scores = torch.arange(V).float().repeat(len(samples), 1)
    scores[:, 0] = 99.0
    return scores


def sampler_of(source: str, n_negatives: int = 5, counts: np.ndarray | None = None):
    counts = np.arange(V) if counts is None else counts
    return NegativeSampler(counts, source, n_negatives, retrieve)


@pytest.mark.parametrize("n_negatives", [1, 5, V - 2])
@pytest.mark.parametrize("source", NEGATIVE_SOURCES)
def test_negatives_are_distinct_and_never_the_label_or_the_pad(
    source: str, n_negatives: int
) -> None:
    labels = np.arange(200) % (V - 1) + 1
    drawn = sampler_of(source, n_negatives).draw(np.arange(200), labels, np.random.default_rng(0))
    assert drawn.shape == (200, n_negatives)
    assert drawn.min() >= 1
    assert drawn.max() < V
    assert (drawn != labels[:, None]).all()
    assert all(len(set(row)) == n_negatives for row in drawn.tolist())


@pytest.mark.parametrize("source", NEGATIVE_SOURCES)
def test_the_same_generator_draws_the_same_and_the_global_one_is_not_asked(source: str) -> None:
    labels = np.arange(1, 9)
    draws = []
    for state in (0, 1):
        np.random.seed(state)
        torch.manual_seed(state)
        rng = np.random.default_rng([2020, 3, 7])
        draws.append(sampler_of(source).draw(np.arange(8), labels, rng))
    assert np.array_equal(*draws)


def test_popularity_draws_in_proportion_to_one_plus_the_training_count() -> None:
    counts = np.array([0, 0, 0, 9, 4, 1, 1, 0, 0, 30, 2, 0])
    labels = np.full(40_000, 9)
    drawn = sampler_of("popularity", 1, counts).draw(labels, labels, np.random.default_rng(0))
    found = np.bincount(drawn[:, 0], minlength=V) / len(labels)
    weights = 1.0 + counts
    weights[[0, 9]] = 0.0  # the pad and the label
    np.testing.assert_allclose(found, weights / weights.sum(), atol=0.01)


def test_uniform_draws_every_item_alike() -> None:
    labels = np.full(40_000, 9)
    drawn = sampler_of("uniform", 1).draw(labels, labels, np.random.default_rng(0))
    found = np.bincount(drawn[:, 0], minlength=V) / len(labels)
    expected = np.full(V, 1 / (V - 2))
    expected[[0, 9]] = 0.0
    np.testing.assert_allclose(found, expected, atol=0.01)


def test_two_draws_are_a_weighted_draw_without_replacement() -> None:
    """The second item's chances are those of the first draw without the first item."""
    counts = np.array([0, 7, 2, 0])
    labels = np.full(60_000, 3)
    drawn = NegativeSampler(counts, "popularity", 2).draw(labels, labels, np.random.default_rng(1))
    first = (drawn[:, 0] == 1).mean()
    assert abs(first - 8 / 11) < 0.01
    assert set(map(tuple, drawn.tolist())) == {(1, 2), (2, 1)}


def test_retriever_negatives_are_its_best_but_the_label() -> None:
    drawn = sampler_of("retriever", 3).draw(
        np.arange(2), np.array([11, 4]), np.random.default_rng(0)
    )
    assert drawn.tolist() == [[10, 9, 8], [11, 10, 9]]


def test_mixed_negatives_are_half_the_retrievers() -> None:
    drawn = sampler_of("mixed", 5).draw(np.arange(300), np.full(300, 11), np.random.default_rng(0))
    assert (drawn[:, :2] == [10, 9]).all()
    others = drawn[:, 2:]
    assert set(others.ravel().tolist()) == set(range(1, 9))


def test_item_counts_are_of_the_given_items_alone() -> None:
    assert item_counts(np.array([3, 1, 3]), 5).tolist() == [0, 1, 0, 2, 0]


def test_mistakes_of_the_user() -> None:
    with pytest.raises(UserError, match="neg_source is 'popular': use popularity, uniform"):
        sampler_of("popular")
    with pytest.raises(UserError, match="lower n_candidates"):
        sampler_of("uniform", V - 1)
    with pytest.raises(ValueError, match="needs a retriever"):
        NegativeSampler(np.ones(V), "mixed", 4).draw(
            np.arange(1), np.array([1]), np.random.default_rng(0)
        )


# --- letters ---------------------------------------------------------------------------------


def test_labels_go_to_every_letter_alike() -> None:
    labels, negatives = np.full(20_000, 7), np.tile([1, 2, 3, 4], (20_000, 1))
    candidates, places = lettered(labels, negatives, np.random.default_rng(0))
    assert (np.take_along_axis(candidates, places[:, None], 1)[:, 0] == 7).all()
    assert (np.sort(candidates, axis=1) == [1, 2, 3, 4, 7]).all()
    np.testing.assert_allclose(np.bincount(places) / len(places), 0.2, atol=0.01)


def test_without_a_generator_every_label_stays_first() -> None:
    candidates, places = lettered(np.array([9, 8]), np.array([[1, 2], [3, 4]]), None)
    assert candidates.tolist() == [[9, 1, 2], [8, 3, 4]]
    assert places.tolist() == [0, 0]


# --- candidates and final lists -------------------------------------------------------------------


def random_scores(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed))


def test_candidates_are_the_retrievers_best_in_its_order_without_the_pad() -> None:
    scores = random_scores(20)
    scores[:, 0] = 99.0
    before = scores.clone()
    found = top_candidates(scores, 5)
    for row, items in zip(scores, found, strict=True):
        assert items.tolist() == sorted(range(1, V), key=lambda item: -row[item])[:5]
    assert torch.equal(scores, before)


def test_items_already_seen_are_no_candidates() -> None:
    scores = random_scores(2)
    seen = torch.tensor([[3, 7, 0, 0], [0, 0, 0, 0]])
    found = top_candidates(scores, V - 3, seen)
    assert set(found[0].tolist()) == set(range(1, V)) - {3, 7}
    assert torch.equal(found[1], top_candidates(scores, V - 3)[1])


def full_list(scores: torch.Tensor) -> list[int]:
    return sorted(range(1, V), key=lambda item: -scores[item])


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(1, V - 1))
def test_lifting_puts_the_rankers_head_on_the_retrievers_tail(seed: int, k: int) -> None:
    """Naively: candidates by the ranker, then the others as they were; as ranks, exactly."""
    scores, ranking = random_scores(4, seed), random_scores(4, seed + 1)[:, :k]
    candidates = top_candidates(scores, k)
    lifted = lift(scores, candidates, ranking)
    for row in range(4):
        head = candidates[row][ranking[row].argsort(descending=True)].tolist()
        tail = [item for item in full_list(scores[row]) if item not in head]
        assert full_list(lifted[row]) == head + tail
        assert torch.equal(lifted[row][tail], scores[row][tail])
        assert len(set(lifted[row, head].tolist())) == k


def test_candidates_that_are_not_the_best_are_lifted_above_them() -> None:
    scores = torch.arange(V).float()[None]
    lifted = lift(scores, torch.tensor([[2, 5]]), torch.tensor([[0.0, 1.0]]))
    assert full_list(lifted[0]) == [5, 2, 11, 10, 9, 8, 7, 6, 4, 3, 1]


def test_equal_ranking_scores_keep_the_retrievers_order() -> None:
    scores = random_scores(1)
    candidates = top_candidates(scores, 6)
    lifted = lift(scores, candidates, torch.zeros(1, 6))
    assert full_list(lifted[0]) == full_list(scores[0])


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e4, 1e5])
def test_lifting_is_exact_whatever_the_scale_of_the_scores(scale: float) -> None:
    scores = random_scores(8) * scale
    candidates, ranking = top_candidates(scores, 6), random_scores(8, 1)[:, :6]
    lifted = lift(scores, candidates, ranking)
    for row in range(8):
        head = candidates[row][ranking[row].argsort(descending=True)].tolist()
        assert full_list(lifted[row])[:6] == head


def test_everything_a_candidate_leaves_no_tail() -> None:
    scores = random_scores(1)
    scores[:, 0] = -torch.inf
    candidates = top_candidates(scores, V - 1)
    ranking = random_scores(1, 1)[:, : V - 1]
    lifted = lift(scores, candidates, ranking)
    order = candidates[0][ranking[0].argsort(descending=True)].tolist()
    assert full_list(lifted[0]) == order
    assert torch.isfinite(lifted[0, 1:]).all()


# --- fusion ------------------------------------------------------------------------------------


def test_alpha_infinity_is_the_retriever_and_alpha_zero_the_ranker() -> None:
    ranking, retrieval = random_scores(5), random_scores(5, 1)
    assert torch.equal(fuse(ranking, retrieval, float("inf")), retrieval)
    assert torch.equal(fuse(ranking, retrieval, 0.0), ranking)
    torch.testing.assert_close(fuse(ranking, retrieval, 0.5), ranking + retrieval / 2)


def test_a_constant_a_row_changes_no_order() -> None:
    """So that log-probabilities and logits of the retriever fuse alike."""
    ranking, retrieval = random_scores(5), random_scores(5, 1)
    one = fuse(ranking, retrieval, 0.3).argsort(dim=1)
    other = fuse(ranking, retrieval.log_softmax(dim=1), 0.3).argsort(dim=1)
    assert torch.equal(one, other)


def test_alpha_is_the_one_with_the_best_ndcg() -> None:
    ranking, retrieval = random_scores(400), random_scores(400, 1)
    target = (ranking + 0.5 * retrieval + 0.3 * random_scores(400, 2)).argmax(dim=1)
    alpha, found = choose_alpha(ranking, retrieval, target)
    for tried, value in found.items():
        assert value == ndcg(fuse(ranking, retrieval, tried), target)
    assert found.keys() == set(ALPHAS)
    assert found[alpha] == max(found.values())
    assert alpha in (0.2, 0.5, 1.0)


def test_a_ranker_of_no_use_gets_no_weight() -> None:
    retrieval = random_scores(300)
    target = retrieval.argmax(dim=1)
    assert choose_alpha(random_scores(300, 1), retrieval, target)[0] == float("inf")
    assert choose_alpha(torch.zeros(300, V), retrieval, target)[0] == float("inf")


def test_a_perfect_ranker_gets_all_the_weight_it_needs() -> None:
    ranking = random_scores(300)
    alpha, found = choose_alpha(ranking * 50, random_scores(300, 1), ranking.argmax(dim=1))
    assert found[0.0] == 1.0
    assert found[alpha] == 1.0
    assert found[float("inf")] < 1.0


def test_nobody_to_choose_on_means_the_retriever() -> None:
    nobody = torch.empty(0, V)
    alpha, _ = choose_alpha(nobody, nobody, torch.empty(0, dtype=torch.int64))
    assert alpha == float("inf")


def test_ndcg_by_hand() -> None:
    ranking = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [1.0, 1.0, 1.0]])
    target = torch.tensor([0, 2, 1])
    expected = (1 + 1 / np.log2(4) + 1 / np.log2(3)) / 3
    assert ndcg(ranking, target) == pytest.approx(expected)
    assert ndcg(ranking, target, k=2) == pytest.approx((1 + 0 + 1 / np.log2(3)) / 3)


def test_a_target_is_moved_by_its_own_list_by_a_tie_or_from_a_history_that_is_passed() -> None:
    scores = torch.tensor([[0.0, 3.0, 2.0, 2.0, 1.0]]).expand(5, 5)
    candidates = torch.tensor([[1, 2]]).expand(5, 2)
    targets = torch.tensor([1, 2, 3, 4, 4])  # first, last, tied with the last, below, below
    assert rows_moved(targets, scores, candidates, None).tolist() == [0, 1, 2]
    seen = torch.tensor([[0], [0], [0], [0], [4]])
    assert rows_moved(targets, scores, candidates, seen).tolist() == [0, 1, 2, 4]

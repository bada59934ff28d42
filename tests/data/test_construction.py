"""RA-Rec's choice of samples: words in common, even cells, exact budgets."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recbole_mm.data.construction import (
    MODES,
    all_samples,
    construct,
    grid,
    related,
    water_filling,
    words,
)
from recbole_mm.data.sequences import UserSequences, group_by_user

TITLES = [None, "Red nail polish 12", "Nail file", "The shampoo", "Shampoo for the hair", "7 x 9"]


def sequences(*users: list[int]) -> UserSequences:
    owners = np.repeat(np.arange(1, len(users) + 1), [len(items) for items in users])
    return group_by_user(owners, np.array([item for items in users for item in items]))


def shop(seed: int = 0, users: int = 300, items: int = 40) -> UserSequences:
    rng = np.random.default_rng(seed)
    lengths = 2 + rng.geometric(0.15, users)
    return sequences(*((items * rng.random(n) ** 2).astype(int).tolist() for n in lengths))


def test_words_say_something() -> None:
    assert words("The Red-nail POLISH, 12 ml x 2 (é)") == {"red", "nail", "polish", "ml"}
    assert words(None) == words("") == frozenset()


def test_every_position_but_the_first_is_a_sample() -> None:
    found = all_samples(sequences([1, 2, 3], [4], [5, 1]))
    assert found.owner.tolist() == [0, 0, 2]
    assert found.place.tolist() == [1, 2, 5]
    assert found.length.tolist() == [1, 2, 1]


def test_related_is_a_word_in_common_with_any_earlier_item_or_the_item_again() -> None:
    shares, repeats = related(sequences([1, 3, 2, 4], [5, 5, 3], [3]), TITLES)
    assert shares.tolist() == [False, False, True, True, False, True, False, False]
    assert repeats.tolist() == [False, False, False, False, False, True, False, False]


def test_related_equals_the_definition() -> None:
    data = shop(1)
    titles = [None, *(f"{'abcdef'[n % 6]}{n % 6} thing{n % 11}" for n in range(1, 40))]
    shares, _ = related(data, titles)
    found = all_samples(data)
    for owner, place, length in zip(found.owner, found.place, found.length, strict=True):
        before = data.items[place - length : place]
        assert data.offsets[owner] == place - length
        union = set().union(*(words(titles[item]) for item in before))
        target = data.items[place]
        assert shares[place] == (bool(union & words(titles[target])) or target in before)


def test_grid_cuts_at_quantiles_and_merges_equal_edges() -> None:
    lengths = np.array([1] * 50 + list(range(2, 52)))
    cells, (by_length, by_popularity) = grid(lengths, np.full(100, 3), (10, 10))
    assert len(set(by_length)) == len(by_length) < 9  # half of the lengths are 1
    assert by_popularity == [3.0]
    assert len(set(cells[:50].tolist())) == 1
    sizes = Counter(cells[50:].tolist())
    assert max(sizes.values()) <= 11


@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=40).filter(any),
    st.integers(0, 500),
    st.integers(0, 5),
)
def test_water_filling_meets_the_budget_as_evenly_as_possible(
    sizes: list[int], budget: int, seed: int
) -> None:
    room = np.array(sizes)
    taken = water_filling(room, budget, np.random.default_rng(seed))
    assert taken.sum() == min(budget, room.sum())
    assert (taken <= room).all()
    assert (taken >= 0).all()
    unfilled = taken[taken < room]
    if len(unfilled):
        assert taken.max() <= unfilled.min() + 1


@pytest.mark.parametrize("mode", MODES)
def test_budgets_are_met_without_repeats_and_by_the_seed_alone(mode: str) -> None:
    data, titles = shop(2), [None, *(f"word{n % 5}" for n in range(1, 40))]
    found, manifest = construct(data, titles, mode, 200, 7)
    again, _ = construct(data, titles, mode, 200, 7)
    other, _ = construct(data, titles, mode, 200, 8)
    every = len(all_samples(data))
    assert len(found) == manifest["samples"] == (every if mode == "all" else 200)
    assert len(set(found.place.tolist())) == len(found)
    assert (np.diff(found.place) > 0).all()
    assert np.array_equal(found.place, again.place)
    assert mode == "all" or not np.array_equal(found.place, other.place)
    assert manifest["positions"] == every


def test_what_was_bought_before_can_be_left_out() -> None:
    data = sequences([1, 3, 1, 2, 2], [4, 5, 4])
    with_them, manifest = construct(data, TITLES, "denoise", 100, 0)
    without, _ = construct(data, TITLES, "denoise", 100, 0, allow_repeats=False)
    assert with_them.place.tolist() == [2, 3, 4, 7]
    assert without.place.tolist() == [3]
    assert manifest["bought_before"] == 3


def test_efficient_takes_related_samples_evenly_over_the_cells() -> None:
    data, titles = shop(3, 2000), [None, *(f"word{n % 5}" for n in range(1, 40))]
    found, manifest = construct(data, titles, "efficient", 1500, 7, (4, 4))
    shares, _ = related(data, titles)
    assert shares[found.place].all()
    kept = all_samples(data)
    kept = kept.take(shares[kept.place])
    assert manifest["with_a_word_in_common"] == len(kept)
    counts = np.bincount(data.items, minlength=40)

    def cells(samples: object) -> Counter[int]:
        edges = [np.array(manifest["edges"][name]) for name in ("length", "popularity")]
        a = np.searchsorted(edges[0], samples.length, side="right")  # type: ignore[attr-defined]
        b = np.searchsorted(edges[1], counts[data.items[samples.place]], side="right")  # type: ignore[attr-defined]
        return Counter((a * 10 + b).tolist())

    sizes, taken = cells(kept), cells(found)
    assert len(sizes) == manifest["cells"]
    unfilled = [taken[cell] for cell in sizes if taken[cell] < sizes[cell]]
    assert max(taken.values()) <= min(unfilled) + 1
    # by chance the same number would be spread far less evenly
    by_chance = cells(construct(data, titles, "denoise", 1500, 7)[0])
    assert min(by_chance.values()) < 0.8 * min(taken.values())


def test_more_than_there_are_takes_them_all() -> None:
    data = shop(4)
    for mode in ("random", "diversity"):
        found, _ = construct(data, ["x"] * 40, mode, 10**9, 0)
        assert len(found) == len(all_samples(data))


def test_nothing_in_common_leaves_nothing() -> None:
    found, manifest = construct(sequences([1, 3], [3, 2]), TITLES, "efficient", 5, 0)
    assert len(found) == manifest["samples"] == 0

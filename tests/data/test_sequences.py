"""Whole-sequence rows: every target once, plans that can be walked again, silent padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_mm.data.sequences import (
    STARTS,
    TARGETS,
    UserSequences,
    WholeFields,
    WholeTrainLoader,
    collate,
    epoch_plan,
    group_by_user,
    whole_windows,
)
from recbole_mm.errors import UserError


def sequences_of(*users: list[int]) -> UserSequences:
    items = np.array([item for user in users for item in user], dtype=np.int64)
    offsets = np.cumsum([0, *map(len, users)])
    return UserSequences(items, np.arange(1, len(users) + 1) * 10, offsets)


# --- UserSequences ---
def test_group_by_user_keeps_the_order_within_a_user() -> None:
    grouped = group_by_user(np.array([7, 2, 7, 2, 7]), np.array([5, 4, 3, 2, 1]))
    assert grouped.users.tolist() == [2, 7]
    assert [grouped[i].tolist() for i in range(len(grouped))] == [[4, 2], [5, 3, 1]]
    assert grouped.lengths().tolist() == [2, 3]
    assert grouped[-1].tolist() == [5, 3, 1]
    with pytest.raises(IndexError):
        grouped[2]


def test_group_by_user_of_nothing() -> None:
    empty = np.array([], dtype=np.int64)
    grouped = group_by_user(empty, empty)
    assert len(grouped) == 0
    assert len(whole_windows(grouped, 5)) == 0


def test_select_takes_users_in_ascending_order() -> None:
    chosen = sequences_of([1, 2], [3], [4, 5, 6]).select(np.array([2, 0]))
    assert chosen.users.tolist() == [10, 30]
    assert [chosen[i].tolist() for i in range(2)] == [[1, 2], [4, 5, 6]]


# --- windows ---
def naive_windows(users: list[list[int]], max_len: int) -> list[tuple[int, list[int], list[int]]]:
    """(user, inputs, targets) of every row, cut from the newest target backwards."""
    rows = []
    for number, user in enumerate(users):
        end, mine = len(user) - 1, []
        while end > 0:
            begin = max(end - max_len, 0)
            mine.append(((number + 1) * 10, user[begin:end], user[begin + 1 : end + 1]))
            end = begin
        rows += mine[::-1]
    return rows


@settings(max_examples=60, deadline=None)
@given(
    users=st.lists(st.lists(st.integers(1, 99), max_size=16), max_size=6),
    max_len=st.integers(1, 7),
)
def test_windows_equal_the_naive_ones(users: list[list[int]], max_len: int) -> None:
    rows = whole_windows(sequences_of(*users), max_len)
    items = rows.sequences.items
    found = [
        (owner, items[a:b].tolist(), items[a + 1 : b + 1].tolist())
        for owner, a, b in zip(rows.owners, rows.begin, rows.end, strict=True)
    ]
    assert found == naive_windows(users, max_len)
    targets = [
        place for a, b in zip(rows.begin, rows.end, strict=True) for place in range(a + 1, b + 1)
    ]
    first = {int(o) for o in rows.sequences.offsets[:-1]}
    assert sorted(targets) == [p for p in range(len(items)) if p not in first]  # each exactly once
    begins = rows.sequences.offsets[np.searchsorted(rows.sequences.users, rows.owners)]
    assert (rows.starts == (rows.begin == begins)).all()


def test_the_newest_window_is_full() -> None:
    rows = whole_windows(sequences_of(list(range(1, 9))), 3)  # 7 targets
    assert rows.lengths().tolist() == [1, 3, 3]
    assert rows.starts.tolist() == [True, False, False]


def test_windows_of_no_length_are_an_error() -> None:
    with pytest.raises(UserError, match="MAX_ITEM_LIST_LENGTH is 0"):
        whole_windows(sequences_of([1, 2]), 0)


# --- plans ---
@pytest.mark.parametrize("bucket", [True, False])
@pytest.mark.parametrize("n", [0, 1, 64, 65, 1000])
def test_a_plan_has_every_row_once(bucket: bool, n: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 50, n)
    plan = epoch_plan(lengths, 8, seed=1, epoch=2, bucket=bucket)
    assert sorted(np.concatenate(plan).tolist() if plan else []) == list(range(n))
    assert len(plan) == -(-n // 8)
    assert all(len(batch) <= 8 for batch in plan)
    assert sum(len(batch) < 8 for batch in plan) <= 1


def test_a_plan_is_a_function_of_seed_and_epoch() -> None:
    lengths = np.random.default_rng(0).integers(1, 50, 500)

    def flat(seed: int, epoch: int) -> list[int]:
        return np.concatenate(epoch_plan(lengths, 16, seed, epoch)).tolist()

    assert flat(1, 2) == flat(1, 2)
    assert flat(1, 2) != flat(1, 3)
    assert flat(1, 2) != flat(2, 2)
    assert flat(1, 2) != flat(2, 1)


def test_buckets_save_padding_and_mix_batches() -> None:
    lengths = np.random.default_rng(0).geometric(0.15, 4000)

    def padded(bucket: bool) -> int:
        return sum(len(b) * lengths[b].max() for b in epoch_plan(lengths, 32, 0, 0, bucket))

    assert padded(True) < 1.15 * lengths.sum() < padded(False) / 2
    plan = epoch_plan(lengths, 32, 0, 0)
    longest = np.array([lengths[b].max() for b in plan])
    assert abs(np.corrcoef(longest, np.arange(len(plan)))[0, 1]) < 0.2  # not from short to long
    mates = [{frozenset(b.tolist()) for b in epoch_plan(lengths, 32, 0, e)} for e in (0, 1)]
    assert len(mates[0] & mates[1]) == 0  # other company in each epoch


def test_a_batch_of_no_rows_is_an_error() -> None:
    with pytest.raises(UserError, match="train_batch_size is 0"):
        epoch_plan(np.ones(3, dtype=np.int64), 0, 0, 0)


# --- batches ---
def test_collate_pads_on_the_right_and_trims() -> None:
    rows = whole_windows(sequences_of([1, 2, 3, 4, 5], [6, 7], [8, 9, 10, 11, 12, 13]), 4)
    batch = collate(rows, np.array([1, 0, 2]), WholeFields("u", "items", "n"))
    assert batch["u"].tolist() == [20, 10, 30]
    assert batch["items"].tolist() == [[6, 0, 0, 0], [1, 2, 3, 4], [8, 0, 0, 0]]
    assert batch[TARGETS].tolist() == [[7, 0, 0, 0], [2, 3, 4, 5], [9, 0, 0, 0]]
    assert batch["n"].tolist() == [1, 4, 1]
    assert batch[STARTS].tolist() == [True, True, True]
    assert collate(rows, np.array([1, 2]))["item_id_list"].shape == (2, 1)
    assert collate(rows, np.array([3]))[STARTS].tolist() == [False]
    assert {batch[f].dtype for f in ("u", "items", "n", TARGETS)} == {torch.int64}


def test_the_last_item_of_all_can_be_a_target() -> None:
    rows = whole_windows(sequences_of([1, 2], [3, 4]), 4)
    assert collate(rows, np.array([1]))[TARGETS].tolist() == [[4]]


class Part:
    """What a loader needs of a dataset's training part."""


def test_loader_walks_other_batches_each_epoch_and_goes_on_from_its_generator() -> None:
    rng = np.random.default_rng(0)
    users = [rng.integers(1, 50, n).tolist() for n in rng.integers(2, 30, 100)]
    rows = whole_windows(sequences_of(*users), 10)

    def walk(loader: WholeTrainLoader) -> list[list[int]]:
        return [batch["item_id_list"].flatten().tolist() for batch in loader]

    loader = WholeTrainLoader(Part(), rows, batch_size=16, seed=3)
    first, state, second = walk(loader), loader.generator.get_state(), walk(loader)
    assert len(first) == len(loader)
    assert first != second
    again = WholeTrainLoader(Part(), rows, batch_size=16, seed=3)
    assert walk(again) == first
    resumed = WholeTrainLoader(Part(), rows, batch_size=16, seed=3)
    resumed.generator.set_state(state)
    assert walk(resumed) == second
    assert loader.dataset is loader._dataset


def test_loader_without_shuffle_keeps_the_order_of_the_rows() -> None:
    rows = whole_windows(sequences_of(*[[1, 2, 3]] * 5), 10)
    loader = WholeTrainLoader(Part(), rows, batch_size=2, seed=0, shuffle=False)
    assert [batch["user_id"].tolist() for batch in loader] == [[10, 20], [30, 40], [50]]

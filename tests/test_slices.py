"""Parts of the test users: by their target, by the length of what they had before it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from recbole_mm.config import MMConfig
from recbole_mm.data.sequences import group_by_user
from recbole_mm.errors import UserError
from recbole_mm.report.slices import by_history, by_popularity


class Part:
    """A test part whose user n has n items in all, the last of them the target."""

    def __init__(self, users: list[int]) -> None:
        ids = np.repeat(users, users)
        self.sequences: Any = group_by_user(ids, np.ones(len(ids), dtype=np.int64))


def test_a_user_counts_by_the_items_before_the_target() -> None:
    found = (torch.tensor([41, 30, 31, 40, 2]), torch.tensor([1, 2, 0, 1, 1]))
    slices = by_history(
        Part([2, 30, 31, 40, 41, 50]), found, ["recall@10", "mrr@10", "auc"], [30, 40]
    )
    assert slices == {
        "history below 30": {"users": 2, "recall@10": 1.0, "mrr@10": 0.75},  # of 1 and 29
        "history 30 to 39": {"users": 2, "recall@10": 0.5, "mrr@10": 0.5},  # of 30 and 39
        "history from 40": {"users": 1, "recall@10": 1.0, "mrr@10": 1.0},
    }


def test_an_empty_part_has_no_metrics() -> None:
    slices = by_history(Part([3]), (torch.tensor([3]), torch.tensor([1])), ["recall@1"], [5])
    assert slices["history from 5"] == {"users": 0}


def test_no_edges_no_places_or_several_targets_give_no_slices() -> None:
    part, one = Part([3, 4]), (torch.tensor([3]), torch.tensor([1]))
    assert by_history(part, one, ["recall@1"], []) == {}
    assert by_history(part, None, ["recall@1"], [5]) == {}
    twice = (torch.tensor([3, 3]), torch.tensor([1, 2]))
    assert by_history(part, twice, ["recall@1"], [5]) == {}
    part.sequences = None  # a ready-made split
    assert by_history(part, one, ["recall@1"], [5]) == {}


class Bought:
    """A part with one target a user, and training in which items were taken so often."""

    def __init__(self, targets: dict[int, int], counts: list[int]) -> None:
        self.uid_field, self.iid_field, self.item_num = "u", "i", len(counts)
        self.inter_feat = {"u": torch.tensor([*targets]), "i": torch.tensor([*targets.values()])}
        items = np.repeat(np.arange(len(counts)), counts)
        self.train_sequences: Any = group_by_user(np.ones_like(items), items)


def test_groups_of_items_are_equal_and_the_first_is_the_rarest() -> None:
    part = Bought({1: 4, 2: 1, 3: 6, 4: 5, 5: 3}, [0, 5, 9, 1, 0, 7, 1])  # ascending: 4 3 6 1 5 2
    found = (torch.tensor([1, 2, 3, 4, 5]), torch.tensor([1, 2, 0, 4, 1]))
    slices = by_popularity(part, part, found, ["recall@10", "mrr@10", "auc"], 3)
    assert slices == {
        "popularity 1": {"users": 2, "recall@10": 1.0, "mrr@10": 1.0},  # of 4 and 3
        "popularity 2": {"users": 2, "recall@10": 0.5, "mrr@10": 0.25},  # of 6 and 1
        "popularity 3": {"users": 1, "recall@10": 1.0, "mrr@10": 0.25},  # of 5
    }


def test_no_groups_no_places_or_several_targets_give_no_groups() -> None:
    part, found = Bought({1: 1}, [0, 3, 2]), (torch.tensor([1]), torch.tensor([1]))
    assert by_popularity(part, part, found, ["recall@1"], 0) == {}
    assert by_popularity(part, part, None, ["recall@1"], 2) == {}
    twice = (torch.tensor([1, 1]), torch.tensor([1, 2]))
    assert by_popularity(part, part, twice, ["recall@1"], 2) == {}
    assert by_popularity(part, part, found, ["recall@1"], 2)["popularity 1"] == {"users": 0}


def test_a_number_of_groups_that_is_none() -> None:
    with pytest.raises(UserError, match="popularity_slices: it must be 0 or more"):
        MMConfig("Pop", "ml-100k", overrides={"popularity_slices": -1})


@pytest.mark.parametrize("edges", ["[40,30]", "[0]", "[30,30]", "[1.5]", "[long]", "[True]"])
def test_edges_that_are_none(edges: str) -> None:
    with pytest.raises(UserError, match="history_slices: expected ascending whole numbers"):
        MMConfig("Pop", "ml-100k", overrides={"history_slices": edges})

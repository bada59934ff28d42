"""Candidate lists: fixed, fair, the same for every model; ranks that ties cannot flatter."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from recbole.evaluator.register import metrics_dict

from recbole_mm.data.candidates import (
    candidate_lists,
    candidate_metrics,
    candidate_ranks,
    candidates_of_part,
    rank_metrics,
)
from recbole_mm.data.dataset import MMDataset, MMSequentialDataset
from recbole_mm.data.sequences import Ints, UserSequences, group_by_user
from recbole_mm.errors import UserError

from .atomic_data import bare_config, random_interactions

N_ITEMS, N_USERS = 60, 40
ITEMS = ["[PAD]", *(f"i{i}" for i in range(N_ITEMS))]
USERS = [f"u{u}" for u in range(N_USERS)]


def taken(seed: int = 0, n: int = 8) -> UserSequences:
    rng = np.random.default_rng(seed)
    users = np.repeat(np.arange(N_USERS), n)
    return group_by_user(users, rng.integers(1, N_ITEMS + 1, len(users)))


def draw(folder: Path, name: str = "cand20", phase: str = "test", seed: int = 1) -> Ints:
    return candidate_lists(folder, name, phase, USERS, ITEMS, taken(), seed, folder / "cache")


def test_lists_hold_distinct_items_that_the_user_never_took(tmp_path: Path) -> None:
    lists, own = draw(tmp_path), taken()
    assert lists.shape == (N_USERS, 20)
    for row, items in enumerate(lists):
        assert len(set(items.tolist())) == 20
        assert not set(items.tolist()) & {0, *own[row].tolist()}
    assert lists.max() <= N_ITEMS


def test_lists_are_uniform(tmp_path: Path) -> None:
    """Over 3,000 users who took item 1 alone, the other 59 are drawn 3,000 * 20 / 59 times each."""
    n = 3000
    own = group_by_user(np.arange(n), np.ones(n, dtype=np.int64))
    users = [f"u{u}" for u in range(n)]
    lists = candidate_lists(tmp_path, "cand20", "test", users, ITEMS, own, 0)
    counts = np.bincount(lists.flatten(), minlength=N_ITEMS + 1)
    assert counts[:2].tolist() == [0, 0]
    expected = n * 20 / 59
    assert np.abs(counts[2:] - expected).max() < 5 * np.sqrt(expected)
    first = np.bincount(lists[:, 0], minlength=N_ITEMS + 1)[2:]  # no place in the list is special
    assert np.abs(first - n / 59).max() < 5 * np.sqrt(n / 59)


def test_lists_depend_on_seed_phase_and_length_alone(tmp_path: Path) -> None:
    lists = draw(tmp_path / "a")
    assert (lists == draw(tmp_path / "b")).all()
    assert (lists != draw(tmp_path / "a", seed=2)).any()
    assert (lists != draw(tmp_path / "a", phase="valid")).any()


def test_lists_are_the_same_items_under_any_numbering(tmp_path: Path) -> None:
    """Another order of users and item ids, as a knowledge-graph dataset has, changes nothing."""
    lists, own = draw(tmp_path), taken()
    rng = np.random.default_rng(5)
    new_id = np.concatenate([[0], 1 + rng.permutation(N_ITEMS)])  # old id -> new id
    items = np.empty(N_ITEMS + 1, dtype=object)
    items[new_id] = ITEMS
    order = rng.permutation(N_USERS)
    renumbered = UserSequences(
        new_id[np.concatenate([own[int(row)] for row in order])],
        np.arange(N_USERS),
        np.arange(N_USERS + 1) * 8,
    )
    users = [USERS[row] for row in order]
    for folder in (tmp_path, tmp_path / "elsewhere"):  # read from the file, and drawn again
        again = candidate_lists(folder, "cand20", "test", users, items.tolist(), renumbered, 1)
        assert (again == new_id[lists[order]]).all()


def test_lists_are_stored_beside_the_dataset_without_pickle(tmp_path: Path) -> None:
    folder = tmp_path / "toy"
    lists = draw(folder)
    stored = list(folder.glob("toy.cand20.test.*.npy"))
    assert len(stored) == 1
    assert not list(folder.glob("*.draft*"))
    array = np.load(stored[0], allow_pickle=False)
    assert array.shape == lists.shape
    about = json.loads(stored[0].with_suffix(".json").read_text())
    assert about["seed"] == 1
    assert {"users_sha256", "items_sha256", "taken_sha256"} < set(about)
    np.save(stored[0], np.zeros_like(array))  # what is stored is what is used
    assert (draw(folder) == draw(folder)[0, 0]).all()


def test_more_interactions_give_new_lists_not_stale_ones(tmp_path: Path) -> None:
    draw(tmp_path)
    other = taken(seed=1)
    lists = candidate_lists(tmp_path, "cand20", "test", USERS, ITEMS, other, 1)
    assert all(not set(row.tolist()) & set(other[i].tolist()) for i, row in enumerate(lists))


def test_a_folder_that_takes_no_files_is_no_obstacle(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    lists = candidate_lists(blocked, "cand20", "test", USERS, ITEMS, taken(), 1, tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 1
    again = candidate_lists(blocked, "cand20", "test", USERS, ITEMS, taken(), 1, tmp_path / "cache")
    assert (again == lists).all()


def test_too_few_items_is_an_error_that_names_the_user(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cand100 needs 100 items .* user 'u0' leaves"):
        draw(tmp_path, "cand100")
    with pytest.raises(UserError, match="eval_candidates is 'cand50'"):
        draw(tmp_path, "cand50")


def test_general_and_sequential_models_rank_the_same_lists(tmp_path: Path) -> None:
    folder = random_interactions(tmp_path / "toy", [6] * 20 + [2, 3, 4], items=60)
    found = []
    for model, cls in (("SASRec", MMSequentialDataset), ("BPR", MMDataset)):
        part = cls(bare_config(model, folder)).build()[2]
        users, lists = candidates_of_part(part, "cand20", "test", seed=4)
        names = part.field2id_token["user_id"][users]
        tokens = np.array(part.item_tokens())[lists]
        found.append(dict(zip(names.tolist(), tokens.tolist(), strict=True)))
        rows = dict(zip(users.tolist(), lists.tolist(), strict=True))
        for user, item in zip(
            part.inter_feat["user_id"].tolist(), part.inter_feat["item_id"].tolist(), strict=True
        ):
            assert item not in rows[user]  # the target itself is no negative
    assert found[0] == found[1]
    assert len(found[0]) == 22
    assert len(list(folder.glob("*.npy"))) == 1


def test_nothing_is_written_into_recboles_package(tmp_path: Path) -> None:
    dataset = MMDataset(bare_config("BPR", None, user_inter_num_interval="[20,25]"))
    before = set(Path(dataset.dataset_path).iterdir())
    candidates_of_part(dataset.build()[2], "cand20", "test", 0, tmp_path)
    assert set(Path(dataset.dataset_path).iterdir()) == before
    assert len(list((tmp_path / "ml-100k").glob("*.npy"))) == 1


def test_ready_made_split_has_no_lists(tmp_path: Path) -> None:
    part = MMSequentialDataset(bare_config("SASRec", random_interactions(tmp_path / "t", [6])))
    with pytest.raises(UserError, match="benchmark_filename"):
        candidates_of_part(part, "cand20", "test", 0)


# --- ranks and metrics ---
def test_ranks_count_ties_half() -> None:
    scores = torch.tensor([[5.0, 1, 2, 3], [1, 5, 6, 7], [2, 2, 2, 2], [2, 3, 2, 1], [1, 1, 0, 0]])
    assert candidate_ranks(scores).tolist() == [1, 4, 2.5, 2.5, 1.5]


def test_infinite_scores_are_ordered() -> None:
    inf = float("inf")
    scores = torch.tensor([[-inf, -inf, 0, -inf], [inf, 0, 1, 2]])
    assert candidate_ranks(scores).tolist() == [3, 1]


def test_nan_scores_are_an_error() -> None:
    scores = torch.zeros(3, 4)
    scores[1, 2] = float("nan")
    with pytest.raises(ValueError, match="1 rows, first in row 1"):
        candidate_ranks(scores)


def test_constant_and_quantised_scores_score_no_better_than_chance() -> None:
    """Counting ties for the target would give hit@5 of 1.0 to a model that says nothing."""
    generator = torch.Generator().manual_seed(0)
    chance = 5 / 21
    for levels in (1, 2, 4, 1000):
        scores = torch.randint(levels, (20_000, 21), generator=generator).float()
        metrics, ranks = candidate_metrics(scores, [5], ["Hit"])
        assert ranks.mean().item() == pytest.approx(11, abs=0.15)
        if levels == 1000:
            assert metrics["hit@5"] == pytest.approx(chance, abs=0.02)
        assert metrics["hit@5"] < chance + 0.03


def test_metrics_equal_recboles_without_ties() -> None:
    rng = np.random.default_rng(0)
    scores = torch.tensor(rng.permuted(np.arange(21.0)[None].repeat(300, 0), axis=1))
    names, topk = ["Recall", "MRR", "NDCG", "Hit", "Precision", "MAP"], [1, 5, 10]
    ours, ranks = candidate_metrics(scores, topk, names)
    order = scores.argsort(dim=1, descending=True)
    hits = (order[:, :10] == 0).numpy()  # column 0 is the target
    one = np.ones(len(hits), dtype=np.int64)
    config = {"topk": topk, "metric_decimal_place": 9}
    expected: dict[str, float] = {}
    for name in names:
        metric = metrics_dict[name.lower()](config)
        expected |= metric.topk_result(name.lower(), metric.metric_info(hits, one)
                                       if name in ("Recall", "NDCG", "MAP")
                                       else metric.metric_info(hits))  # fmt: skip
    assert list(ours) == list(expected)
    assert ours == pytest.approx(expected, abs=1e-8)
    assert (ranks == (order == 0).nonzero()[:, 1] + 1).all()


def test_metrics_of_nobody_and_unknown_metrics() -> None:
    assert rank_metrics(torch.empty(0), [5], ["ndcg"]) == {"ndcg@5": 0.0}
    with pytest.raises(UserError, match="'auc' is not defined"):
        rank_metrics(torch.ones(1), [5], ["AUC"])

"""Splits by users and by time, histories of what is taken most, AUC of candidate lists."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from dataset_tools.__main__ import main as dataset_tools
from recbole_mm import quick_start
from recbole_mm.config import MMConfig
from recbole_mm.data import splits
from recbole_mm.data.candidates import candidate_metrics
from recbole_mm.errors import UserError
from recbole_mm.quick_start import Data, prepare_data
from tests.data.atomic_data import write_atomic

LENGTHS = [3, 9, 5, 7, 4, 8, 6, 2, 1, 9]
QUIET = {"show_progress": False, "state": "ERROR"}


def make_toy(folder: Path) -> None:
    """Users of 40 items, popular ones among them, each at a time of its own."""
    rng, weights = np.random.default_rng(0), 1 / np.arange(1, 41)
    rows: list[list[Any]] = []
    for user, length in enumerate(LENGTHS):
        for item in rng.choice(40, length, replace=False, p=weights / weights.sum()):
            rows.append([f"u{user}", f"i{item}", 0])
    for row, time in zip(rows, rng.permutation(len(rows)), strict=True):
        row[2] = time
    write_atomic(folder / "toy" / "toy.inter", "user_id:token item_id:token timestamp:float", rows)


def split_of(folder: Path, model: str, split: dict[str, Any], **more: Any) -> Data:
    if not (folder / "toy").is_dir():
        make_toy(folder)
    args = {"split": split, "order": "TO", "mode": "full"}
    keys = {"data_path": str(folder), "eval_args": args, "topk": [2], "valid_metric": "NDCG@2"}
    return prepare_data(MMConfig(model, "toy", (), {**keys, **QUIET, **more}))


def raw(folder: Path) -> dict[str, list[tuple[float, str]]]:
    """Every user's items from the file with their times, oldest first."""
    users: dict[str, list[tuple[float, str]]] = {}
    for line in (folder / "toy" / "toy.inter").read_text().splitlines()[1:]:
        user, item, time = line.split("\t")[:3]
        users.setdefault(user, []).append((float(time), item))
    return {user: sorted(rows, key=lambda row: row[0]) for user, rows in users.items()}


def targets(data: Data, phase: str) -> dict[str, str]:
    part = getattr(data, phase)._dataset
    feat = part.inter_feat
    users = part.id2token(part.uid_field, feat[part.uid_field].numpy())
    items = part.id2token(part.iid_field, feat[part.iid_field].numpy())
    assert len({*users}) == len(users), "one target a user"
    return dict(zip(users.tolist(), items.tolist(), strict=True))


def seen(data: Data, phase: str) -> dict[str, set[str]]:
    loader = getattr(data, phase)
    part = loader._dataset
    users = {user: part.token2id(part.uid_field, user) for user in targets(data, phase)}
    return {u: {*part.id2token(part.iid_field, loader.seen[i].indices)} for u, i in users.items()}


@pytest.mark.parametrize("model", ["SASRec", "Pop"])
def test_users_are_split(tmp_path: Path, model: str) -> None:
    data, files = split_of(tmp_path, model, {"US": [6, 2, 2]}), raw(tmp_path)
    asked = {phase: targets(data, phase) for phase in ("valid", "test")}
    for phase, found in asked.items():
        for user, item in found.items():
            assert files[user][-1][1] == item
            assert seen(data, phase)[user] == {item for _, item in files[user][:-1]}
    assert not {*asked["valid"]} & {*asked["test"]}
    part = data.train._dataset
    trained = {*part.id2token(part.uid_field, part.train_sequences.users).tolist()}
    assert not trained & {*asked["valid"], *asked["test"]}
    for row, user in enumerate(part.train_sequences.users):
        items = part.id2token(part.iid_field, part.train_sequences[row]).tolist()
        assert items == [item for _, item in files[part.id2token(part.uid_field, user)]]


@pytest.mark.parametrize("model", ["SASRec", "Pop"])
def test_time_is_split(tmp_path: Path, model: str) -> None:
    data, files = split_of(tmp_path, model, {"GT": [5, 2, 3]}), raw(tmp_path)
    times = sorted(time for rows in files.values() for time, _ in rows)
    cuts = [times[int(share * len(times))] for share in (0.5, 0.7)] + [np.inf]
    part = data.train._dataset
    for row, user in enumerate(part.train_sequences.users):
        own = files[part.id2token(part.uid_field, user)]
        items = part.id2token(part.iid_field, part.train_sequences[row]).tolist()
        assert items == [item for time, item in own if time < cuts[0]]
    for phase, begin, end in (("valid", *cuts[:2]), ("test", *cuts[1:])):
        found = targets(data, phase)
        for user, own in files.items():
            held = [n for n, (time, _) in enumerate(own) if n > 0 and begin <= time < end]
            assert found.get(user) == (own[held[0]][1] if held else None)
            if held:
                assert seen(data, phase)[user] == {item for _, item in own[: held[0]]}


def test_the_same_users_for_every_model_and_seed(tmp_path: Path) -> None:
    found = [
        targets(split_of(tmp_path, model, {"US": [6, 2, 2]}, seed=seed), "test")
        for model, seed in (("SASRec", 1), ("SASRec", 2), ("Pop", 1))
    ]
    assert found[0] == found[1] == found[2]
    tokens = [f"u{n}" for n in range(1000)]
    parts = splits.user_parts(tokens, [0.8, 0.1, 0.1])
    assert np.bincount(parts).tolist() == [800, 100, 100]
    assert (splits.user_parts(tokens[::-1], [0.8, 0.1, 0.1]) == parts[::-1]).all()


def test_what_is_taken_most_stays_in_order() -> None:
    users = np.array([1, 1, 2, 1, 2, 1, 2])
    items = np.array([5, 6, 5, 7, 8, 5, 5])  # 5 four times, the others once
    kept = splits.most_frequent(users, items, 2)
    assert kept.tolist() == [True, False, True, False, False, True, True]
    kept = splits.most_frequent(users, items, 3)  # of equals the earlier
    assert kept.tolist() == [True, True, True, False, True, True, True]


def test_lists_of_the_most_frequent(tmp_path: Path) -> None:
    """Histories and targets are cut; who trains, candidates and the vocabulary are not."""
    more = {"history_source": "official_topfreq", "topfreq_items": 3}
    data = split_of(tmp_path, "SASRec", {"US": [6, 2, 2]}, **more)
    whole = split_of(tmp_path, "SASRec", {"US": [6, 2, 2]})
    files = raw(tmp_path)
    counts: dict[str, int] = {}
    for rows in files.values():
        for _, item in rows:
            counts[item] = counts.get(item, 0) + 1
    lists = {}
    for user, rows in files.items():
        best = sorted(range(len(rows)), key=lambda n, own=rows: (-counts[own[n][1]], n))[:3]
        lists[user] = [rows[n] for n in sorted(best)]
    for phase in ("valid", "test"):
        for user, item in targets(data, phase).items():
            assert lists[user][-1][1] == item
            assert seen(data, phase)[user] == {item for _, item in lists[user][:-1]}
    part, other = data.train._dataset, whole.train._dataset
    assert part.item_tokens() == other.item_tokens()
    assert (part.train_sequences.items == other.train_sequences.items).all()
    assert part.train_lists.lengths().max() == 3
    assert (part.sequences.items == whole.test._dataset.sequences.items).all()
    for row, user in enumerate(part.train_lists.users):
        items = part.id2token(part.iid_field, part.train_lists[row]).tolist()
        assert items == [item for _, item in lists[part.id2token(part.uid_field, user)]]


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"history_source": "best"}, "history_source is 'best': use chrono, official_topfreq"),
        ({"history_source": "official_topfreq", "topfreq_items": 1}, "topfreq_items is 1: it must"),
        (
            {"eval_args": {"split": {"US": [8, 1, 1]}, "order": "RO"}, "model": "Pop"},
            "split US takes each user's interactions in order of time: set order: TO",
        ),
        ({"eval_args": {"split": {"US": [8, 1]}}}, "eval_args: split: expected"),
    ],
)
def test_mistakes(keys: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        MMConfig(keys.pop("model", "SASRec"), "toy", (), keys)


# --- AUC ------------------------------------------------------------------------------------------


def test_auc_is_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 6, (50, 21)).astype(np.float32)  # many ties
    labels = np.zeros_like(scores)
    labels[:, 0] = 1
    found, _ = candidate_metrics(torch.from_numpy(scores), [5], ["AUC", "GAUC", "Recall"])
    assert found["auc"] == pytest.approx(roc_auc_score(labels.ravel(), scores.ravel()))
    own = [roc_auc_score(a, b) for a, b in zip(labels, scores, strict=True)]
    assert found["gauc"] == pytest.approx(np.mean(own))
    assert [*found] == ["recall@5", "auc", "gauc"]


def test_auc_chooses_a_model_on_candidate_lists() -> None:
    keys = {"eval_candidates": "cand20", "metrics": ["AUC", "NDCG"], "valid_metric": "AUC"}
    config = MMConfig("SASRec", "toy", (), keys)
    assert config["metrics"] == ["AUC", "NDCG"]
    assert MMConfig("Pop", "toy", (), {**keys, "metrics": ["AUC"]})["metrics"] == ["AUC"]
    with pytest.raises(UserError):
        MMConfig("SASRec", "toy", (), {"metrics": ["AUC", "NDCG"]})


# --- the paper's data -----------------------------------------------------------------------------

PROTOCOL: dict[str, Any] = {
    "eval_args": {"split": {"US": [8, 1, 1]}, "order": "TO", "mode": "full"},
    "eval_candidates": "cand20",
    "metrics": ["AUC", "Recall", "MRR"],
    "topk": [5],
    "valid_metric": "AUC",
}


@pytest.fixture(scope="module")
def microlens(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("microlens")
    source = shared_data / "microlens-50k"
    if not source.is_dir():
        pytest.skip(f"{source} is not there")
    flags = ["table", "--name", "microlens-50k", "--min_inter", "6,5", "--out", str(folder)]
    flags += ["--sequences", f"{source / 'sequences.tsv'}", "--items", f"{source / 'items.tsv'}"]
    dataset_tools(flags)
    return folder


@pytest.mark.parametrize(
    ("source", "figures"),
    [("official_topfreq", (76.4, 59.7, 35.2)), ("chrono", (69.5, 49.9, 29.0))],
)
def test_popularity_alone_on_microlens(
    microlens: Path,
    source: str,
    figures: tuple[float, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """25,411 users as in the paper, and what a scorer that knows nobody reaches there."""
    monkeypatch.chdir(tmp_path)
    keys = {**PROTOCOL, **QUIET, "data_path": str(microlens), "history_source": source}
    result = quick_start.run("Pop", "microlens-50k", (), keys)
    assert result["test_users"] == 2541
    assert len(result["config"]) > 0
    found = [100 * result["test"][name] for name in ("auc", "recall@5", "mrr@5")]
    assert found == pytest.approx(figures, abs=2)

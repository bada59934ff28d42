"""From a configuration to loaders: the right classes, no pickles, modes that are never silent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recbole.config import Config
from recbole.data.dataloader import TrainDataLoader, UserDataLoader
from recbole.data.dataloader.knowledge_dataloader import KnowledgeBasedDataLoader
from recbole.data.utils import data_preparation as recboles_preparation
from recbole.model.sequential_recommender import SASRec
from recbole.utils import KGDataLoaderState

from recbole_mm.data.dataset import (
    MMDataset,
    MMDIENDataset,
    MMKGSeqDataset,
    MMKnowledgeDataset,
    MMSequentialDataset,
)
from recbole_mm.data.preparation import (
    choose_train_mode,
    create_dataset,
    data_preparation,
    dataset_class,
)
from recbole_mm.data.sequences import TARGETS, WholeTrainLoader
from recbole_mm.errors import UserError

from .atomic_data import LS, bare_config, random_interactions


class Causal(SASRec):
    """A model that can be trained on whole sequences."""

    train_modes = ("whole", "prefix")


def prepared(config: Config, model_class: type = SASRec) -> tuple[Any, Any, Any]:
    return data_preparation(config, create_dataset(config), model_class)


@pytest.mark.parametrize(
    ("model", "cls"),
    [
        ("SASRec", MMSequentialDataset),
        ("DIEN", MMDIENDataset),
        ("KSR", MMKGSeqDataset),
        ("GRU4RecKG", MMKGSeqDataset),
        ("BPR", MMDataset),
        ("FM", MMDataset),
        ("CKE", MMKnowledgeDataset),
        ("EASE", MMDataset),
    ],
)
def test_dataset_class_of_a_model(model: str, cls: type) -> None:
    assert dataset_class(bare_config(model, None)) is cls


@pytest.mark.parametrize("key", ["save_dataset", "dataset_save_path", "dataloaders_save_path"])
def test_pickled_caches_are_refused(tmp_path: Path, key: str) -> None:
    folder = random_interactions(tmp_path / "toy", [6] * 4)
    with pytest.raises(UserError, match=f"{key} would keep a pickle"):
        create_dataset(bare_config("SASRec", folder, **{key: "x"}))


def test_a_pickle_that_lies_there_is_not_loaded(tmp_path: Path) -> None:
    folder = random_interactions(tmp_path / "toy", [6] * 4)
    config = bare_config("SASRec", folder, checkpoint_dir=str(tmp_path))
    for name in ("toy-SequentialDataset", "toy-MMSequentialDataset", "toy-for-SASRec-dataloader"):
        (tmp_path / f"{name}.pth").write_bytes(b"not even a pickle")
    train, _, test = prepared(config)
    assert len(train) > 0
    assert len(test._dataset) == 4


def test_prefix_loaders_equal_recboles(tmp_path: Path) -> None:
    folder = random_interactions(tmp_path / "toy", [6, 7, 8, 9] * 5)
    config = bare_config("SASRec", folder, train_batch_size=16, eval_batch_size=8)
    ours = prepared(config)
    theirs = recboles_preparation(config, create_dataset(config))
    for mine, stock in zip(ours, theirs, strict=True):
        assert type(mine) is type(stock)
        for a, b in zip(mine, stock, strict=True):
            a, b = (x[0] if isinstance(x, tuple) else x for x in (a, b))
            assert all(torch.equal(a[field], b[field]) for field in b.columns)


def test_general_loaders_sample_negatives(tmp_path: Path) -> None:
    folder = random_interactions(tmp_path / "toy", [6] * 10)
    args = {"distribution": "uniform", "sample_num": 1, "alpha": 1.0, "dynamic": False}
    train, _, _ = prepared(bare_config("BPR", folder, train_neg_sample_args=args))
    assert isinstance(train, TrainDataLoader)
    assert "neg_item_id" in next(iter(train))
    config = bare_config("MultiVAE", folder, train_neg_sample_args=None)
    assert isinstance(prepared(config)[0], UserDataLoader)


def test_knowledge_loader() -> None:
    args = {"distribution": "uniform", "sample_num": 1, "alpha": 1.0, "dynamic": False}
    config = bare_config(
        "CKE",
        None,
        train_neg_sample_args=args,
        user_inter_num_interval="[20,25]",
        load_col={
            "inter": ["user_id", "item_id", "timestamp"],
            "kg": ["head_id", "relation_id", "tail_id"],
            "link": ["item_id", "entity_id"],
        },
    )
    train = prepared(config)[0]
    assert isinstance(train, KnowledgeBasedDataLoader)
    train.set_mode(KGDataLoaderState.RSKG)

    def epoch() -> list[list[int]]:
        return [[*b["item_id"].tolist(), *b["tail_id"].tolist()] for b in train]

    epoch()
    state = train.generator.get_state()  # one state stands for both of its loaders
    second = epoch()
    train.generator.set_state(state)
    assert epoch() == second
    assert epoch() != second


# --- data too short ---
@pytest.mark.parametrize("model", ["SASRec", "BPR"])
@pytest.mark.parametrize("mode", ["whole", "prefix"])
def test_a_part_without_rows_is_told_before_training(tmp_path: Path, model: str, mode: str) -> None:
    args = {"distribution": "uniform", "sample_num": 1, "alpha": 1.0, "dynamic": False}
    keys: dict[str, Any] = {"train_mode": mode}
    keys |= {} if model == "SASRec" else {"train_neg_sample_args": args}
    for length in (1, 2, 3):
        folder = random_interactions(tmp_path / f"of_{length}", [length] * 3)
        with pytest.raises(UserError, match=f"of_{length}: no user has the 4 interactions .*lower"):
            prepared(bare_config(model, folder, **keys), Causal)
    folder = random_interactions(tmp_path / "enough", [3, 4])
    if mode == "prefix" or model == "SASRec":
        _, valid, test = prepared(bare_config(model, folder, **keys), Causal)
        assert [len(part._dataset.inter_feat) for part in (valid, test)] == [1, 2]


@pytest.mark.parametrize(
    ("split", "part"),
    [({"LS": "valid_only"}, "test"), ({"RS": [1, 0, 0]}, "validation and test")],
)
def test_a_split_without_a_part_is_told(tmp_path: Path, split: dict[str, Any], part: str) -> None:
    folder = random_interactions(tmp_path / "toy", [6] * 3)
    with pytest.raises(UserError, match=rf"split .* leaves no rows for {part}: set split"):
        prepared(bare_config("SASRec", folder, eval_args={**LS, "split": split}))


# --- whole sequences ---
def whole(folder: Path, **keys: Any) -> Config:
    return bare_config("SASRec", folder, train_mode="whole", **keys)


def test_whole_mode_trains_on_every_prefix_target_once(tmp_path: Path) -> None:
    folder = random_interactions(tmp_path / "toy", [3, 4, 6, 9, 17, 23] * 4)
    train, valid, test = prepared(whole(folder, train_batch_size=5), Causal)
    prefix, valid_too, test_too = prepared(bare_config("SASRec", folder))
    assert isinstance(train, WholeTrainLoader)
    found = np.zeros((train.dataset.user_num, train.dataset.item_num), dtype=int)
    for batch in train:
        real = batch[TARGETS] > 0
        users = batch["user_id"][:, None].expand_as(real)[real]
        np.add.at(found, (users, batch[TARGETS][real]), 1)
        assert (real.sum(1) == batch["item_length"]).all()
        assert real.shape[1] <= 5
    expected = np.zeros_like(found)
    feat = prefix.dataset.inter_feat
    np.add.at(expected, (feat["user_id"], feat["item_id"]), 1)
    assert (found == expected).all()
    for mine, other in ((valid, valid_too), (test, test_too)):
        a, b = mine._dataset.inter_feat, other._dataset.inter_feat
        assert all(torch.equal(a[field], b[field]) for field in b.columns)


def test_whole_rows_of_short_users_are_their_longest_prefix_row(tmp_path: Path) -> None:
    folder = random_interactions(tmp_path / "toy", [4, 5, 6] * 4)  # at most L = 5 inputs
    train, _, _ = prepared(whole(folder, shuffle=False, train_batch_size=99), Causal)
    batch = next(iter(train))
    feat = prepared(bare_config("SASRec", folder))[0].dataset.inter_feat
    for row, user in enumerate(batch["user_id"].tolist()):
        mine = (feat["user_id"] == user).nonzero().flatten()
        last = mine[feat["item_length"][mine].argmax()]
        n = int(feat["item_length"][last])
        assert batch["item_length"][row] == n
        assert torch.equal(batch["item_id_list"][row, :n], feat["item_id_list"][last, :n])
        assert batch[TARGETS][row, n - 1] == feat["item_id"][last]


def test_whole_loader_uses_the_configured_names_and_keys(tmp_path: Path) -> None:
    folder = random_interactions(tmp_path / "toy", [6] * 10)
    keys = {"LIST_SUFFIX": "_seq", "ITEM_LIST_LENGTH_FIELD": "n", "seed": 7}
    train, _, _ = prepared(whole(folder, length_buckets=False, **keys), Causal)
    assert {"item_id_seq", "n", "user_id"} < set(next(iter(train)).columns)
    assert (train.bucket, train.seed, train.shuffle) == (False, 7, True)
    assert prepared(whole(folder), Causal)[0].bucket is True


def test_train_mode_is_never_switched_silently(tmp_path: Path) -> None:
    folder = random_interactions(tmp_path / "toy", [6] * 4)
    with pytest.raises(UserError, match="SASRec cannot train with train_mode 'whole'"):
        prepared(whole(folder), SASRec)
    with pytest.raises(UserError, match="Causal cannot train with train_mode 'full': set it to w"):
        choose_train_mode({"train_mode": "full"}, Causal)
    assert choose_train_mode({"train_mode": None}, Causal) == "whole"
    assert choose_train_mode({"train_mode": None}, SASRec) == "prefix"
    args = {"distribution": "uniform", "sample_num": 1}
    config = whole(folder, loss_type="BPR", train_neg_sample_args=args)
    with pytest.raises(UserError, match="sampled negatives"):
        prepared(config, Causal)


@pytest.mark.parametrize("model", ["SASRec", "BPR"])
def test_eval_users_are_the_same_for_every_seed(tmp_path: Path, model: str) -> None:
    """They are a sample of those who are tested otherwise, with the rows that they have there."""
    folder = random_interactions(tmp_path / "toy", [6, 7, 8, 9] * 10)
    args = {"distribution": "uniform", "sample_num": 1, "alpha": 1.0, "dynamic": False}

    def rows(size: int | None, seed: int) -> list[set[tuple[int, int]]]:
        sampling = args if model == "BPR" else None
        keys = {"eval_users": size, "seed": seed, "train_neg_sample_args": sampling}
        config = bare_config(model, folder, **keys)
        tables = [loader._dataset.inter_feat for loader in prepared(config)]
        return [set(zip(t["user_id"].tolist(), t["item_id"].tolist(), strict=True)) for t in tables]

    everyone, some = rows(None, 1), rows(7, 1)
    assert rows(7, 2) == some
    assert some[0] == everyone[0]  # training is left alone
    users = {user for user, _ in some[2]}
    assert len(users) == 7
    for part, whole in zip(some[1:], everyone[1:], strict=True):
        assert part == {row for row in whole if row[0] in users}


def test_no_eval_users_is_an_error(tmp_path: Path) -> None:
    folder = random_interactions(tmp_path / "toy", [6] * 10)
    with pytest.raises(UserError, match="eval_users is 0"):
        prepared(bare_config("SASRec", folder, eval_users=0))

"""Item features of the zoo's models: this dataset's columns, in every legal form of load_col."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from recbole_mm import quick_start
from recbole_mm.config import MMConfig
from recbole_mm.data.item_features import choose_item_features
from recbole_mm.data.preparation import create_dataset
from recbole_mm.errors import UserError
from recbole_mm.trainer.run import Run
from tests.data.atomic_data import random_interactions, write_atomic


def feature_config(root: Path, header: str | None, **keys: Any) -> MMConfig:
    """FDSA on a dataset whose `.item` file has the columns of `header`."""
    random_interactions(root / "toy", [6, 9, 7])
    if header:
        rows = [[f"i{i}", f"x{i % 3}", f"y{i % 4}"] for i in range(30)]
        write_atomic(root / "toy" / "toy.item", header, rows)
    config = MMConfig("FDSA", "toy", overrides={"data_path": str(root), **keys})
    choose_item_features(config)
    return config


def test_the_datasets_token_columns_are_taken_and_loaded(tmp_path: Path) -> None:
    config = feature_config(tmp_path, "item_id:token brand:token aisle:token")
    assert config["selected_features"] == ["brand", "aisle"]
    assert config["load_col"]["item"] == ["item_id", "brand", "aisle"]
    assert {"brand", "aisle"} <= set(create_dataset(config).item_feat.columns)


def test_every_column_of_every_file_includes_the_features(tmp_path: Path) -> None:
    """RecBole's `load_col: ~`."""
    config = feature_config(tmp_path, "item_id:token brand:token aisle:token", load_col="None")
    assert config["selected_features"] == ["brand", "aisle"]
    assert config["load_col"] is None
    assert {"brand", "aisle"} <= set(create_dataset(config).item_feat.columns)


def test_a_column_that_the_user_named_is_left_alone(tmp_path: Path) -> None:
    header = "item_id:token brand:token aisle:token"
    config = feature_config(tmp_path, header, selected_features="aisle")
    assert config["selected_features"] == ["aisle"]


def test_a_dataset_without_features_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"FDSA needs item features, and .*toy\.item has no token"):
        feature_config(tmp_path, None)


def test_a_killed_run_of_a_feature_model_is_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the dataset's header decides is part of the configuration from the start."""
    monkeypatch.chdir(tmp_path)
    feature_config(tmp_path, "item_id:token brand:token aisle:token")
    keys = {"data_path": str(tmp_path), "epochs": 1, "show_progress": False, "topk": [5]}
    keys["valid_metric"] = "NDCG@5"
    first = quick_start.run("FDSA", "toy", overrides=keys)
    place = Run.open(Path(first["run_dir"]))
    place.state["status"] = "running"
    place.save()
    again = quick_start.run("FDSA", "toy", overrides=keys, resume=True)
    assert again["run_dir"] == first["run_dir"]
    assert again["test"] == first["test"]

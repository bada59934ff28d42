"""What RARec cannot read or take, told in one sentence; and titles that are too long."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from recbole_mm.config import MMConfig
from recbole_mm.data.demo import Sizes, make_demo
from recbole_mm.errors import UserError
from recbole_mm.model.rarec import RARec
from recbole_mm.quick_start import build_model, prepare_data, run
from tests.backbone import encoders

SMALL = {
    **{"backbone": "tiny", "epochs": 1, "hidden_size": 16, "inner_size": 16, "n_samples": 40},
    **{"topk": [1, 5, 10], "alignment_batch_size": 8, "alignment_max_steps": 1},
    "show_progress": False,
}


def model_of(folder: Path, dataset: str = "mini", **changes: Any) -> RARec:
    config = MMConfig("RARec", dataset, overrides={**SMALL, "data_path": str(folder), **changes})
    model: RARec = build_model(config, prepare_data(config))
    return model


def test_a_dataset_without_texts(mini: Path, in_folder: Path) -> None:
    (in_folder / "bare").mkdir()
    shutil.copy(mini / "mini" / "mini.inter", in_folder / "bare" / "bare.inter")
    with pytest.raises(UserError, match=r"reads texts, but there is no .*bare\.text: make"):
        model_of(in_folder, "bare")


def test_a_text_file_without_the_columns_that_are_read(mini: Path, in_folder: Path) -> None:
    with pytest.raises(UserError, match=r"reads plot, but .*mini\.text .* set attributes"):
        model_of(mini, attributes=["plot"])


def test_a_title_beyond_the_budget_is_cut_and_counted(mini: Path, in_folder: Path) -> None:
    whole, short = model_of(mini), model_of(mini, max_item_tokens=2)
    items = range(1, whole.n_items)
    long = {item for item in items if len(whole.texts.item(item)) > 2}
    assert long
    for item in items:
        assert len(short.texts.item(item)) <= 2
        assert short.texts.item(item).tolist() == whole.texts.item(item)[:2].tolist()
    assert short.texts.cut == long
    assert not whole.texts.cut


def test_an_id_run_of_another_dataset(mini: Path, in_folder: Path) -> None:
    make_demo(in_folder / "other", sizes=Sizes(20, (6, 8), aisles=1, shelves=5, staples=1))
    flags = {**SMALL, "topk": [1, 5, 10]}
    there = run("RARec", "other", overrides={**flags, "data_path": ".", "stages": ["id_model"]})
    again = {**flags, "data_path": str(mini), "id_model_from": there["run_dir"]}
    with pytest.raises(UserError, match=r"id_model_from: .* was trained on other, whose items are"):
        run("RARec", "mini", overrides=again)
    assert [*Path("saved").glob("RARec-mini-*/alignment")] == []


def test_a_run_of_another_id_model(mini: Path, in_folder: Path) -> None:
    flags = {**SMALL, "data_path": str(mini)}
    there = run("RARec", "mini", overrides={**flags, "stages": ["id_model"]})
    again = {**flags, "id_model": "GRU4Rec", "id_model_from": there["run_dir"]}
    with pytest.raises(UserError, match=r"id_model_from: the weights in .* are of \w+, not of GRU"):
        run("RARec", "mini", overrides=again)


@pytest.mark.parametrize("make", [encoders.t5, encoders.clip])
def test_a_backbone_of_a_class_that_takes_no_prefix(mini: Path, in_folder: Path, make: Any) -> None:
    folder = make(in_folder / "weights")
    with pytest.raises(UserError, match=r"takes no prefix: (use a BertModel|take a language)"):
        model_of(mini, backbone=str(folder))


def test_a_backbone_that_is_not_there(mini: Path, in_folder: Path) -> None:
    with pytest.raises(UserError, match=r"no backbone 'minilmm' \(did you mean 'minilm'\?\)"):
        model_of(mini, backbone="minilmm")


def test_a_local_folder_of_a_class_that_does(mini: Path, in_folder: Path) -> None:
    folder = encoders.mpnet(in_folder / "weights")
    model = model_of(mini, backbone=str(folder), max_user_tokens=38, max_item_tokens=8, task="t")
    assert model.aligned is not None
    assert model.aligned.language_model.reads.width == 16
    with pytest.raises(UserError, match="reads 38: lower them"):
        model_of(mini, backbone=str(folder), max_user_tokens=39, max_item_tokens=8, task="t")

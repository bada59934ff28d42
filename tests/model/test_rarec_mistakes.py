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


def test_keys_that_cannot_work(mini: Path, in_folder: Path) -> None:
    for changes, says in (
        ({"id_model": "HGN"}, "no products of a user's and an item's vector"),
        ({"id_model": "HGN", "stages": ["id_model"]}, "no products of a user's and an item's"),
        ({"id_model": "ComiRec"}, "or, with n_interests 1, ComiRec"),
        ({"attributes": None}, "attributes: expected a list such as"),
        ({"attributes": []}, "attributes is empty: name what"),
        ({"cache_dir": None}, "cache_dir: expected a text such as"),
        ({"n_buckets": None}, "n_buckets: expected a list such as"),
        ({"task": None}, "task: expected a text such as"),
        ({"n_buckets": [10]}, r"n_buckets: expected two whole numbers above 0, .* got \[10\]"),
        ({"n_buckets": [0, 10]}, r"n_buckets: expected two .* got \[0, 10\]"),
        ({"n_buckets": ["a", 2.5]}, r"n_buckets: expected two .* got \['a', 2.5\]"),
        ({"alignment_weight_decay": -1.0}, "alignment_weight_decay: it must be 0"),
        ({"weight_decay": -1.0}, "weight_decay: it must be 0 or more"),
        ({"backbone": "tiny-qwen2-vl"}, "needs one that reads texts"),
        ({"max_user_tokens": 4000}, "reads 512"),
        ({"max_user_tokens": 3}, "the task alone takes"),
        ({"use_id": False, "n_instructions": 0}, "use_id is False"),
        ({"use_id": False, "inject": "inputs"}, "use_id is False"),
        ({"negatives": "uniform"}, "set negatives: in_batch, or distill: 0"),
        ({"inject": "concatenate", "tune": "both"}, "set tune to alignment"),
    ):
        with pytest.raises(UserError, match=says):
            model_of(mini, **changes)


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


def test_a_run_says_how_many_titles_are_cut(
    mini: Path, in_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flags = {**SMALL, "data_path": str(mini), "max_item_tokens": 2, "state": "WARNING"}
    with caplog.at_level("WARNING"):
        result = run("RARec", "mini", overrides=flags)
    (said,) = [text for text in caplog.messages if "max_item_tokens" in text]
    n_cut = result["stages"]["alignment"]["cut_texts"]
    assert n_cut > 0
    assert said.startswith(f"{n_cut} of ")
    assert said.endswith("items have a text of more than 2 tokens, which is cut: raise "
                         "max_item_tokens to read all.")  # fmt: skip


def test_histories_without_a_related_item(mini: Path, in_folder: Path) -> None:
    """Told before anything is trained."""
    (in_folder / "odd").mkdir()
    shutil.copy(mini / "mini" / "mini.inter", in_folder / "odd" / "odd.inter")
    items = {
        row.split("\t")[1] for row in (mini / "mini" / "mini.inter").read_text().split("\n")[1:-1]
    }
    rows = [
        f"{item}\tword{chr(97 + n // 26)}{chr(97 + n % 26)}" for n, item in enumerate(sorted(items))
    ]
    text = "\n".join(["item_id:token\ttitle:text", *rows, ""])
    (in_folder / "odd" / "odd.text").write_text(text)
    flags = {**SMALL, "data_path": str(in_folder)}
    with pytest.raises(UserError, match=r"data_mode is efficient, but none .* set data_mode to"):
        run("RARec", "odd", overrides=flags)
    assert [*Path("saved").glob("RARec-odd-*/id_model")] == []
    assert run("RARec", "odd", overrides={**flags, "data_mode": "random"})["rows"]


def test_an_id_run_of_another_split(mini: Path, in_folder: Path) -> None:
    """It may have been trained on what this one tests with, whatever decides that."""
    flags = {**SMALL, "data_path": str(mini)}
    there = run("RARec", "mini", overrides={**flags, "stages": ["id_model"]})
    by_user = {"split": {"US": [8, 1, 1]}, "group_by": "user", "order": "TO", "mode": "full"}
    for key, value in (("history_source", "official_topfreq"), ("eval_args", by_user)):
        again = {**flags, "id_model_from": there["run_dir"], key: value}
        with pytest.raises(UserError, match=f"id_model_from: .* another split .*, {key} was"):
            run("RARec", "mini", overrides=again)


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


def test_an_alignment_with_other_id_vectors(mini: Path, in_folder: Path) -> None:
    flags = {**SMALL, "data_path": str(mini)}
    there = run("RARec", "mini", overrides=flags)["run_dir"]
    same = {**flags, "id_model_from": there, "alignment_from": there}
    again = run("RARec", "mini", overrides=same)
    assert again["stages"]["alignment"]["stopped"] == "given"
    for changes in ({"id_model_from": "", "seed": 7}, {"id_scale": 3.0}):
        with pytest.raises(UserError, match=r"alignment_from: .* an ID model of other weights or"):
            run("RARec", "mini", overrides={**same, **changes})
    text_alone = {**flags, "use_id": False, "n_instructions": 2, "distill": 0}
    there = run("RARec", "mini", overrides=text_alone)["run_dir"]
    run("RARec", "mini", overrides={**text_alone, "seed": 7, "alignment_from": there})


def test_an_alignment_with_another_frozen_language_model(
    mini: Path, in_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A seed draws a tiny one's weights; told before the ID model is trained."""
    flags = {**SMALL, "data_path": str(mini), "tune": "alignment", "use_id": False}
    flags |= {"n_instructions": 2, "distill": 0}
    there = run("RARec", "mini", overrides=flags)["run_dir"]
    for changes, says in (
        ({"seed": 7}, "of another language model"),
        ({"n_instructions": 3}, "do not fit"),
    ):
        caplog.clear()
        with pytest.raises(UserError, match=f"alignment_from: .* {says}"):
            run("RARec", "mini", overrides={**flags, "alignment_from": there, **changes})
        assert "id_model epoch" not in caplog.text


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

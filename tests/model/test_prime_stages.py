"""Which of PRIME's stages a run trains, takes from elsewhere or must have, and what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recbole_mm import quick_start
from recbole_mm.config import MMConfig
from recbole_mm.errors import UserError
from recbole_mm.report.places import read_places, values
from recbole_mm.trainer.run import Run
from tests.model.prime_world import SMALL


def run(mini: Path, resume: bool = False, several: bool = False, **changes: Any) -> dict[str, Any]:
    keys = {**SMALL, "data_path": str(mini), "cache_dir": str(mini), **changes}
    return quick_start.run("PRIME", "mini", (), keys, resume, several)


@pytest.fixture
def retrieved(mini: Path, in_folder: Path) -> dict[str, Any]:
    """A finished run of the retriever alone."""
    return run(mini, stages=["retriever"])


def killed_in(folder: Path, stage: str) -> None:
    """Leaves the run as a kill in this stage does."""
    place = Run.open(folder)
    place.state["status"] = "running"
    place.state["stages"][stage]["done"] = False
    place.save()


def test_a_later_stage_is_not_trained_on_half_a_retriever(
    retrieved: dict[str, Any], mini: Path
) -> None:
    killed_in(Path(retrieved["run_dir"]), "retriever")
    with pytest.raises(UserError, match="has not finished retriever, which the stages asked for"):
        quick_start.go_on(retrieved["run_dir"], {"stages": ["ranker"]})


def test_of_several_models_a_finished_one_has_the_stages_asked_for(
    retrieved: dict[str, Any], mini: Path
) -> None:
    same = run(mini, resume=True, several=True, stages=["retriever"])
    assert same == json.loads((Path(retrieved["run_dir"]) / "result.json").read_text())
    more = run(mini, resume=True, several=True, stages=["retriever", "ranker"])
    assert more["run_dir"] == retrieved["run_dir"]
    assert list(more["stages"]) == ["retriever", "ranker"]
    assert more["stages"]["retriever"]["test"] == retrieved["test"]


def test_weights_of_another_run_stand_in_for_a_stage_that_is_not_asked_for(
    retrieved: dict[str, Any], mini: Path
) -> None:
    result = run(mini, stages=["ranker"], retriever_from=retrieved["run_dir"])
    assert result["run_dir"] != retrieved["run_dir"]
    assert result["stages"]["retriever"]["stopped"] == "given"
    assert result["stages"]["retriever"]["test"] == retrieved["test"]


def test_the_records_of_stages_are_their_own(mini: Path, in_folder: Path) -> None:
    """A run killed in its ranker, then asked for the retriever alone."""
    both = run(mini, stages=["retriever", "ranker"])
    killed_in(Path(both["run_dir"]), "ranker")
    alone = quick_start.go_on(both["run_dir"], {"stages": ["retriever"]})
    for name in ("retriever", "ranker"):
        assert alone["stages"][name]["test"] == both["stages"][name]["test"]
    assert both["stages"]["ranker"]["test"] != both["stages"]["retriever"]["test"]


def test_the_places_of_targets_are_those_of_every_row(mini: Path, in_folder: Path) -> None:
    result = run(mini, stages=["retriever", "ranker"])
    for row in result["rows"]:
        places = np.array([*read_places(f"{result['run_dir']}:{row['name']}").values()])
        assert values(places, "ndcg@10").mean() == pytest.approx(row["test"]["ndcg@10"], abs=1e-6)
    chosen = next(row["name"] for row in result["rows"] if row["chosen"])
    assert read_places(result["run_dir"]) == read_places(f"{result['run_dir']}:{chosen}")


def test_weights_of_an_unfinished_stage_are_refused(retrieved: dict[str, Any], mini: Path) -> None:
    folder = retrieved["run_dir"]
    with pytest.raises(UserError, match=f"ranker_from: {folder} has no finished stage ranker"):
        run(mini, ranker_from=folder)
    killed_in(Path(folder), "retriever")
    with pytest.raises(UserError, match=f"retriever_from: {folder} has no finished stage retr"):
        run(mini, retriever_from=folder)


def test_weights_of_another_split_are_refused(retrieved: dict[str, Any], mini: Path) -> None:
    """They may have seen what this one tests with."""
    split = {"split": {"RS": [0.8, 0.1, 0.1]}, "group_by": "user", "order": "TO", "mode": "full"}
    told = "retriever_from: .* was trained on another split of the data, eval_args was"
    with pytest.raises(UserError, match=told):
        run(mini, retriever_from=retrieved["run_dir"], eval_args=split, stages=["retriever"])


def test_a_ready_made_split_has_no_sequences() -> None:
    keys = {"backbone": "tiny", "retriever": "SASRec", "benchmark_filename": ["a", "b", "c"]}
    with pytest.raises(UserError, match="benchmark_filename: PRIME is trained on each user's seq"):
        MMConfig("PRIME", "nowhere", (), keys)
    alone = MMConfig("PRIME", "nowhere", (), {**keys, "stages": ["retriever"]})
    assert alone["retriever"] == "SASRec"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"neg_source": "best"}, "neg_source is 'best': use popularity, uniform, retriever, mixed"),
        ({"fusion": "both"}, "fusion is 'both': use none, valid"),
        ({"supervise": "all"}, "supervise is 'all': use letter, letter_eos"),
        ({"candidate_order": "any"}, "candidate_order is 'any': use retriever, shuffled"),
        ({"ranker_schedule": "cos"}, "ranker_schedule is 'cos': use constant, linear, cosine"),
        ({"n_candidates": 27}, "n_candidates is 27: it must be between 2 and 26"),
        ({"n_candidates": 1}, "n_candidates is 1: it must be between 2 and 26"),
        ({"max_history_items": 0}, "max_history_items is 0: it must be 1 or more"),
        ({"score_tokens": 0}, "score_tokens is 0: it must be 1 or more"),
    ],
)
def test_values_are_checked_before_anything_is_read(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        MMConfig("PRIME", "nowhere", (), {"backbone": "tiny", **changes})

"""MLLM-MSR killed in each of its stages goes on, and ends with the numbers of one that was not."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.test_resume import kill_when, run

FLAGS = [
    *("--dataset=mm-demo", "--limit_users=25", "--backbone=tiny", "--generate_tokens=200"),
    *("--item_summary_tokens=4", "--user_summary_tokens=4", "--history_len=4", "--topk=[5]"),
    *("--sft_targets=1", "--sft_batch_size=4", "--sft_max_steps=6", "--sft_eval_every=3"),
]


@pytest.fixture(scope="module")
def flags(demo_path: Path) -> list[str]:
    return ["--model=MLLMMSR", f"--data_path={demo_path}", *FLAGS]


def keys(folder: Path) -> list[str]:
    """Of every text that is kept, as often as it was written; at most one was torn by a kill."""
    lines = [line for p in folder.glob("cache/*/*.jsonl") for line in p.read_bytes().split(b"\n")]
    found, torn = [], 0
    for line in filter(None, lines):
        try:
            found.append(json.loads(line)["key"])
        except ValueError:
            torn += 1
    assert torn <= 1
    return found


def preferences(folder: Path) -> list[list[str]]:
    """The histories whose preferences a run has left."""
    (path,) = folder.glob("saved/*/user_summary/texts.jsonl")
    return [json.loads(line)["items"] for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, flags: list[str]
) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder, *flags)


@pytest.mark.parametrize("stage", ["item_summary", "user_summary", "second round", "sft"])
def test_killed_and_resumed_equals_uninterrupted(
    whole: tuple[Path, dict[str, Any]], flags: list[str], stage: str, tmp_path: Path
) -> None:
    folder, expected = whole
    items = expected["stages"]["item_summary"]["descriptions"]
    least = {"item_summary": 10, "user_summary": items + 10}
    # All first rounds come before the first of a second one, and equal ones are written once.
    histories = preferences(folder)
    first = {tuple(history[:3]) for history in histories}
    least["second round"] = items + len(first) + 2
    assert len(keys(folder)) > least["second round"] + 10
    assert any(len(history) > 3 for history in histories)

    def ready(state: dict[str, Any]) -> bool:
        stages = state["stages"]
        if stage == "sft":
            return bool(stages.get("sft", {}).get("steps", 0) >= 4)
        texts = sum(p.read_bytes().count(b"\n") for p in tmp_path.glob("cache/*/*.jsonl"))
        made = "user_summary" if stage == "second round" else stage
        return made not in stages and texts > least[stage]

    kill_when(tmp_path, ready, *flags)
    (state,) = [json.loads(p.read_text()) for p in tmp_path.glob("saved/*/state.json")]
    assert not state["stages"].get(stage.replace("second round", "user_summary"), {}).get("done")
    there = len(keys(tmp_path))
    resumed = run(tmp_path, *flags, "--resume")
    assert len(list(tmp_path.glob("saved/*"))) == 1, "resuming must not start a second run"
    assert 0 < there <= len(keys(tmp_path))
    assert Counter(keys(tmp_path)) == Counter(keys(folder)), "nothing is written twice"
    assert (resumed["test"], resumed["valid"]) == (expected["test"], expected["valid"])
    for made in ("item_summary", "user_summary"):
        (ours,) = tmp_path.glob(f"saved/*/{made}/texts.jsonl")
        (theirs,) = folder.glob(f"saved/*/{made}/texts.jsonl")
        assert {*ours.read_text().splitlines()} == {*theirs.read_text().splitlines()}


def test_a_later_run_takes_the_texts_of_an_earlier_one(
    whole: tuple[Path, dict[str, Any]], flags: list[str], tmp_path: Path
) -> None:
    """From its folder, and evaluates it again; nothing is generated."""
    folder, expected = whole
    given = [f"--{s}_from={folder / expected['run_dir']}" for s in ("item_summary", "user_summary")]
    found = run(tmp_path, *flags, *given, "--cache_dir=mine")
    assert found["test"] == expected["test"]
    assert not list(tmp_path.glob("mine/*/*.jsonl"))
    again = run(folder, f"--load={expected['run_dir']}", "--dataset=mm-demo")
    assert again["test"] == expected["test"]

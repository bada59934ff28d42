"""MLLM-MSR's recipes, each by one command on a few users of the demo."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recbole_mm.cli import main
from recbole_mm.config import read_yaml

PAPER = Path(__file__).resolve().parents[1] / "properties" / "paper"
SMALL = [
    *("--dataset=mm-demo", "--backbone=tiny", "--limit_users=60", "--epochs=1", "--topk=[5]"),
    *("--sft_max_steps=1", "--sft_batch_size=4", "--sft_eval_every=0", "--sft_targets=1"),
    *("--item_summary_tokens=2", "--history_len=3", "--show_progress=False"),
]
MANY = {"mllmmsr_figure5", "mllmmsr_figure6"}  # alike but for a number: two of them will do


@pytest.fixture
def small(demo_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    return [*SMALL, f"--data_path={demo_path}"]


@pytest.mark.parametrize("name", ["mllmmsr_figure4", "mllmmsr_figure5", "mllmmsr_figure6"])
def test_a_recipe_runs_by_one_command(name: str, tmp_path: Path, small: list[str]) -> None:
    variants = read_yaml(PAPER / f"{name}.yaml")["variants"]
    variants = dict([*variants.items()][: 2 if name in MANY else None])
    more = [f"--variants={','.join(variants)}"]
    if name != "mllmmsr_figure6":  # which sets it
        more.append("--user_summary_tokens=2")
    assert main([f"--config_files={name}", *small, *more, "--result_file=r.json"]) == 0
    results = json.loads((tmp_path / "r.json").read_text())
    assert [result["variant"] for result in results] == list(variants)
    for result in results:
        assert result["protocol"] == "cand20"
        assert set(result["test"]) == {"auc", "gauc", "recall@5", "mrr@5", "ndcg@5"}
        none = variants[result["variant"]].get("pref_mode") == "none"
        assert (result["stages"]["user_summary"]["preferences"] == 0) == none


def test_the_baselines_rank_the_same_lists(tmp_path: Path, small: list[str]) -> None:
    """Random, Pop, SASRec and MLLM-MSR on one protocol, by one command."""
    flags = ["--config_files=mllmmsr_table3", *small, "--result_file=r.json"]
    assert main([*flags, "--user_summary_tokens=2", "--topfreq_items=4"]) == 0
    results = json.loads((tmp_path / "r.json").read_text())
    assert [result["model"] for result in results] == ["Random", "Pop", "SASRec", "MLLMMSR"]
    assert {result["protocol"] for result in results} == {"cand20"}
    assert {result["split"] for result in results} == {"US/TO"}
    assert {result["test_users"] for result in results} == {6}
    assert all(0 <= result["test"]["auc"] <= 1 for result in results)


def test_a_retrievers_best_are_reranked(tmp_path: Path, small: list[str]) -> None:
    """Over the whole catalogue; what is not among the best keeps its place."""
    small = [flag for flag in small if not flag.startswith("--topk")]
    flags = ["--model=MLLMMSRRerank", *small, "--user_summary_tokens=2", "--result_file=r.json"]
    assert main(flags) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert [row["name"] for row in result["rows"]] == ["retriever", "sft"]
    before, after = (row["test"] for row in result["rows"])
    assert before["recall@20"] == after["recall@20"]
    assert result["protocol"] == "full"
    assert main(["--model=MLLMMSRRerank", *small, "--eval_candidates=cand20"]) == 1

"""RA-Rec's recipes, each by one command on a few users of the demo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from recbole_mm.cli import main
from recbole_mm.config import MMConfig, read_yaml
from recbole_mm.jobs import plan_jobs, read_recipe

PAPER = Path(__file__).resolve().parents[1] / "properties" / "paper"
SMALL = [
    *("--dataset=mm-demo", "--limit_users=80", "--epochs=1", "--topk=[5,10]"),
    *("--alignment_max_steps=2", "--alignment_batch_size=8", "--alignment_eval_every=0"),
    "--show_progress=False",
]
TINY = "--backbone=tiny"


def results_of(*flags: str) -> list[dict[str, Any]]:
    assert main([*flags, *SMALL, "--result_file=r.json"]) == 0
    found = json.loads(Path("r.json").read_text())
    return found if isinstance(found, list) else [found]


def variants_of(name: str) -> dict[str, Any]:
    return dict(read_yaml(PAPER / f"{name}.yaml")["variants"])


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", ["rarec_table4", "rarec_table5", "rarec_table6"])
def test_a_recipe_runs_by_one_command(name: str) -> None:
    first, *others = results = results_of(f"--config_files={name}", TINY)
    assert [result["variant"] for result in results] == list(variants_of(name))
    for result in others:  # one ID model for all
        assert result["rows"][0]["test"] == first["rows"][0]["test"]
        assert result["stages"]["id_model"]["stopped"] == "given"


def test_table_2_has_a_row_for_each_model() -> None:
    results = results_of("--config_files=rarec_table2", TINY)
    models = read_yaml(PAPER / "rarec_table2.yaml")["model"].split(",")
    assert [result["model"] for result in results] == models
    assert len({(r["test_users"], r["protocol"], r["split"]) for r in results}) == 1
    by_name = {result["model"]: result for result in results}
    assert by_name["RARec"]["config"]["id_model"] == "ComiRec"
    assert by_name["RARec"]["config"]["n_interests"] == by_name["ComiRec"]["config"]["n_interests"]
    assert by_name["SASRec"]["train_mode"] == "whole"


def test_table_3_aligns_each_id_model(capsys: pytest.CaptureFixture[str]) -> None:
    results = results_of("--config_files=rarec_table3", TINY)
    assert [result["variant"] for result in results] == list(variants_of("rarec_table3"))
    assert [result["config"]["id_model"] for result in results] == [r["variant"] for r in results]
    said = capsys.readouterr().out
    for name in variants_of("rarec_table3"):
        assert f"{name}:alignment less {name}:id_model" in said


def test_figure_3_runs_without_a_network() -> None:
    (result,) = results_of("--config_files=rarec_figure3", "--variants=minilm")
    assert result["backbone"] == "minilm"
    count = result["stages"]["alignment"]["trainable_parameters"]
    assert count == 2 * 6 * (384 * 64 + 384 + 384)  # towers, layers, (W, b, c)


def test_figure_3_names_a_backbone_a_row_and_one_id_model() -> None:
    first, *others = plan_jobs(read_recipe(["rarec_figure3"]), {})
    for job in (first, *others):
        config = MMConfig(job.model, job.dataset, ["rarec_figure3"], job.keys)
        assert config["backbone_spec"]["name"] == job.variant
        assert config["backbone_spec"]["family"] == "text"
    assert all(job.others == {"id_model_from": first.variant} for job in others)


def test_figure_4_has_slices_of_long_histories() -> None:
    results = results_of("--config_files=rarec_figure4", TINY, "--history_slices=[10]")
    assert [result["variant"] for result in results] == list(variants_of("rarec_figure4"))
    names = ["history below 10", "history from 10"]
    for result in results:
        for row in result["rows"]:
            parts = [row["slices"][name] for name in names]
            assert sum(part["users"] for part in parts) == result["test_users"]
            total = sum(part["users"] * part.get("recall@10", 0.0) for part in parts)
            expected = row["test"]["recall@10"] * result["test_users"]
            assert total == pytest.approx(expected, abs=1e-2)
        assert min(result["slices"][name]["users"] for name in names) > 0

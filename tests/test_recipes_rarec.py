"""RA-Rec's recipes, each by one command on a few users of the demo."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recbole_mm.cli import main
from recbole_mm.config import read_yaml

PAPER = Path(__file__).resolve().parents[1] / "properties" / "paper"
SMALL = [
    *("--dataset=mm-demo", "--backbone=tiny", "--limit_users=80", "--epochs=1", "--topk=[5,10]"),
    *("--alignment_max_steps=2", "--alignment_batch_size=8", "--alignment_eval_every=0"),
    "--show_progress=False",
]


@pytest.mark.parametrize("name", ["rarec_table4", "rarec_table5", "rarec_table6"])
def test_a_recipe_runs_by_one_command(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([f"--config_files={name}", *SMALL, "--result_file=r.json"]) == 0
    results = json.loads((tmp_path / "r.json").read_text())
    variants = read_yaml(PAPER / f"{name}.yaml")["variants"]
    assert [result["variant"] for result in results] == list(variants)
    first, *others = results
    for result in others:  # one ID model for all
        assert result["rows"][0]["test"] == first["rows"][0]["test"]
        assert result["stages"]["id_model"]["stopped"] == "given"

"""I-LLMRec's recipes, each by one command on a few users of the demo."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from recbole_mm.cli import main
from recbole_mm.config import read_yaml
from recbole_mm.data.demo import make_demo
from recbole_mm.data.features import save_features

PAPER = Path(__file__).resolve().parents[1] / "properties" / "paper"
SMALL = [
    *("--dataset=mm-demo", "--backbone=tiny", "--limit_users=60", "--epochs=1", "--topk=[5,10]"),
    *("--alignment_max_steps=2", "--alignment_batch_size=8", "--alignment_eval_every=0"),
    *("--max_history=2", "--show_progress=False"),
    # the demo has no descriptions: its titles stand in for them
    "--columns={'title': 'title', 'brand': 'brand', 'description': 'title'}",
]
RECIPES = sorted(path.stem for path in PAPER.glob("illmrec_*.yaml"))


def second_encoder(folder: Path) -> None:
    """Features of the demo's pictures by the name of another encoder."""
    make_demo(folder / "mm-demo")
    rows = (folder / "mm-demo" / "mm-demo.item").read_text().splitlines()[1:]
    items = [row.split("\t")[0] for row in rows]
    matrix = np.random.default_rng(0).normal(size=(len(items), 12)).astype(np.float32)
    save_features(folder / "mm-demo", "mm-demo", "clip-image", matrix, items, encoder="random")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_by_one_command(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if name == "illmrec_table6":
        second_encoder(tmp_path / "dataset")
    assert main([f"--config_files={name}", *SMALL, "--result_file=r.json"]) == 0
    results = json.loads((tmp_path / "r.json").read_text())
    variants = read_yaml(PAPER / f"{name}.yaml")["variants"]
    assert [result["variant"] for result in results] == list(variants)
    first, *others = results
    assert first["protocol"] == "cand100"
    for result in others:  # one CF model for all
        assert result["rows"][0]["test"] == first["rows"][0]["test"]
        assert result["stages"]["cf"]["stopped"] == "given"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dataset"),
    [
        (name, dataset)
        for name in RECIPES
        for dataset in ("ml-latest-small", "amazon-beauty")
        if name != "illmrec_table6" and (name, dataset) != ("illmrec_table3", "amazon-beauty")
    ],
)
def test_a_recipe_runs_on_films_and_cosmetics(
    name: str, dataset: str, real_tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the documented command, on a few users: films have posters, cosmetics no pictures."""
    monkeypatch.chdir(tmp_path)
    films = dataset == "ml-latest-small"
    words = ["--train_batch_size=32"] if films else ["--missing_image_rate=1", "--eval_users=2000"]
    if name == "illmrec_figure6":  # neither has descriptions, which it compares
        words += ["--columns={'title': 'title', 'description': 'title'}", "--max_context=1024"]
    few = ["--limit_users=100", "--epochs=1", "--cf_max_steps=2", "--alignment_max_steps=2"]
    flags = [f"--dataset={dataset}", f"--data_path={real_tables}", "--show_progress=False"]
    named = [f"--config_files={name}", "--backbone=tiny", "--result_file=r.json"]
    assert main([*flags, *few, *named, *words]) == 0
    results = json.loads((tmp_path / "r.json").read_text())
    variants = read_yaml(PAPER / f"{name}.yaml")["variants"]
    assert [result["variant"] for result in results] == list(variants)
    assert {result["limit_users"] for result in results} == {100}


def test_all_recipes_train_one_cf_model() -> None:
    """So that `--cf_from` may give one run's to all of them."""
    network = ("cf", "hidden_size", "n_layers", "n_heads", "inner_size", "hidden_dropout_prob")
    rows = ("dataset", "attn_dropout_prob", "train_mode", "train_batch_size", "eval_candidates")
    read = [read_yaml(PAPER / f"{name}.yaml") for name in RECIPES]
    told = [{key: recipe[key] for key in (*network, *rows)} for recipe in read]
    assert all(keys == told[0] for keys in told)
    varied = {key for recipe in read for keys in recipe["variants"].values() for key in keys or {}}
    assert not varied & {*network, *rows}


def test_there_is_a_recipe_for_each_table_of_the_model() -> None:
    assert {name.split("_")[1] for name in RECIPES} == {
        *(f"table{n}" for n in (1, 2, 3, 4, 6, 7)),
        *("figure5", "figure6", "figure7"),
    }

"""The recipes of PRIME's variants: each lays what the paper varies over another configuration."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from recbole_mm.cli import main
from recbole_mm.config import MMConfig
from recbole_mm.jobs import plan_jobs, read_recipe
from recbole_mm.paths import properties_dir
from recbole_mm.report.lines import standard_error

FOLDER = properties_dir() / "paper"
VARIANTS = sorted(
    path.stem
    for path in FOLDER.glob("prime_*.yaml")
    if path.stem.startswith(("prime_table3", "prime_table4", "prime_figure5"))
)
VARIED = {
    "without_preference": {"stages": ["retriever", "ranker"]},
    "sasrec": {"retriever": "SASRec", "train_mode": "whole", "attn_dropout_prob": 0.5},
    "fmlprec": {"retriever": "FMLPRec", "train_mode": "prefix"},
    "llava": {"backbone": "llava-1.5-7b", "image_pooling": "cls"},
    "cls_pooling": {"image_pooling": "cls"},
    "title_only": {"attributes": ["title"]},
    "without_image": {"attributes": ["title", "price", "brand", "categories"]},
    "without_title": {"attributes": ["image", "price", "brand", "categories"]},
    **{f"k{k}": {"n_candidates": k} for k in (5, 10, 15, 20)},
}


def backbone_of(name: str) -> str:
    return "tiny-llava" if name.endswith("llava") else "tiny"


def test_every_variant_is_listed() -> None:
    assert {name.split("_", 2)[2] for name in VARIANTS} == VARIED.keys()


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_changes_what_it_says_and_nothing_else(name: str) -> None:
    """Over the recipe of table 2; a retriever brings keys of its own."""
    plain = MMConfig("PRIME", "amazon-beauty", ["prime_table2_beauty"])
    varied = MMConfig("PRIME", "amazon-beauty", ["prime_table2_beauty", name])
    said = VARIED[name.split("_", 2)[2]]
    assert {key: varied[key] for key in said} == said
    if "retriever" not in said and "backbone" not in said:
        ours, theirs = varied.settings(), plain.settings()
        changed = {key for key in ours if ours[key] != theirs.get(key)}
        assert changed - {"stages"} == said.keys() - {"stages"}


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["amazon-beauty", "ml-latest-small"])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_runs_by_one_command(
    name: str, dataset: str, real_tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = [f"--dataset={dataset}", f"--data_path={real_tables}", "--show_progress=False"]
    quick = ["--limit_users=300", "--epochs=2", "--ranker_max_steps=3", "--preference_max_steps=2"]
    named = [f"--config_files={name}", f"--backbone={backbone_of(name)}", "--result_file=r.json"]
    assert main([*flags, *quick, *named]) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["backbone"] == backbone_of(name)
    assert result["limit_users"] == 300
    assert list(result["stages"])[:2] == ["retriever", "ranker"]


# --- the table of controls ---
CONTROLS = (
    *("full", "untrained", "title only", "masked candidates", "shuffled candidates"),
    *(f"labeler {name}" for name in ("none", "random", "truth", "ranker")),
)


def test_the_controls_differ_in_what_they_are_called_after() -> None:
    jobs = plan_jobs(read_recipe(["prime_controls"]), {"seed": "1"})
    assert [job.variant for job in jobs] == list(CONTROLS)
    by_name = {job.variant: MMConfig(job.model, job.dataset, [], job.keys) for job in jobs}
    for name in ("none", "random", "truth", "ranker"):
        assert by_name[f"labeler {name}"]["labeler"] == name
    assert by_name["untrained"]["ranker_epochs"] == 0
    assert "image" not in by_name["title only"]["attributes"]
    assert by_name["masked candidates"]["candidate_mask_history"] is True
    assert by_name["shuffled candidates"]["candidate_order"] == "shuffled"
    for job in jobs[1:]:
        assert job.others["retriever_from"] == "full"
    for pair in read_recipe(["prime_controls"])["compare"]:
        assert {name.partition(":")[0] for name in pair} <= {*CONTROLS}


def test_each_of_the_rankers_variants_varies_one_key() -> None:
    first, *others = plan_jobs(read_recipe(["prime_variants"]), {})
    keys = {"stages": ["retriever", "ranker"]}
    assert (first.variant, first.keys) == ("full", {**first.keys, **keys})
    varied = []
    for job in others:
        assert job.others["retriever_from"] == "full"
        MMConfig(job.model, job.dataset, [], job.keys)  # every key is one of PRIME's
        (new,) = set(job.keys) - set(first.keys) - {"retriever_from"}
        varied.append((new, str(job.keys[new])))
    assert len(set(varied)) == len(varied) == 13


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["prime_controls", "prime_variants"])
@pytest.mark.parametrize("dataset", ["amazon-beauty", "ml-latest-small"])
def test_a_table_runs_by_one_command(
    recipe: str, dataset: str, real_tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = [f"--dataset={dataset}", f"--data_path={real_tables}", "--show_progress=False"]
    quick = ["--limit_users=300", "--epochs=2", "--ranker_max_steps=3", "--preference_max_steps=2"]
    named = [f"--config_files={recipe}", "--backbone=tiny", "--seed=1"]
    assert main([*flags, *quick, *named, "--result_file=r.json"]) == 0
    results = json.loads((tmp_path / "r.json").read_text())
    planned = [job.variant for job in plan_jobs(read_recipe([recipe]), {"seed": "1"})]
    assert [result["variant"] for result in results] == planned
    last = {result["variant"]: list(result["stages"])[-1] for result in results}
    optimised = {name for name, stage in last.items() if stage == "preference"}
    assert optimised == ({*CONTROLS[5:]} if recipe == "prime_controls" else set())
    assert set(last.values()) <= {"ranker", "preference"}


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)  # an hour of one core
def test_the_ranker_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On mm-demo over three seeds: above the retriever, and above itself without pictures, by more
    than twice the standard error of the difference."""
    monkeypatch.chdir(tmp_path)
    flags = ["--config_files=prime_controls", "--variants=full,title only", "--show_progress=False"]
    assert main([*flags, "--result_file=r.json"]) == 0
    found: dict[str, list[float]] = {"retriever": [], "full": [], "title only": []}
    for result in json.loads((tmp_path / "r.json").read_text()):
        found[result["variant"]].append(result["test"]["ndcg@10"])
        if result["variant"] == "full":
            (row,) = [row for row in result["rows"] if row["name"] == "retriever"]
            found["retriever"].append(row["test"]["ndcg@10"])
    for other in ("retriever", "title only"):
        gaps = [a - b for a, b in zip(found["full"], found[other], strict=True)]
        assert len(gaps) == 3
        assert statistics.mean(gaps) > 2 * standard_error(gaps), other

"""The runs of one command: variants of a recipe, seeds, runs that others start from."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from recbole_mm.cli import main, parse
from recbole_mm.data.demo import Sizes, make_demo
from recbole_mm.errors import UserError
from recbole_mm.jobs import Job, plan_jobs, read_recipe
from recbole_mm.paths import properties_dir

RECIPE = """
model: {model}
dataset: ml-100k
seed: [1, 2]
variants:
  first: {{stages: [retriever]}}
  second: {{stages: [retriever, ranker], retriever_from: first, beta: 0.5}}
"""


def recipe(folder: Path, text: str = "", model: str = "PRIME") -> str:
    path = folder / "recipe.yaml"
    path.write_text(text or RECIPE.format(model=model))
    return str(path)


def jobs_of(folder: Path, flags: dict[str, Any], text: str = "") -> list[Job]:
    return plan_jobs(read_recipe([recipe(folder, text)]), flags)


# --- the plan ---
def test_every_command_that_a_recipe_names_has_a_plan() -> None:
    """Of the comments in `properties/paper/`: none sets what its variants set."""
    commands = [
        line.partition("run_recbole_mm.py")[2].partition(" #")[0].split()
        for path in sorted((properties_dir() / "paper").glob("*.yaml"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.startswith("#   python run_recbole_mm.py ")
    ]
    assert len(commands) > 40
    for words in commands:
        flags = parse(words)
        flags.pop("result_file", None)
        assert plan_jobs(read_recipe(flags["config_files"].split(",")), flags), words


def test_every_variant_with_every_seed(tmp_path: Path) -> None:
    jobs = jobs_of(tmp_path, {})
    assert [(job.variant, job.keys["seed"]) for job in jobs] == [
        ("first", 1), ("second", 1), ("first", 2), ("second", 2),
    ]  # fmt: skip
    assert {(job.model, job.dataset) for job in jobs} == {("PRIME", "ml-100k")}
    assert jobs[1].keys == {"stages": ["retriever", "ranker"], "beta": 0.5, "seed": 1}
    assert jobs[1].others == {"retriever_from": "first"}
    assert jobs[0].others == {}


def test_flags_stand_above_files_and_beside_variants(tmp_path: Path) -> None:
    flags = {"epochs": "7", "seed": "5", "dataset": "mm-demo", "model": "LRURec,PRIME"}
    jobs = jobs_of(tmp_path, flags)
    assert [(job.model, job.variant) for job in jobs] == [
        ("LRURec", "first"), ("LRURec", "second"), ("PRIME", "first"), ("PRIME", "second"),
    ]  # fmt: skip
    assert all(job.dataset == "mm-demo" and job.keys["seed"] == 5 for job in jobs)
    assert jobs[1].keys["epochs"] == "7"
    assert jobs[1].keys["beta"] == 0.5


def test_a_variant_needs_those_it_starts_from_or_another_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'second' takes its retriever from 'first'"):
        jobs_of(tmp_path, {"variants": "second"})
    flags = {"retriever_from": "saved/x", "variants": "second", "seed": "1"}
    (job,) = jobs_of(tmp_path, flags)
    assert job.keys["retriever_from"] == "saved/x"
    assert not job.others


def test_without_a_recipe_there_is_one_run() -> None:
    (job,) = plan_jobs({}, {"epochs": "3"})
    assert (job.model, job.dataset, job.variant) == ("PRIME", "mm-demo", None)
    assert job.keys == {"epochs": "3"}


def test_names_are_texts_and_lists_no_names(tmp_path: Path) -> None:
    text = "variants: {10: , no: {topk: [5], train_from: x}, 'full (masked)': {epochs: 1}}"
    jobs = jobs_of(tmp_path, {}, text)
    assert [job.variant for job in jobs] == ["10", "False", "full (masked)"]
    for name in ("10", "full (masked)"):
        (job,) = jobs_of(tmp_path, {"variants": name}, text)
        assert job.variant == name
    (job,) = jobs_of(tmp_path, {}, "variants: {a: {train_from: [a]}}")
    assert not job.others


@pytest.mark.parametrize("seeds", ["1,2", "[1, 2]", "(1,2)", [1, 2]])
def test_seeds_in_every_form(seeds: Any) -> None:
    assert [job.keys["seed"] for job in plan_jobs({}, {"seed": seeds})] == [1, 2]


@pytest.mark.parametrize(
    ("text", "flags", "sentence"),
    [
        ("", {"variants": "frist"}, r"no variant 'frist' \(did you mean 'first'\?\): the recipe"),
        ("seed: 1", {"variants": "first"}, "no recipe with variants is named"),
        ("variants: [a, b]", {}, "variants: expected `name: {key: value}` lines"),
        ("variants: {a: 3}", {}, "variants: expected `name: {key: value}` lines"),
        ("variants: {a: {ranker_from: b}, b: {}}", {}, "from 'b': put that above it in the recipe"),
        ("variants: {a: {ranker_from: a}}", {}, "from 'a': put that above it"),
        ("variants: {aa: {}, b: {ranker_from: Aa}}", {}, r"nor a run \(did you mean 'aa'\?\)"),
        ("", {"beta": "0.7"}, "--beta: variant 'second' sets it to 0.5: leave the flag out"),
        ("", {"stages": "retriever"}, "--stages: variant 'first' sets it to"),
        ("variants: {a: {seed: 7}}", {}, "'a' sets seed, which is of the whole command"),
        ("variants: {a: {model: BPR}}", {}, "'a' sets model, which is of the whole command"),
        ("variants: {'a,b': {}}", {}, "a name has neither comma nor colon"),
        ("variants: {'a:b': {}}", {}, "a name has neither comma nor colon"),
        ("variants: {}", {}, "--variants names none: the recipe has none"),
        ("", {"variants": ","}, "--variants names none: the recipe has first, second"),
        ("compare: [a, b]", {}, "compare: expected lines such as"),
        ("", {"seed": "1,01"}, "--seed is 1,01"),
        ("", {"model": "BPR,BPR"}, "names a model twice"),
        ("seed: [1, 1]", {}, "--seed is "),
        ("seed: many", {}, "--seed is many: write a whole number"),
        ("", {"seed": "1,-2"}, "--seed is 1,-2"),
        ("", {"model": ","}, "--model names no model"),
    ],
)
def test_what_cannot_be_planned(
    tmp_path: Path, text: str, flags: dict[str, str], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        jobs_of(tmp_path, flags, text)


# --- the runs ---
QUICK = ["--user_inter_num_interval=[20,40]", "--show_progress=False", "--hidden_size=8"]
TWO = """
model: LRURec
dataset: ml-100k
seed: [1, 2]
variants:
  trained: {epochs: 2}
  taken: {train_from: trained}
  untrained: {train_epochs: 0}
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path]:
    """The results of a small recipe, and the folder it ran in."""
    place = tmp_path_factory.mktemp("jobs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        flags = [f"--config_files={recipe(place, TWO)}", "--result_file=r.json", *QUICK]
        assert main(flags) == 0
    return json.loads((place / "r.json").read_text()), place


def test_results_name_their_variant_and_seed(
    results: tuple[list[dict[str, Any]], Path],
) -> None:
    found = [(r["variant"], r["seed"]) for r in results[0]]
    assert found == [(name, seed) for seed in (1, 2) for name in ("trained", "taken", "untrained")]


def test_a_variant_starts_from_the_run_of_its_own_seed(
    results: tuple[list[dict[str, Any]], Path],
) -> None:
    for trained, taken, _ in (results[0][:3], results[0][3:]):
        assert taken["test"] == trained["test"]
        assert taken["config"]["train_from"] == trained["run_dir"]
        assert taken["stages"]["train"]["steps"] == 0
    assert results[0][0]["test"] != results[0][3]["test"]


def test_untrained_weights_are_those_of_the_seed(
    results: tuple[list[dict[str, Any]], Path],
) -> None:
    one, other = results[0][2], results[0][5]
    assert one["stages"]["train"]["steps"] == 0
    assert one["stages"]["train"]["stopped"] == "untrained"
    assert one["test"] != other["test"]
    assert one["test"]["recall@20"] < results[0][0]["test"]["recall@20"]


def test_resumed_it_reads_what_has_ended_and_ends_with_its_tables(
    results: tuple[list[dict[str, Any]], Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found, place = results
    monkeypatch.chdir(place)
    before = {path.name for path in (place / "saved").iterdir()}
    flags = ["--config_files=recipe.yaml", "--resume", "--result_file=again.json", *QUICK]
    assert main(flags) == 0
    assert {path.name for path in (place / "saved").iterdir()} == before
    assert json.loads((place / "again.json").read_text()) == found
    said = capsys.readouterr().out + caplog.text  # nothing was run, so no log was begun
    first, second = (found[i]["test"]["recall@25"] for i in (0, 3))
    assert "2 seeds (mean ±standard error)" in said
    rows = [line for line in said.splitlines() if line.startswith("LRURec untrained")]
    (above,) = [line for line in said.splitlines() if line.startswith("LRURec trained")]
    assert f"{(first + second) / 2:.4f} ±{abs(first - second) / 2:.4f}" in above
    assert "recall@25 less that of LRURec trained, paired bootstrap over users" in said
    assert len(rows) == 2
    assert rows[1].split()[2].startswith("-0.")
    assert "may be chance" not in rows[1]


@pytest.mark.parametrize(
    ("model", "variants", "says"),
    [
        ("BPR", "a: {}, b: {train_from: a}", "variant 'b': BPR has no stage 'train'"),
        ("LRURec", "a: {}, b: {trian_from: a}", "variant 'b': LRURec has no stage 'trian'"),
        ("PRIME", "a: {stages: [retriever]}, b: {ranker_from: a}", "'a' has no stage ranker"),
        ("PRIME", "a: {}, b: {stages: [ranker]}", "variant 'b': stages begin with ranker: name"),
        ("LRURec", "a: {}, b: {dropuot_prob: 0.1}", "variant 'b': .*did you mean 'dropout_prob'"),
    ],
)
def test_what_a_variant_starts_from_is_checked_before_the_first_is_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model: str,
    variants: str,
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    text = f"model: {model}\ndataset: ml-100k\nbackbone: tiny\nvariants: {{{variants}}}\n"
    assert main([f"--config_files={recipe(tmp_path, text)}", *QUICK[:2]]) == 1
    said = capsys.readouterr().err
    assert re.search(says, said), said
    assert not (tmp_path / "saved").exists()


STAGED = """
model: PRIME
dataset: mini
seed: 1
variants:
  alone: {stages: [retriever]}
  ranked: {stages: [retriever, ranker]}
"""


def test_variants_that_differ_in_stages_alone_are_runs_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when resumed, and when a run of all stages has come between."""
    monkeypatch.chdir(tmp_path)
    shop = Sizes(30, (6, 8), aisles=1, shelves=6, staples=1, novelties=1, trials=3)
    make_demo(tmp_path / "dataset" / "mini", sizes=shop)
    quick = {"epochs": 1, "ranker_max_steps": 1, "preference_max_steps": 1, "backbone": "tiny"}
    flags = [*(f"--{key}={value}" for key, value in {**quick, "show_progress": False}.items())]
    command = [f"--config_files={recipe(tmp_path, STAGED)}", "--result_file=r.json", *flags]
    assert main(command) == 0
    first = json.loads((tmp_path / "r.json").read_text())
    assert len({result["run_dir"] for result in first}) == 2
    assert main(["--dataset=mini", "--seed=1", "--result_file=whole.json", *flags]) == 0
    whole = json.loads((tmp_path / "whole.json").read_text())
    assert whole["config_hash"] == first[0]["config_hash"]
    assert main([*command, "--resume"]) == 0
    assert json.loads((tmp_path / "r.json").read_text()) == first
    folder = Path(whole["run_dir"])
    assert {**json.loads((folder / "result.json").read_text()), "variant": None} == whole
    assert (folder / "preference" / "best").is_dir()


def test_one_variant_that_has_ended_is_read_back(
    results: tuple[list[dict[str, Any]], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, place = results
    monkeypatch.chdir(place)
    flags = ["--config_files=recipe.yaml", "--variants=trained", "--seed=1", *QUICK]
    assert main([*flags, "--resume", "--result_file=one.json"]) == 0
    assert json.loads((place / "one.json").read_text()) == found[0]


def test_resuming_one_run_takes_no_variants(
    results: tuple[list[dict[str, Any]], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found, place = results
    monkeypatch.chdir(place)
    assert main([f"--resume={found[0]['run_dir']}", "--variants=trained"]) == 1
    assert "goes on with one run: leave --variants out" in capsys.readouterr().err

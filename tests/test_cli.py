"""The command line: flags, sentences instead of tracebacks, results, tables."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from recbole_mm.cli import main, parse
from recbole_mm.errors import UserError
from tests.conftest import REPO

SMALL = ["--dataset=ml-100k", "--user_inter_num_interval=[20,40]", "--show_progress=False"]


def test_flags_in_every_form() -> None:
    flags = parse(["-m", "SASRec", "--dataset", "ml-100k", "--filter=a=b", "--resume", "--debug"])
    assert flags == {
        "model": "SASRec",
        "dataset": "ml-100k",
        "filter": "a=b",
        "resume": "",
        "debug": "",
    }
    assert parse(["--resume=saved/x"])["resume"] == "saved/x"
    assert parse(["--learning_rate", "-1"])["learning_rate"] == "-1"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["SASRec"], "'SASRec' belongs to no flag"),
        (["-x", "3"], "'-x' belongs to no flag"),
        (["--epochs"], "--epochs has no value"),
        (["--epochs", "--seed=1"], "--epochs has no value"),
        (["--epochs=1", "--epochs=2"], "--epochs is given twice"),
    ],
)
def test_words_that_cannot_be_read(words: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        parse(words)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--model=SASRek", "--dataset=ml-100k"], "did you mean 'SASRec'"),
        (
            ["--model=SASRec", "--dataset=amazon-beauty"],
            "python -m dataset_tools table --name amazon-",
        ),
        (["--model=SASRec", "--dataset=mm-dem"], "did you mean 'mm-demo'"),
        (["--model=SASRec", "--dataset=ml-100k", "--hiden_size=8"], "did you mean 'hidden_size'"),
        (["--load=nowhere"], "nowhere is no run"),
        (["--model=SASRec", "--dataset=ml-100k", "--resume"], "no unfinished run"),
        (["--model=SASRec,BPR", "--dataset=ml-100k", "--resume=x"], "x is no run"),
    ],
)
def test_a_mistake_is_one_sentence(
    flags: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(flags) == 1
    told = capsys.readouterr().err
    assert told.startswith("Error: ")
    assert sentence in told
    assert "Traceback" not in told
    assert not (tmp_path / "saved").exists(), "a mistake must not leave a run behind"


def test_debug_shows_where_it_came_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError):
        main(["--model=SASRek", "--dataset=ml-100k", "--debug"])


def test_several_models_give_one_table_and_a_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--model=Pop,LRURec", "--epochs=1", "--result_file=out/r.json", *SMALL]) == 0
    results = json.loads((tmp_path / "out" / "r.json").read_text())
    assert [r["model"] for r in results] == ["Pop", "LRURec"]
    for result in results:
        assert result["test_users"] == 305
        assert result["protocol"] == "full"
        assert set(result["test_protocols"]) == {"full", "full-masked"}
        assert Path(result["run_dir"], "result.json").is_file()
        assert result["best_valid"] == result["valid"][result["valid_metric"]]
    assert results[1]["train_mode"] == "whole"
    assert results[1]["stages"]["train"]["steps"] > 0


def test_metrics_of_whole_lists_and_of_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    metrics = "--metrics=['Recall','ItemCoverage','GiniIndex','AveragePopularity','TailPercentage']"
    flags = [metrics, "--valid_metric=Recall@10", "--result_file=r.json", *SMALL]
    assert main(["--model=Pop", *flags]) == 0
    test = json.loads((tmp_path / "r.json").read_text())["test"]
    assert 0 < test["itemcoverage@10"] < 0.2  # every user gets much the same popular items
    assert test["giniindex@10"] > 0.9
    assert test["averagepopularity@10"] > 10


def test_candidates_are_the_same_for_every_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--model=Random,EASE", "--eval_candidates=cand100", "--result_file=r.json", *SMALL]
    assert main(flags) == 0
    random, ease = json.loads((tmp_path / "r.json").read_text())
    assert random["protocol"] == ease["protocol"] == "cand100"
    assert abs(random["test"]["recall@10"] - 10 / 101) < 0.06  # chance
    assert ease["test"]["recall@10"] > 0.4


def test_labelled_pairs_have_no_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A context-aware model tells clicks from others and ranks nothing; beside one that ranks."""
    monkeypatch.chdir(tmp_path)
    flags = ["--model=Pop,FM", "--seed=1,2", "--epochs=1", "--result_file=r.json", *SMALL]
    assert main(flags) == 0
    results = json.loads((tmp_path / "r.json").read_text())
    protocols = [(r["model"], r["seed"], r["protocol"]) for r in results]
    assert protocols == [
        ("Pop", 1, "full"), ("FM", 1, "labeled"), ("Pop", 2, "full"), ("FM", 2, "labeled"),
    ]  # fmt: skip
    assert Path(results[0]["run_dir"], "places.tsv").is_file()
    assert not Path(results[1]["run_dir"], "places.tsv").is_file()


def test_help_and_import_cost_nothing() -> None:
    code = (
        "import sys, recbole_mm, recbole_mm.cli as c; assert c.main(['--help']) == 0; "
        "bad = {'ray', 'transformers', 'torch', 'recbole'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPO, capture_output=True)

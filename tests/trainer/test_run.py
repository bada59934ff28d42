"""Which run is gone on with, what is trained anew, and what `--load` leaves alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from recbole_mm import compat, quick_start
from recbole_mm.cli import main
from recbole_mm.errors import UserError
from recbole_mm.trainer.run import Run, check_same, earlier_run

SMALL = ["--dataset=ml-100k", "--user_inter_num_interval=[20,40]", "--show_progress=False"]


class Settings(dict[str, Any]):
    """As much of a configuration as a run asks for."""

    def settings(self) -> dict[str, Any]:
        return dict(self)

    def hash(self) -> str:
        return str(self["size"])


def settings(root: Path, size: int = 1) -> Settings:
    return Settings(
        model="M", dataset="d", size=size, data_path=str(root / "d"), checkpoint_dir=str(root)
    )


STAGES = ("retriever", "ranker", "preference")


def started(root: Path, done: tuple[str, ...] = (), finished: bool = False) -> Run:
    run = Run.start(root, settings(root))
    for name in done:
        run.record(name, done=True)
        (run.folder / name).mkdir()
    if finished:
        run.finish()
    return run


def test_stages_of_a_killed_run_are_kept(tmp_path: Path) -> None:
    """A kill after the last stage, in the final evaluation, loses nothing."""
    for asked in ([], ["ranker"], ["retriever", "ranker"]):
        run = started(tmp_path, ("retriever", "ranker"))
        run.reopen(asked, STAGES)
        assert run.is_done("retriever")
        assert run.is_done("ranker")
        assert (run.folder / "ranker").is_dir()


def test_named_stages_of_a_finished_run_are_trained_anew_and_later_ones_dropped(
    tmp_path: Path,
) -> None:
    run = started(tmp_path, STAGES, finished=True)
    run.reopen([], STAGES)
    assert all(map(run.is_done, STAGES))
    run.finish()
    run.reopen(["ranker"], STAGES)
    assert [name for name in STAGES if run.is_done(name)] == ["retriever"]
    assert [name for name in STAGES if (run.folder / name).exists()] == ["retriever"]
    assert Run.open(run.folder).state["status"] == "running"


def test_a_finished_run_that_goes_on_is_unfinished_again(tmp_path: Path) -> None:
    run = started(tmp_path, ("retriever",), finished=True)
    run.reopen(["ranker"], STAGES)
    assert run.is_done("retriever")
    found = earlier_run(settings(tmp_path), True, [])
    assert found is not None
    assert found.folder == run.folder


def test_resume_takes_the_same_configuration_only(tmp_path: Path) -> None:
    run = started(tmp_path)
    with pytest.raises(UserError, match=r"no unfinished run.*size was 1 and is 2"):
        earlier_run(settings(tmp_path, size=2), True, [])
    with pytest.raises(UserError, match="size was 1 and is 2"):
        check_same(run, settings(tmp_path, size=2))
    assert earlier_run(settings(tmp_path), False, []) is None


def test_resume_never_takes_a_finished_run_whatever_stages_are_asked_for(tmp_path: Path) -> None:
    killed = started(tmp_path, ("retriever",))
    finished = started(tmp_path, ("retriever", "ranker"), finished=True)
    found = {resume: earlier_run(settings(tmp_path), resume, ["retriever"]) for resume in (0, 1)}
    assert found[1] is not None
    assert found[1].folder == killed.folder
    finished.state["status"] = "running"
    for run in (killed, finished):
        run.finish()
    with pytest.raises(UserError, match="no unfinished run of this configuration has finished ret"):
        earlier_run(settings(tmp_path), True, ["retriever"])


def test_a_run_of_another_dataset_is_never_named(tmp_path: Path) -> None:
    """`d-more` begins like `d`, and sorts behind it."""
    older = started(tmp_path)
    Run.start(tmp_path, Settings(settings(tmp_path), dataset="d-more", size=3))
    with pytest.raises(UserError) as told:
        earlier_run(settings(tmp_path, size=2), True, [])
    assert f"the newest, {older.folder}, differs: size was 1 and is 2" in str(told.value)


def test_a_damaged_run_is_passed_over(tmp_path: Path) -> None:
    whole, damaged = started(tmp_path), started(tmp_path)
    (damaged.folder / "state.json").write_text("{")
    found = earlier_run(settings(tmp_path), True, [])
    assert found is not None
    assert found.folder == whole.folder
    with pytest.raises(UserError, match="is no run"):
        Run.open(damaged.folder)


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run of EASE."""
    monkeypatch.chdir(tmp_path)
    assert main(["--model=EASE", "--result_file=first.json", *SMALL]) == 0
    return next((tmp_path / "saved").iterdir())


def test_loading_leaves_the_run_as_it_is(trained: Path) -> None:
    stored = (trained / "result.json").read_bytes()
    flags = [f"--load={trained}", "--eval_candidates=cand20", "--result_file=again.json"]
    assert main(flags) == 0
    assert (trained / "result.json").read_bytes() == stored
    first, again = (json.loads(Path(f"{name}.json").read_text()) for name in ("first", "again"))
    assert (first["protocol"], again["protocol"]) == ("full", "cand20")
    assert again["stages"]["train"]["test"] == again["test"] != first["test"]
    assert again["config_hash"] != first["config_hash"]


def test_loading_from_elsewhere_finds_the_data(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert main([f"--load={trained}"]) == 0


def test_a_run_is_gone_on_with_by_its_folder_alone(trained: Path) -> None:
    assert main([f"--resume={trained}", "--result_file=again.json"]) == 0
    assert json.loads(Path("again.json").read_text())["model"] == "EASE"


@pytest.mark.parametrize("way", ["--load", "--resume"])
def test_a_run_of_another_model_is_refused(
    way: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([f"{way}={trained}", "--model=SASRec"]) == 1
    assert "is a run of EASE" in capsys.readouterr().err


def test_finished_models_give_their_table_again(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compat.reset_logging()
    assert main(["--model=EASE,Pop", "--resume", *SMALL]) == 0
    compat.reset_logging()
    capsys.readouterr()
    assert main(["--model=EASE,Pop", "--resume", *SMALL]) == 0
    shown = capsys.readouterr()
    assert "protocol full" in shown.out + shown.err


def test_no_model_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model=,"]) == 1
    assert "names no model" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--reg_weight=1.0", "--config_files=lrurec_official"])
def test_loading_refuses_what_would_change_the_weights(
    flag: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([f"--load={trained}", flag]) == 1
    assert "cannot be changed for a trained run" in capsys.readouterr().err


def test_the_results_before_a_failure_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    flags = ["--backbone=qwen2-vl-2b", "--result_file=r.json", "--limit_users=60"]
    code = main(["--model=Pop,PRIME", "--dataset=mm-demo", "--show_progress=False", *flags])
    assert code == 1
    assert "--backbone=tiny" in capsys.readouterr().err
    assert json.loads((tmp_path / "r.json").read_text())["model"] == "Pop"
    assert [run.name.split("-")[0] for run in (tmp_path / "saved").iterdir()] == ["Pop"]


def test_an_unforeseen_error_is_one_sentence_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quick_start, "prepare_data", lambda _: {}["missing"])
    assert main(["--model=Pop", *SMALL]) == 1
    told = capsys.readouterr().err
    assert told.startswith("Error: KeyError: 'missing'")
    assert "--debug" in told
    with pytest.raises(KeyError):
        main(["--model=Pop", "--debug", *SMALL])


def test_a_result_file_that_cannot_be_written_costs_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--model=Pop", f"--result_file={tmp_path}", *SMALL]) == 1
    assert "--result_file" in capsys.readouterr().err
    assert not (tmp_path / "saved").exists()

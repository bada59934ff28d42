"""`python -m dataset_tools demo`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dataset_tools.__main__ import main


@pytest.fixture(scope="module")
def demos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where mm-demo and mm-demo-permuted lie."""
    place = tmp_path_factory.mktemp("demos")
    for flags in ([], ["--permuted"]):
        assert main(["demo", f"--out={place}", *flags]) == 0
    return place


def test_a_demo_is_only_made_again_by_force(
    demos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(demos / "mm-demo", tmp_path / "mm-demo")
    first = (folder / "mm-demo.inter").read_bytes()
    command = ["demo", f"--out={tmp_path}", "--seed=7"]
    assert main(command) == 1
    assert "--force" in capsys.readouterr().err
    assert (folder / "mm-demo.inter").read_bytes() == first
    assert main([*command, "--force"]) == 0
    assert (folder / "mm-demo.inter").read_bytes() != first
    assert [path.name for path in tmp_path.iterdir()] == ["mm-demo"]


def test_the_permuted_demo_differs_in_its_pictures_alone(demos: Path) -> None:
    plain, permuted = demos / "mm-demo", demos / "mm-demo-permuted"
    for suffix in ("inter", "text"):
        one, other = (d / f"{d.name}.{suffix}" for d in (plain, permuted))
        assert one.read_bytes() == other.read_bytes()
    assert sorted(shown(plain)) == sorted(shown(permuted))
    assert shown(plain) != shown(permuted)


def test_what_to_try_names_the_place(
    demos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = "Try: python run_recbole_mm.py --model=LRURec --dataset=mm-demo"
    for out, place in (("dataset/", ""), ("my data", " '--data_path=my data'")):
        assert main(["demo", f"--out={out}"]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == line + place


def test_a_negative_seed_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", f"--out={tmp_path}", "--seed", "-1"]) == 1
    assert capsys.readouterr().err == "Error: --seed is -1: give 0 or more.\n"
    assert not list(tmp_path.iterdir())


def test_an_unforeseen_error_is_one_sentence_unless_debugged(
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["demo", "--out=no\0path"]
    assert main(command) == 1
    told = capsys.readouterr().err
    assert told.startswith("Error: ValueError: ")
    assert told.endswith("--debug shows where.\n")
    with pytest.raises(ValueError, match="null"):
        main([*command, "--debug"])


def shown(folder: Path) -> list[bytes]:
    """The picture files in the order of the items."""
    lines = (folder / f"{folder.name}.image").read_text().splitlines()[1:]
    return [(folder / "images" / line.split("\t")[1]).read_bytes() for line in lines]

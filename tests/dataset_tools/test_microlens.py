"""MicroLens: files in the release's form, covers, and what is broken."""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
from PIL import Image

from dataset_tools.__main__ import main
from recbole_mm.data.atomic import read_images, read_table, read_text

ROOT = Path(__file__).resolve().parents[2]
PAIRS = "user,item,timestamp\n7,12,1662983998\n7,11,1662983000\n9,12,1662980000\n"
TITLES = 'item,title\n11,"Rice, again # food"\n12,Duck, spicy # funny\n99,Never seen\n'


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    folder = tmp_path / "raw"
    (folder / "MicroLens-50k_covers").mkdir(parents=True)
    (folder / "MicroLens-50k_pairs.csv").write_text(PAIRS)
    (folder / "MicroLens-50k_titles.csv").write_text(TITLES)
    Image.new("RGB", (9, 9), "red").save(folder / "MicroLens-50k_covers" / "12.jpg")
    return folder


def make(raw: Path, out: Path, *flags: str) -> int:
    words = ["microlens", "--variant=50k", f"--raw_dir={raw}", f"--out={out}", "--min_inter=1"]
    return main([*words, "--no-download", *flags])


def covers(raw: Path) -> Path:
    """The archive of covers, in place of their folder."""
    folder = raw / "MicroLens-50k_covers"
    archive = shutil.make_archive(str(folder), "zip", raw, folder.name)
    shutil.rmtree(folder)
    return Path(archive)


def interactions(folder: Path) -> list[list[str]]:
    header, rows = read_table(folder / f"{folder.name}.inter")
    assert [name for name, _ in header] == ["user_id", "item_id", "timestamp"]
    return [cells for _, cells in rows]


def test_pairs_with_times_titles_and_covers(raw: Path, tmp_path: Path) -> None:
    assert make(raw, tmp_path / "out") == 0
    folder = tmp_path / "out" / "microlens-50k"
    rows = interactions(folder)
    assert rows == [["7", "11", "1662983000"], ["7", "12", "1662983998"], ["9", "12", "1662980000"]]
    _, texts = read_text(folder / "microlens-50k.text")
    assert dict(texts) == {"11": ["Rice, again # food"], "12": ["Duck, spicy # funny"]}
    assert [item for item, _ in read_images(folder / "microlens-50k.image")] == ["12"]
    assert make(raw, tmp_path / "bare", "--no-images") == 0
    assert not (tmp_path / "bare" / "microlens-50k" / "images").exists()


def test_sequences_where_there_are_no_times(raw: Path, tmp_path: Path) -> None:
    (raw / "MicroLens-50k_pairs.csv").rename(raw / "kept_away.csv")
    (raw / "MicroLens-50k_pairs.tsv").write_text("7\t12 11 12\n9\t11\n8\t\n")
    assert make(raw, tmp_path / "out") == 0
    assert interactions(tmp_path / "out" / "microlens-50k") == [
        ["7", "12", "1"], ["7", "11", "2"], ["7", "12", "3"], ["9", "11", "1"],
    ]  # fmt: skip


def test_breaks_and_bytes_that_titles_should_not_have(raw: Path, tmp_path: Path) -> None:
    """A carriage return is a space, lines of Windows are lines, Latin-1 is read as such."""
    titles = b'item,title\r\n11,Rice\rcake\r\n12,"Duck, foot \xe9"\r\n'
    (raw / "MicroLens-50k_titles.csv").write_bytes(titles)
    assert make(raw, tmp_path / "out") == 0
    _, texts = read_text(tmp_path / "out" / "microlens-50k" / "microlens-50k.text")
    assert dict(texts) == {"11": ["Rice cake"], "12": ["Duck, foot é"]}


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ('"Rice, again"', "Rice, again"),
        ('"Rice, ""again"""', 'Rice, "again"'),
        ('"Rice, again', '"Rice, again'),
        ('"Best" rice, again', '"Best" rice, again'),
        ('Rice "again, and', 'Rice "again, and'),
        ('Rice,"again', 'Rice,"again'),
        ('"' + "x" * 200_000, '"' + "x" * 200_000),
    ],
)
def test_a_quote_that_does_not_close_swallows_no_line(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], written: str, read: str
) -> None:
    (raw / "MicroLens-50k_titles.csv").write_text(f"item,title\n11,{written}\n\n12,Duck\n")
    assert make(raw, tmp_path / "out") == 0
    _, texts = read_text(tmp_path / "out" / "microlens-50k" / "microlens-50k.text")
    assert dict(texts) == {"11": [read], "12": ["Duck"]}
    said = capsys.readouterr().out
    is_odd = read == written and not written.startswith('Rice "')
    assert ("lines whose quotes do not close, taken as they are: 1" in said) == is_odd
    assert "left out" not in said


def test_a_quote_among_the_pairs_costs_its_line_only(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = PAIRS.splitlines()
    (raw / "MicroLens-50k_pairs.csv").write_text("\n".join([rows[0], '"7,1,2', *rows[1:]]))
    assert make(raw, tmp_path / "out") == 0
    assert len(interactions(tmp_path / "out" / "microlens-50k")) == 3
    assert "left out, pairs that cannot be read: 1" in capsys.readouterr().out


def test_lines_that_cannot_be_read_are_counted(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (raw / "MicroLens-50k_pairs.csv").open("a") as file:
        file.write("1,2\n,2,3\n1,,3\n1,2,soon\n\n")
        file.write(f"7,11,{1 << 64}\n7,11,{'9' * 5000}\n")
    with (raw / "MicroLens-50k_titles.csv").open("a") as file:
        file.write("alone\n")
    assert make(raw, tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "interactions: 3" in said
    assert "left out, pairs that cannot be read: 6" in said
    assert "left out, titles that cannot be read: 1" in said


KILLED = """
import os, sys
from dataset_tools import download
from dataset_tools.__main__ import main

unpack_one, left = download._unpack_one, [True]
download._unpack_one = lambda *all: unpack_one(*all) if left and left.pop() else os._exit(9)
main(sys.argv[1:])
"""


def test_covers_of_a_run_that_was_killed_are_unpacked_anew(raw: Path, tmp_path: Path) -> None:
    for item in ("11", "99"):
        Image.new("RGB", (9, 9), "blue").save(raw / "MicroLens-50k_covers" / f"{item}.jpg")
    covers(raw)
    words = ["microlens", "--variant=50k", f"--raw_dir={raw}", f"--out={tmp_path / 'out'}"]
    run = [sys.executable, "-c", KILLED, *words, "--min_inter=1", "--no-download"]
    place = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run(run, env=place, capture_output=True, check=False).returncode == 9
    assert len(list(raw.rglob("*.jpg"))) == 1
    assert make(raw, tmp_path / "out") == 0
    images = read_images(tmp_path / "out" / "microlens-50k" / "microlens-50k.image")
    assert {item for item, _ in images} == {"11", "12"}
    assert len(list((raw / "MicroLens-50k_covers").iterdir())) == 3
    assert [path.name for path in raw.iterdir() if path.name.startswith(".")] == []


def test_a_broken_archive_of_covers_leaves_no_folder(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = covers(raw)
    archive.write_bytes(archive.read_bytes()[:-9])
    assert make(raw, tmp_path / "out") == 1
    assert "and give the command again" in capsys.readouterr().err
    assert [path for path in raw.iterdir() if path.is_dir()] == []


def test_covers_that_cannot_be_had_can_be_done_without(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*details: Any, **more: Any) -> NoReturn:
        raise OSError("no network")

    shutil.rmtree(raw / "MicroLens-50k_covers")
    monkeypatch.setattr(socket, "getaddrinfo", offline)
    monkeypatch.setattr(random, "uniform", lambda low, high: 0.001)  # between tries
    assert make(raw, tmp_path / "out", "--download") == 1
    said = capsys.readouterr().err
    assert "covers.zip cannot be downloaded: host not found" in said
    assert "To go on without covers, give --no-images, or --no-download" in said
    for flag in ("--no-images", "--no-download"):
        assert make(raw, tmp_path / "out", "--download", flag, "--force") == 0


def test_mistakes_are_one_sentence(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (raw / "MicroLens-50k_titles.csv").unlink()
    assert make(raw, tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert "has no MicroLens-50k_titles.csv or MicroLens-50k_title_en.csv" in said
    (raw / "MicroLens-50k_titles.csv").write_text(TITLES)
    (raw / "MicroLens-50k_pairs.csv").write_text("nothing\n")
    assert make(raw, tmp_path / "out") == 1
    assert "has no user with items" in capsys.readouterr().err


def test_the_real_sequences_give_the_papers_users(shared_data: Path, tmp_path: Path) -> None:
    """Put into the release's form."""
    raw = tmp_path / "raw"
    raw.mkdir()
    source = shared_data / "microlens-50k"
    lines = (source / "sequences.tsv").read_text().splitlines()[1:]
    (raw / "MicroLens-50k_pairs.tsv").write_text("\n".join(lines) + "\n")
    (raw / "MicroLens-50k_titles.csv").write_text(TITLES)
    assert make(raw, tmp_path, "--min_inter=6,5", "--force") == 0
    rows = interactions(tmp_path / "microlens-50k")
    assert len({row[0] for row in rows}) == 25_411
    assert len(rows) == 220_472

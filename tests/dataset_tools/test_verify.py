"""A dataset's own figures beside those of the papers' tables."""

from __future__ import annotations

from pathlib import Path

import pytest

from dataset_tools import verify
from dataset_tools.__main__ import main
from dataset_tools.verify import PUBLISHED, Published, count
from recbole_mm.data.atomic import write_images, write_table

HEADER = ("user_id:token", "item_id:token", "timestamp:float")
ROWS = [("u1", "a", "1"), ("u1", "b", "2"), ("u2", "a", "1"), ("u2", "a", "2")]
PICTURES = [("a", "1.jpg"), ("a", "2.jpg"), ("b", "gone.jpg"), ("c", "3.jpg")]


def shop(folder: Path, name: str = "shop") -> Path:
    """Two users, two items, four interactions; pictures of one of the items and of another, and
    a row without a file."""
    (folder / name / "images").mkdir(parents=True)
    for number in (2, 3):
        (folder / name / "images" / f"{number}.jpg").write_bytes(b"")
    write_table(folder / name / f"{name}.inter", HEADER, ROWS)
    write_images(folder / name / f"{name}.image", PICTURES)
    return folder / name


def test_every_thing_is_counted_once(tmp_path: Path) -> None:
    found = count(shop(tmp_path))
    assert found == {"users": 2, "items": 2, "interactions": 4, "images": 1}
    (tmp_path / "shop" / "images" / "2.jpg").unlink()
    assert count(tmp_path / "shop")["images"] == 0
    (tmp_path / "shop" / "shop.image").unlink()
    assert count(tmp_path / "shop")["images"] == 0


@pytest.mark.parametrize(
    ("figures", "out_of_reach", "code", "says"),
    [
        ({"users": 2, "items": 2, "interactions": 4}, {}, 0, "interactions  4     4"),
        ({"users": 2, "interactions": "0k"}, {}, 0, "equal"),
        ({"users": 3, "items": 2}, {}, 1, "DIFFERS"),
        ({"users": 2, "interactions": "1k"}, {}, 1, "DIFFERS"),
        ({"users": 3}, {"users": "some are lost"}, 0, "out of reach: some are lost"),
        ({"users": 2}, {"users": "some are lost"}, 0, "equal"),
    ],
)
def test_the_exit_code_is_that_of_figures_within_reach(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    figures: dict[str, int | str],
    out_of_reach: dict[str, str],
    code: int,
    says: str,
) -> None:
    shop(tmp_path)
    monkeypatch.setitem(PUBLISHED, "shop", Published("A paper, table 9", figures, out_of_reach))
    assert main(["verify", "shop", "--data_path", str(tmp_path)]) == code
    said = capsys.readouterr()
    assert "A paper, table 9" in said.out
    assert says in said.out
    if code:
        assert "shop differs from A paper, table 9 in " in said.err
        assert "Traceback" not in said.err


def test_pictures_that_nobody_fetched_are_no_dead_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = shop(tmp_path) / "images" / "2.jpg"
    dead = Published("A paper, table 9", {"images": 2}, {"images": "links are dead"})
    monkeypatch.setitem(PUBLISHED, "shop", dead)
    for has_pictures in (True, False):
        assert main(["verify", "shop", "--data_path", str(tmp_path)]) == 0
        said = capsys.readouterr().out
        assert ("out of reach: links are dead" in said) == has_pictures
        assert ("no pictures were fetched: run images" in said) == (not has_pictures)
        place.unlink(missing_ok=True)


def test_ra_recs_users_are_within_reach(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shop(tmp_path, "amazon2018-books")
    assert main(["verify", "amazon2018-books", "--data_path", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "differs from RA-Rec, table 1 in users:" in said.err
    assert said.out.count("out of reach") == 2


def test_mistakes_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shop(tmp_path, "amazon-beaty")
    assert main(["verify", "amazon-beaty", "--data_path", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "users         2" in said.out
    assert "did you mean 'amazon-beauty'?" in said.err
    assert main(["verify", "nothing", "--data_path", str(tmp_path)]) == 1
    assert "nothing.inter cannot be read" in capsys.readouterr().err


def test_real_beauty_is_that_of_prime(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = shared_data / "amazon-beauty"
    files = ["--sequences", str(source / "sequences.tsv"), "--items", str(source / "items.tsv")]
    assert main(["table", "--name", "amazon-beauty", *files, "--out", str(tmp_path)]) == 0
    capsys.readouterr()
    assert main(["verify", "amazon-beauty", "--data_path", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines[1:4]] == ["equal"] * 3
    assert lines[4].split()[:3] == ["images", "0", "12,023"]
    assert lines[4].endswith("no pictures were fetched: run images")


def test_real_microlens_has_the_papers_users(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = shared_data / "microlens-50k"
    files = ["--sequences", str(source / "sequences.tsv"), "--items", str(source / "items.tsv")]
    flags = ["--name", "microlens-50k", *files, "--min_inter", "6,5", "--out", str(tmp_path)]
    assert main(["table", *flags]) == 0
    assert main(["verify", "microlens-50k", "--data_path", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "users         25,411   25,411" in said
    assert said.count("out of reach") == 2


def test_what_is_out_of_reach_is_a_figure() -> None:
    for published in PUBLISHED.values():
        assert published.out_of_reach.keys() <= published.figures.keys() <= {*verify.COUNTED}

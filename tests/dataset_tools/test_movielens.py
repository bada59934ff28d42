"""MovieLens: small files in each release's real format, posters, and what is broken."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from dataset_tools.__main__ import main
from recbole_mm.data.atomic import read_images, read_table, read_text

FLAGS_100K = "|".join(
    ["0", "0", "0", "0", "0", "1", *["0"] * 8, "1", *["0"] * 4]
)  # Comedy, Romance


def files_100k(raw: Path) -> None:
    rows = ["196\t242\t3\t881250949", "196\t302\t4\t881250900", "22\t242\t1\t878887116"]
    (raw / "u.data").write_text("\n".join(rows) + "\n")
    items = [
        f"242|Kolya (1996)|24-Jan-1997||http://us.imdb.com/M|{FLAGS_100K}",
        f"302|Am\xe9lie|01-Jan-1997||http://us.imdb.com/M|{'|'.join(['0'] * 19)}",
    ]
    (raw / "u.item").write_bytes("\n".join(items).encode("latin-1"))


def files_1m(raw: Path) -> None:
    (raw / "ratings.dat").write_text("1::242::5::978300760\n1::302::3::978302109\n")
    movies = "242::Kolya (1996)::Comedy|Romance\n302::Am\xe9lie::Drama\n"
    (raw / "movies.dat").write_bytes(movies.encode("latin-1"))


def files_latest(raw: Path) -> None:
    ratings = "userId,movieId,rating,timestamp\n1,242,4.0,964982703\n1,302,0.5,964981247\n"
    (raw / "ratings.csv").write_text(ratings)
    movies = 'movieId,title,genres\n242,"Kolya, again (1996)",Comedy|Romance\n'
    (raw / "movies.csv").write_text(f"{movies}302,Am\xe9lie,(no genres listed)\n", encoding="utf-8")


FILES = {"100k": files_100k, "1m": files_1m, "latest-small": files_latest}


def make(raw: Path, out: Path, variant: str, *flags: str) -> int:
    words = ["movielens", f"--variant={variant}", f"--raw_dir={raw}", f"--out={out}"]
    return main([*words, "--min_inter=1", "--no-download", *flags])


def interactions(folder: Path) -> list[list[str]]:
    _, rows = read_table(folder / f"{folder.name}.inter")
    return [cells for _, cells in rows]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("variant", FILES)
def test_every_release(tmp_path: Path, variant: str, nested: bool) -> None:
    raw = tmp_path / "raw" / (f"ml-{variant}" if nested else ".")
    raw.mkdir(parents=True)
    FILES[variant](raw)
    assert make(tmp_path / "raw", tmp_path / "out", variant) == 0
    folder = tmp_path / "out" / ("movielens-100k" if variant == "100k" else f"ml-{variant}")
    rows = interactions(folder)
    first = {"100k": ["196", "302"], "1m": ["1", "242"], "latest-small": ["1", "302"]}[variant]
    assert rows[0][:2] == first  # by time
    names, texts = read_text(folder / f"{folder.name}.text")
    found = {item: dict(zip(names, values, strict=True)) for item, values in texts}
    kolya = "Kolya, again (1996)" if variant == "latest-small" else "Kolya (1996)"
    assert found["242"] == {"title": kolya, "categories": "Comedy > Romance"}
    assert found["302"]["title"] == "Am\xe9lie"
    assert found["302"]["categories"] == ("Drama" if variant == "1m" else None)


def test_ratings_and_times_come_through(tmp_path: Path) -> None:
    files_latest(tmp_path)
    assert make(tmp_path, tmp_path / "out", "latest-small") == 0
    assert interactions(tmp_path / "out" / "ml-latest-small") == [
        ["1", "302", "964981247", "0.5"],
        ["1", "242", "964982703", "4"],
    ]


def test_posters_by_id(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files_latest(tmp_path)
    posters = tmp_path / "posters"
    posters.mkdir()
    Image.new("RGB", (9, 9), "red").save(posters / "302.png")
    (posters / "242.jpg").write_bytes(b"<svg/>")
    assert make(tmp_path, tmp_path / "out", "latest-small", f"--posters={posters}") == 0
    folder = tmp_path / "out" / "ml-latest-small"
    assert [item for item, _ in read_images(folder / f"{folder.name}.image")] == ["302"]
    assert "items with image: 1" in capsys.readouterr().out
    assert "--posters posters" in (folder / "README.md").read_text()


def test_lines_that_cannot_be_read_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files_1m(tmp_path)
    broken = ["", "1::2", "1::2::x::3", "1::2::nan::3", "1::2::3::-4", "::2::3::4", "1::2::3::4.5"]
    broken += [f"1::2::3::{1 << 64}", f"1::2::3::{'9' * 5000}", "1::2::1e39::4", "1::2::inf::4"]
    with (tmp_path / "ratings.dat").open("a") as file:
        file.write("\n".join(broken) + "\n")
    with (tmp_path / "movies.dat").open("a") as file:
        file.write("broken\n")
    assert make(tmp_path, tmp_path / "out", "1m") == 0
    assert len(interactions(tmp_path / "out" / "ml-1m")) == 2
    said = capsys.readouterr().out
    assert "left out, ratings that cannot be read: 10" in said
    assert "left out, movies that cannot be read: 1" in said


def test_ids_cannot_leave_the_folder_of_posters(tmp_path: Path) -> None:
    (tmp_path / "posters").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "x.jpg")
    ratings = f"1::../x::5::1\n1::{'9' * 300}::5::1\n"
    (tmp_path / "ratings.dat").write_text(ratings)
    (tmp_path / "movies.dat").write_text("../x::X::Drama\n")
    posters = tmp_path / "posters"
    assert make(tmp_path, tmp_path / "out", "1m", f"--posters={posters}") == 0
    assert not (tmp_path / "out" / "ml-1m" / "images").exists()


def test_mistakes_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make(tmp_path, tmp_path / "out", "1m") == 1
    assert "has no ratings.dat: download ml-1m.zip from https://" in capsys.readouterr().err
    files_1m(tmp_path)
    assert make(tmp_path, tmp_path / "out", "1m", "--posters=nowhere") == 1
    assert "there is no folder nowhere" in capsys.readouterr().err
    (tmp_path / "ratings.dat").write_text("nothing\n")
    assert make(tmp_path, tmp_path / "out", "1m") == 1
    assert "has no rating of user, movie, rating and time" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_quote_that_does_not_close_costs_no_other_line(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    files_latest(raw)
    movies = 'movieId,title,genres\n242,"Kolya,Comedy\n302,Am\xe9lie,Drama\n'
    (raw / "movies.csv").write_text(movies, encoding="utf-8")
    assert make(raw, tmp_path / "out", "latest-small") == 0
    folder = tmp_path / "out" / "ml-latest-small"
    _, rows = read_text(folder / "ml-latest-small.text")
    assert dict(rows)["302"] == ["Am\xe9lie", "Drama"]

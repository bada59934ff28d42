"""Each converter from nothing: its files come from a server on this machine."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from dataset_tools.__main__ import main
from recbole_mm.data.atomic import read_images, read_table
from tests.dataset_tools.amazon_files import PRODUCTS_2014, REVIEWS
from tests.dataset_tools.shop_server import Shop, open_shop, picture


@pytest.fixture
def shop() -> Iterator[Shop]:
    with open_shop() as shop:
        yield shop


def make(shop: Shop, place: Path, *words: str) -> int:
    where = [f"--raw_dir={place / 'raw'}", f"--out={place / 'dataset'}", "--min_inter=1"]
    return main([*words, *where, "--force", f"--mirror={shop.url('/')}"])


def interactions(folder: Path) -> int:
    return len(list(read_table(folder / f"{folder.name}.inter")[1]))


def zipped(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return out.getvalue()


RATINGS = b"userId,movieId,rating,timestamp\n1,7,4.0,100\n1,8,3.5,101\n2,7,5.0,99\n"
MOVIES = b'movieId,title,genres\n7,"Heat (1995)",Crime|Drama\n8,Babe (1995),Comedy\n'


def test_amazon(shop: Shop, tmp_path: Path) -> None:
    lines = ["\n".join(map(json.dumps, REVIEWS)), "\n".join(map(str, PRODUCTS_2014))]
    names = ["/reviews_Beauty_5.json.gz", "/meta_Beauty.json.gz"]
    shop.answers = {
        name: gzip.compress(text.encode()) for name, text in zip(names, lines, strict=True)
    }
    assert make(shop, tmp_path, "amazon2014", "--category=Beauty") == 0
    assert interactions(tmp_path / "dataset" / "amazon-beauty") == len(REVIEWS)
    assert make(shop, tmp_path, "amazon2014", "--category=Beauty") == 0
    assert dict(shop.asked) == dict.fromkeys(names, 1)  # what is there is taken


def test_movielens_with_its_checksum(
    shop: Shop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = zipped({
        "ml-latest-small/": b"",
        "ml-latest-small/ratings.csv": RATINGS,
        "ml-latest-small/movies.csv": MOVIES,
        "ml-latest-small/tags.csv": b"",
    })  # fmt: skip
    shop.answers = {"/ml-latest-small.zip": archive, "/ml-latest-small.zip.md5": b"0" * 32}
    assert make(shop, tmp_path, "movielens", "--variant=latest-small") == 1
    assert "checksum is not the one" in capsys.readouterr().err
    digest = hashlib.md5(archive).hexdigest()
    shop.answers["/ml-latest-small.zip.md5"] = f"{digest}  ml-latest-small.zip".encode()
    assert make(shop, tmp_path, "movielens", "--variant=latest-small") == 0
    assert interactions(tmp_path / "dataset" / "ml-latest-small") == 3
    assert not (tmp_path / "raw" / "ml-latest-small" / "tags.csv").exists()  # nobody asked for it


def test_an_archive_that_is_there_needs_no_network(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    archive = zipped({"ml-latest-small/ratings.csv": RATINGS, "ml-latest-small/movies.csv": MOVIES})
    (tmp_path / "raw" / "ml-latest-small.zip").write_bytes(archive)
    where = [f"--raw_dir={tmp_path / 'raw'}", f"--out={tmp_path}", "--min_inter=1"]
    assert main(["movielens", "--variant=latest-small", *where, "--no-download"]) == 0
    assert interactions(tmp_path / "ml-latest-small") == 3


def test_microlens_with_covers(shop: Shop, tmp_path: Path) -> None:
    shop.answers = {
        "/MicroLens-50k_pairs.csv": b"user,item,timestamp\n1,7,100\n1,8,101\n",
        "/MicroLens-50k_titles.csv": b"item,title\n7,Seven\n8,Eight\n",
        "/MicroLens-50k_covers.zip": zipped(
            {"MicroLens-50k_covers/7.jpg": picture(7, form="JPEG")}
        ),
    }
    assert make(shop, tmp_path, "microlens", "--variant=50k") == 0
    folder = tmp_path / "dataset" / "microlens-50k"
    assert interactions(folder) == 2
    assert [item for item, _ in read_images(folder / "microlens-50k.image")] == ["7"]
    assert make(shop, tmp_path, "microlens", "--variant=50k", "--no-images") == 0
    assert set(shop.asked.values()) == {1}


def test_microlens_under_other_names(
    shop: Shop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shop.answers = {"/MicroLens-100k_pairs.tsv": b"1\t7 8\n"}
    words = ("microlens", "--variant=100k", "--no-images")
    assert make(shop, tmp_path, *words) == 1
    assert "MicroLens-100k_title.csv cannot be downloaded: status 404" in capsys.readouterr().err
    shop.answers["/MicroLens-100k_title_en.csv"] = b"item,title\n7,Seven\n8,Eight\n"
    assert make(shop, tmp_path, *words) == 0
    assert interactions(tmp_path / "dataset" / "microlens-100k") == 2


def test_what_is_nowhere_is_one_sentence(
    shop: Shop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make(shop, tmp_path, "amazon2018", "--category=Video_Games") == 1
    said = capsys.readouterr().err
    assert "Video_Games_5.json.gz cannot be downloaded: status 404" in said
    assert "put the file there yourself" in said
    shop.answers = {"/ml-1m.zip": zipped({"ml-1m/README": b""})}
    shop.answers["/ml-1m.zip.md5"] = hashlib.md5(shop.answers["/ml-1m.zip"]).hexdigest().encode()
    assert make(shop, tmp_path, "movielens", "--variant=1m") == 1
    assert "ml-1m.zip has no ratings.dat" in capsys.readouterr().err

"""Amazon's releases: small files in each one's real format, and what strangers write in them."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest

from recbole_mm.data.atomic import read_table

from .amazon_files import DAY, PRODUCTS_2014, REVIEWS, interactions, make, pack, review, texts


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """The release of 2014."""
    pack(tmp_path / "raw" / "reviews_Beauty_5.json.gz", REVIEWS)
    pack(tmp_path / "raw" / "meta_Beauty.json.gz", PRODUCTS_2014)
    return tmp_path / "raw"


# --- the formats ---
def test_2014(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make(raw, tmp_path / "out", "amazon2014", "Beauty", "--min_inter=2") == 0
    folder = tmp_path / "out" / "amazon-beauty"
    rows = interactions(folder)
    assert [row[:2] for row in rows[:3]] == [["u1", "a"], ["u1", "b"], ["u1", "c"]]
    assert rows[0][2:] == [str(DAY), "5"]
    assert len(rows) == 9  # d is too rare
    found = texts(folder)
    assert found["a"] == {
        "title": "Nail's polish", "price": "3.5", "brand": "OPI",
        "categories": "Beauty > Nails", "description": None,
    }  # fmt: skip
    assert found["b"]["description"] == "Soft."
    assert found["b"]["title"] is None
    assert set(found) == {"a", "b"}
    said = capsys.readouterr().out
    assert "items without a record in meta_Beauty.json.gz: 1" in said
    assert (
        "python -m dataset_tools amazon2014 --category Beauty --raw_dir raw --min_inter 2"
        in (folder / "README.md").read_text()
    )
    assert str(tmp_path) not in (folder / "README.md").read_text()


def test_2018_unpacked(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    product = {
        "asin": "a", "title": "Brush", "brand": "", "price": "$4.99", "category": ["Arts", "Paint"],
        "description": ["One.", "Two."], "imageURLHighRes": ["https://x/a.jpg"],
    }  # fmt: skip
    pack(raw / "Arts_Crafts_and_Sewing_5.json", REVIEWS)
    pack(raw / "meta_Arts_Crafts_and_Sewing.json", [product])
    out = tmp_path / "out"
    assert make(raw, out, "amazon2018", "Arts_Crafts_and_Sewing", "--min_inter=2") == 0
    assert texts(out / "amazon2018-arts")["a"] == {
        "title": "Brush", "price": "$4.99", "brand": None, "categories": "Arts > Paint",
        "description": "One.\nTwo.",
    }  # fmt: skip


def test_2023(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    reviews = [
        {"user_id": user, "parent_asin": item, "asin": f"{item}-red", "rating": 4.0,
         "timestamp": 1_588_687_728_923 + n, "verified_purchase": True}
        for n, (user, item) in enumerate((u, i) for i in "ab" for u in ("u1", "u2"))
    ]  # fmt: skip
    product = {
        "parent_asin": "a", "title": "Game", "store": "Studio", "price": None,
        "categories": ["Video Games", "PC"], "description": [], "features": ["Fun"],
        "images": [{"large": "https://x/a.jpg", "variant": "MAIN"}],
    }  # fmt: skip
    pack(raw / "Video_Games.jsonl.gz", reviews)
    pack(raw / "meta_Video_Games.jsonl.gz", [product])
    out = tmp_path / "out"
    assert make(raw, out, "amazon2023", "Video_Games", "--min_inter=2") == 0
    folder = out / "amazon2023-games"
    assert interactions(folder)[0] == ["u1", "a", "1588687728", "4"]
    assert texts(folder)["a"]["brand"] == "Studio"
    assert texts(folder)["a"]["price"] is None


# --- order and filters ---
def test_equal_days_keep_the_order_of_the_file(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    order = ["c", "a", "b"]
    reviews = [review(user, item, 1) for user in ("u2", "u1") for item in order]
    pack(raw / "reviews_Beauty_5.json.gz", [*reviews, review("u1", "a", 0), review("u2", "a", 0)])
    pack(raw / "meta_Beauty.json.gz", [])
    assert make(raw, tmp_path, "amazon2014", "Beauty", "--min_inter=1") == 0
    rows = interactions(tmp_path / "amazon-beauty")
    assert [row[0] for row in rows] == ["u2"] * 4 + ["u1"] * 4
    assert [row[1] for row in rows] == ["a", *order] * 2


def test_products_can_be_required_to_say_something(raw: Path, tmp_path: Path) -> None:
    flags = ("--min_inter=1", "--require=title,brand")
    assert make(raw, tmp_path, "amazon2014", "Beauty", *flags) == 0
    assert {row[1] for row in interactions(tmp_path / "amazon-beauty")} == {"a"}
    flags = ("--min_inter=1", "--max_title=12", "--name=short")
    assert make(raw, tmp_path, "amazon2014", "Beauty", *flags) == 0
    assert {row[1] for row in interactions(tmp_path / "short")} == {"b", "c", "d"}


@pytest.mark.parametrize(
    ("command", "core", "everything", "meta"),
    [
        ("amazon2014", "reviews_Beauty_5.json.gz", "reviews_Beauty.json.gz", "meta_Beauty.json.gz"),
        ("amazon2018", "Beauty_5.json.gz", "Beauty.json", "meta_Beauty.json.gz"),
    ],
)
def test_all_reviews_or_those_of_the_5_core(
    tmp_path: Path, command: str, core: str, everything: str, meta: str
) -> None:
    raw = tmp_path / "raw"
    pack(raw / core, REVIEWS[:4])
    pack(raw / everything, REVIEWS)
    pack(raw / meta, PRODUCTS_2014)
    name = "amazon-beauty" if command == "amazon2014" else "amazon2018-beauty"
    for flags, rows, file in (((), 4, core), (("--all_reviews", "--force"), 10, everything)):
        assert make(raw, tmp_path, command, "Beauty", "--min_inter=1", *flags) == 0
        assert len(interactions(tmp_path / name)) == rows
        card = (tmp_path / name / "README.md").read_text()
        assert f"read from {file} and {meta}" in card
        assert ("--all_reviews" in card) == bool(flags)
    (raw / everything).unlink()
    assert make(raw, tmp_path, command, "Beauty", "--all_reviews", "--force") == 1


def test_a_limit_reads_no_further(raw: Path, tmp_path: Path) -> None:
    assert make(raw, tmp_path, "amazon2014", "Beauty", "--min_inter=1", "--limit=4") == 0
    assert len(interactions(tmp_path / "amazon-beauty")) == 4
    card = (tmp_path / "amazon-beauty" / "README.md").read_text()
    assert "--min_inter 1 --limit 4" in card
    assert "read from reviews_Beauty_5.json.gz and meta_Beauty.json.gz" in card


def test_ratings_that_are_missing_leave_the_column_out(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    pack(raw / "reviews_Beauty_5.json.gz", [*REVIEWS, review("u1", "a", 9, overall=None)])
    pack(raw / "meta_Beauty.json.gz", PRODUCTS_2014)
    assert make(raw, tmp_path, "amazon2014", "Beauty", "--min_inter=1") == 0
    header, _ = read_table(tmp_path / "amazon-beauty" / "amazon-beauty.inter")
    assert [name for name, _ in header] == ["user_id", "item_id", "timestamp"]


@pytest.mark.parametrize("overall", ["1e39", "-1e39", "1" + "0" * 400, "1e999", "NaN"])
def test_ratings_that_nothing_holds_are_not_known(tmp_path: Path, overall: str) -> None:
    odd = json.dumps(review("u1", "b", 2)).replace('"overall": 5.0', f'"overall": {overall}')
    pack(tmp_path / "raw" / "reviews_Beauty_5.json.gz", [review("u1", "a", 1), odd])
    pack(tmp_path / "raw" / "meta_Beauty.json.gz", [])
    assert make(tmp_path / "raw", tmp_path, "amazon2014", "Beauty", "--min_inter=1") == 0
    assert interactions(tmp_path / "amazon-beauty")[1] == ["u1", "b", str(2 * DAY)]


def test_ratings_are_written_as_they_came(tmp_path: Path) -> None:
    """They wait as float32."""
    raw = tmp_path / "raw"
    stars = [5.0, 3.7, 0.1, 4]
    reviews = [review("u", f"i{n}", n, overall=star) for n, star in enumerate(stars)]
    pack(raw / "reviews_Beauty_5.json.gz", reviews)
    pack(raw / "meta_Beauty.json.gz", [])
    assert make(raw, tmp_path, "amazon2014", "Beauty", "--min_inter=1") == 0
    assert [row[3] for row in interactions(tmp_path / "amazon-beauty")] == ["5", "3.7", "0.1", "4"]


# --- what strangers write ---
HOSTILE = [
    "no record at all",
    "[1, 2]",
    "__import__('os').system('touch hacked')",
    {"reviewerID": "u1", "asin": "a"},
    review("", "a", 1),
    review("u1", "a", 1, unixReviewTime="yesterday"),
    review("u1", "a", 1, unixReviewTime=-5),
    review("u1", "a", 1, unixReviewTime=True),
    review("u1", "a", 1, asin=["a"]),
    "{'asin': " + "(" * 300 + ")" * 300 + "}",
    "",
]


def test_lines_that_are_no_reviews_are_counted_and_passed_over(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    pack(raw / "reviews_Beauty_5.json.gz", [*HOSTILE, *REVIEWS])
    assert make(raw, tmp_path, "amazon2014", "Beauty", "--min_inter=2") == 0
    assert len(interactions(tmp_path / "amazon-beauty")) == 9
    said = capsys.readouterr().out
    assert "left out, neither JSON nor a Python literal: 3" in said
    assert "left out, no record of named values: 1" in said
    assert "left out, reviews without user, item or time: 6" in said
    assert not (tmp_path / "hacked").exists()


ODD = [
    "../../x",
    "NA",
    "x" * 300,
    'q"uote',
    "tab\tbed",
    "\u202egnp",
    "\ud800",
    "[PAD]",
    "/etc/passwd",
]


def test_odd_ids_and_texts_come_through(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    pack(raw / "reviews_Beauty_5.json.gz", [review(u, i, 1) for u in ODD for i in ODD])
    pack(raw / "meta_Beauty.json.gz", [{"asin": i, "title": f"{i}\n\x00"} for i in ODD])
    assert make(raw, tmp_path, "amazon2014", "Beauty", "--min_inter=1") == 0
    rows = interactions(tmp_path / "amazon-beauty")
    assert len(rows) == len(ODD) ** 2
    tokens = {row[1] for row in rows}
    assert len(tokens) == len(ODD)
    assert set(texts(tmp_path / "amazon-beauty")) == tokens
    assert sorted(path.name for path in tmp_path.iterdir()) == ["amazon-beauty", "raw"]


def test_of_two_records_of_a_product_the_first_counts(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pack(raw / "meta_Beauty.json.gz", [*PRODUCTS_2014, {"asin": "a", "title": "Other"}])
    assert make(raw, tmp_path, "amazon2014", "Beauty", "--min_inter=2") == 0
    assert texts(tmp_path / "amazon-beauty")["a"]["title"] == "Nail's polish"
    assert "left out, products that have a record already: 1" in capsys.readouterr().out


@pytest.mark.parametrize("price", [float("nan"), 10**400])
def test_odd_values_of_a_product_are_missing_ones(raw: Path, tmp_path: Path, price: float) -> None:
    odd = {
        "asin": "a", "title": ["x"], "price": price, "brand": {"name": "y"},
        "categories": "Beauty", "description": [1, None],
    }  # fmt: skip
    pack(raw / "meta_Beauty.json.gz", [odd])
    assert make(raw, tmp_path, "amazon2014", "Beauty", "--min_inter=2") == 0
    assert set(texts(tmp_path / "amazon-beauty")["a"].values()) == {None}


# --- broken files ---
def test_a_file_cut_off_is_no_dataset(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = raw / "reviews_Beauty_5.json.gz"
    path.write_bytes(path.read_bytes()[:-12])
    assert make(raw, tmp_path) == 1
    said = capsys.readouterr().err
    assert "cannot be unpacked" in said
    assert re.search(r"delete \S+ and give the command again", said)
    path.write_bytes(b"<html>503</html>")
    assert make(raw, tmp_path) == 1
    assert "is no gzip file" in capsys.readouterr().err
    assert not (tmp_path / "amazon-beauty").exists()


def test_a_bomb_is_given_up_early(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A gibibyte of line breaks in a megabyte."""
    megabyte = gzip.compress(b"\n" * (1 << 20))
    (raw / "reviews_Beauty_5.json.gz").write_bytes(megabyte * 1024)
    assert make(raw, tmp_path) == 1
    assert "unpacks to more than 200 times its size" in capsys.readouterr().err


def test_a_line_without_end_costs_no_memory(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng_text = "".join(f"{n * 7919 % 100_003:x}" for n in range(700_000))  # hard to pack
    long = '{"reviewerID": "' + rng_text + '"}'
    assert len(long) > 2 << 20
    pack(raw / "reviews_Beauty_5.json.gz", [long, *REVIEWS])
    assert make(raw, tmp_path, "amazon2014", "Beauty", "--min_inter=2") == 0
    assert len(interactions(tmp_path / "amazon-beauty")) == 9
    assert "left out, longer than a megabyte: 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("category", "flags", "says"),
    [
        ("Beaty", (), "download reviews_Beaty_5.json.gz from https://jmcauley"),
        ("../Beauty", (), "write it as the source does"),
        ("Beauty", ("--require=titel",), "'titel' is none of title, price"),
        ("Beauty", ("--min_inter=99",), "leaves no interaction"),
        ("Beauty", ("--min_inter=x",), "give N, or U,I"),
    ],
)
def test_mistakes_are_one_sentence(
    raw: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    category: str,
    flags: tuple[str, ...],
    says: str,
) -> None:
    assert make(raw, tmp_path, "amazon2014", category, *flags) == 1
    said = capsys.readouterr().err
    assert says in said
    assert "Traceback" not in said


def test_a_file_without_reviews(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pack(raw / "reviews_Beauty_5.json.gz", [{"something": "else"}])
    assert make(raw, tmp_path) == 1
    assert "has no review with reviewerID, asin and unixReviewTime" in capsys.readouterr().err

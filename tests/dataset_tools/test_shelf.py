"""What is put aside on disk: it comes back whole, costs no memory, and leaves nothing behind."""

from __future__ import annotations

import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from dataset_tools.shelf import Shelf
from dataset_tools.write import Item
from recbole_mm.errors import UserError

from .amazon_files import make, pack, review

NAMES = ("price", "title")
HARD: list[list[str | None]] = [
    ["tab\t and\nbreak", "\ud800 \u2028 \x00 💄"],
    [None, '"quoted" \\N'],
    ["", None],
    ["9", "x" * 100_000],
]


def test_records_come_back_in_the_order_they_were_put(tmp_path: Path) -> None:
    with Shelf(tmp_path, NAMES, 9) as shelf:
        for item, values in zip((7, 0, 3, 5), HARD, strict=True):
            assert shelf.put(item, values, ["http://x/1", "http://x/2"] if item == 3 else [])
        assert not shelf.put(3, ["again", "again"])
        shelf.show(8)
        assert list(shelf.items({5: "five", 3: "three", 7: "seven", 8: "eight"})) == [
            Item("seven", HARD[0], []),
            Item("three", HARD[2], ["http://x/1", "http://x/2"]),
            Item("five", HARD[3], []),
        ]
        assert [i for i in range(9) if shelf.has()[i]] == [0, 3, 5, 7]
        assert [i for i in range(9) if shelf.has("price")[i]] == [5, 7]
        assert [i for i in range(9) if shelf.has("title")[i]] == [0, 5, 7]
        assert [i for i in range(9) if shelf.has("image")[i]] == [8]
        assert shelf.title_lengths.tolist() == [11, 0, 0, 0, 0, 100_000, 0, 7, 0]


def fail_half_way(place: Path, root: Path, held: list[Shelf]) -> None:
    with Shelf(place, NAMES, 1) as shelf:
        held.append(shelf)
        shelf.put(0, HARD[3])
        assert list(root.iterdir()) == []
        raise ZeroDivisionError


def test_its_file_is_nowhere_to_be_seen_and_closed_by_an_error(tmp_path: Path) -> None:
    held: list[Shelf] = []
    with pytest.raises(ZeroDivisionError):
        fail_half_way(tmp_path / "not" / "yet" / "there", tmp_path, held)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="closed file"):
        list(held[0].items({0: "a"}))


def test_a_place_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file cannot be written to: Not a directory"):
        Shelf(tmp_path / "file" / "datasets", NAMES, 1)


def shop(raw: Path, length: int) -> Path:
    """2,000 products and as many reviews with texts of so many letters, which hardly pack."""
    rng = random.Random(0)

    def text() -> str:
        return rng.randbytes(length // 2).hex()

    reviews: list[Any] = [
        review(f"u{n % 300}", f"i{n % 2_000}", n, reviewText=text()) for n in range(2_000)
    ]
    products: list[Any] = [
        {"asin": f"i{n}", "title": f"Title {n}", "description": text()} for n in range(2_000)
    ]
    pack(raw / "reviews_Beauty_5.json.gz", reviews)
    pack(raw / "meta_Beauty.json.gz", products)
    return raw


def test_memory_does_not_grow_with_the_texts(tmp_path: Path) -> None:
    """Ten times as long texts are 11 megabytes more to read, half of them to write."""
    flags = ("amazon2014", "Beauty", "--min_inter=1,1", "--force")
    peaks = []
    for length in (300, 300, 3_000):  # the first time, modules are imported
        raw = shop(tmp_path / "raw", length)
        tracemalloc.start()
        try:
            assert make(raw, tmp_path / "out", *flags) == 0
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    folder = tmp_path / "out" / "amazon-beauty"
    assert (folder / "amazon-beauty.text").stat().st_size > 6_000_000
    assert peaks[2] - peaks[1] < 1_000_000

"""Addresses of pictures in each release's form, and what sellers write there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from recbole_mm.data.atomic import read_urls

from .amazon_files import DAY, make, pack, review

H, L = "https://m.media-amazon.com/images/I/", "http://ecx.images-amazon.com/images/I/"
UNUSABLE = "left out, addresses of pictures that cannot be ones: {}"


def files_2014(raw: Path, products: list[Any]) -> tuple[str, str, str]:
    """Products as Python's literals."""
    pack(raw / "reviews_Beauty_5.json.gz", [review("u", item, 1) for item in "abc"])
    pack(raw / "meta_Beauty.json.gz", [repr(product) for product in products])
    return "amazon2014", "Beauty", "amazon-beauty"


def files_2018(raw: Path, products: list[Any]) -> tuple[str, str, str]:
    pack(raw / "Video_Games_5.json.gz", [review("u", item, 1) for item in "abc"])
    pack(raw / "meta_Video_Games.json.gz", products)
    return "amazon2018", "Video_Games", "amazon2018-games"


def files_2023(raw: Path, products: list[Any]) -> tuple[str, str, str]:
    reviews = [
        {"user_id": "u", "parent_asin": item, "rating": 5.0, "timestamp": DAY * 1000}
        for item in "abc"
    ]
    pack(raw / "Baby_Products.jsonl.gz", reviews)
    pack(raw / "meta_Baby_Products.jsonl.gz", products)
    return "amazon2023", "Baby_Products", "amazon2023-baby"


def urls(tmp_path: Path, files: Any, products: list[Any], *flags: str) -> list[tuple[str, str]]:
    command, category, name = files(tmp_path / "raw", products)
    assert make(tmp_path / "raw", tmp_path, command, category, "--min_inter=1", *flags) == 0
    path = tmp_path / name / f"{name}.urls"
    return list(read_urls(path)) if path.exists() else []


def said(tmp_path: Path) -> str:
    [card] = tmp_path.glob("*/README.md")
    return card.read_text()


def sized(variant: Any, **sizes: Any) -> dict[str, Any]:
    return {"thumb": f"{H}t.jpg", "large": f"{H}l.jpg", "variant": variant, **sizes}


def test_2014_has_one(tmp_path: Path) -> None:
    products = [
        {"asin": "b", "imUrl": f"{L}b.jpg"},
        {"asin": "a", "imUrl": f"{L}41%2B._SY300_.jpg"},
        {"asin": "c"},
    ]
    assert urls(tmp_path, files_2014, products) == [
        ("b", f"{L}b.jpg"),
        ("a", f"{L}41%2B._SY300_.jpg"),
    ]
    assert "items with address of a picture: 2 (66.7 %)" in said(tmp_path)
    assert UNUSABLE.format("") not in said(tmp_path)


def test_2014_has_signs_that_there_is_no_picture(tmp_path: Path) -> None:
    icons = "http://g-ecx.images-amazon.com/images/G/01/x-site/icons"
    products = [
        {"asin": "a", "imUrl": f"{icons}/no-img-sm._CB192198896_.gif"},
        {"asin": "b", "imUrl": f"{L}b.jpg?after=no-img"},
        {"asin": "c", "imUrl": "http://no-img.example/c.jpg"},
    ]
    assert urls(tmp_path, files_2014, products) == [
        ("b", f"{L}b.jpg?after=no-img"),
        ("c", "http://no-img.example/c.jpg"),
    ]
    assert UNUSABLE.format("") not in said(tmp_path)
    assert "items with address of a picture: 2 (66.7 %)" in said(tmp_path)


def test_2018_has_lists_of_the_same_ones_large_and_small(tmp_path: Path) -> None:
    """Of each picture one address, else `--per_item 2` would fetch one photo twice."""
    small, large = [f"{H}{n}._SS40_.jpg" for n in (1, 2, 3)], [f"{H}1.jpg", None]
    products = [
        {"asin": "a", "imageURL": small, "imageURLHighRes": large},
        {"asin": "b", "imageURL": [*small, small[0]], "imageURLHighRes": []},
        {"asin": "c", "imageURL": [], "imageURLHighRes": []},
    ]
    assert urls(tmp_path, files_2018, products) == [
        *(("a", url) for url in [large[0], *small[1:]]),
        *(("b", url) for url in small),
    ]


def test_2023_has_sizes_and_a_main_one(tmp_path: Path) -> None:
    products = [
        {
            "parent_asin": "a",
            "images": [
                sized("PT01", hi_res=f"{H}2h.jpg"),
                sized("PT02", hi_res=None, large=f"{H}3l.jpg"),
                sized("MAIN", hi_res=f"{H}1h.jpg"),
            ],
        },
        {"parent_asin": "b", "images": [sized("MAIN", hi_res=None, large=None)]},
        {"parent_asin": "c", "images": []},
    ]
    assert urls(tmp_path, files_2023, products) == [
        ("a", f"{H}1h.jpg"),
        ("a", f"{H}2h.jpg"),
        ("a", f"{H}3l.jpg"),
    ]
    assert UNUSABLE.format("") not in said(tmp_path)


def test_no_images(tmp_path: Path) -> None:
    assert urls(tmp_path, files_2014, [{"asin": "a", "imUrl": f"{L}a.jpg"}], "--no-images") == []
    assert not list(tmp_path.glob("*/*.urls"))
    assert "address of a picture" not in said(tmp_path)
    assert "--no-images" in said(tmp_path)


def test_without_an_address_there_is_no_file(tmp_path: Path) -> None:
    assert urls(tmp_path, files_2014, [{"asin": "a"}]) == []
    assert not list(tmp_path.glob("*/*.urls"))


def test_products_that_nobody_took_or_told_twice_count_for_nothing(tmp_path: Path) -> None:
    products = [
        {"asin": "a", "imUrl": f"{L}a.jpg"},
        {"asin": "a", "imUrl": "file:///etc/passwd"},
        {"asin": "zzz", "imUrl": "file:///etc/passwd"},
    ]
    assert urls(tmp_path, files_2014, products) == [("a", f"{L}a.jpg")]
    assert UNUSABLE.format("") not in said(tmp_path)


HOSTILE = [
    "file:///etc/passwd",
    "ftp://x/a.jpg",
    "javascript:alert(1)",
    "data:image/png;base64,AAAA",
    "//x/a.jpg",
    "a.jpg",
    f"{H}a b.jpg",
    f" {H}a.jpg",
    f"{H}a.jpg\n",
    f"{H}a\t.jpg",
    f"{H}a\x00.jpg",
    f"{H}\u202egpj.exe",
    f"{H}\u2028.jpg",
    f"{H}\ud800.jpg",
    H + "x" * 2_000,
    "https://",
    7,
    True,
    [f"{H}a.jpg"],
    {"url": f"{H}a.jpg"},
]


@pytest.mark.parametrize("bad", HOSTILE)
def test_what_is_no_address_is_counted_and_left_out(tmp_path: Path, bad: Any) -> None:
    good = f"{H}good.jpg"
    cases: list[tuple[Any, list[Any]]] = [
        (files_2014, [{"asin": "a", "imUrl": bad}, {"asin": "b", "imUrl": good}]),
        (
            files_2018,
            [{"asin": "a", "imageURLHighRes": [bad]}, {"asin": "b", "imageURL": [bad, good]}],
        ),
        (
            files_2023,
            [
                {"parent_asin": "a", "images": [sized("MAIN", hi_res=bad, large=bad)]},
                {"parent_asin": "b", "images": [sized("MAIN", hi_res=bad, large=good)]},
            ],
        ),
    ]
    for number, (files, products) in enumerate(cases):
        place = tmp_path / f"{number}"
        assert urls(place, files, products) == [("b", good)]
        assert UNUSABLE.format(number + 1) in said(place)
        assert "items with address of a picture: 1 (33.3 %)" in said(place)


@pytest.mark.parametrize("odd", ["x", 7, None, {}, {"large": [f"{H}a.jpg"]}, [None, "", 0, [], {}]])
def test_fields_of_other_forms_hold_no_pictures(tmp_path: Path, odd: Any) -> None:
    """The first is no address in 2014, whose field holds text."""
    for number, (files, field) in enumerate(
        [(files_2018, "imageURL"), (files_2018, "imageURLHighRes"), (files_2023, "images")]
    ):
        key = "parent_asin" if field == "images" else "asin"
        assert urls(tmp_path / f"{number}", files, [{key: "a", field: odd}]) == []
        assert UNUSABLE.format("") not in said(tmp_path / f"{number}")

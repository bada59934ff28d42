"""A dataset of another one: what is left, and what is carried over."""

from __future__ import annotations

from pathlib import Path

import pytest

from dataset_tools.__main__ import main
from recbole_mm.data.atomic import (
    read_images,
    read_table,
    read_text,
    read_urls,
    write_images,
    write_table,
    write_text,
    write_urls,
)
from tests.dataset_tools.shop_server import picture


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """Three users took a, b and c, and u1 took d; c's picture is gone, d has no text."""
    folder = tmp_path / "dataset" / "shop"
    (folder / "images").mkdir(parents=True)
    header = ["user_id:token", "item_id:token", "timestamp:float", "rating:float"]
    rows = [
        (user, item, f"{n}.5", "4.0") for user in ("u1", "u2", "u3") for n, item in enumerate("abc")
    ]
    write_table(folder / "shop.inter", header, [*rows[:3], ("u1", "d", "9", "1"), *rows[3:]])
    write_text(
        folder / "shop.text",
        ["title", "brand"],
        [("c", ["Sea", ""]), ("a", ["A\ttab", None]), ("b", ["B", "Bee"])],
    )
    for name, number in (("a.png", 1), ("a2.png", 2), ("b.png", 3), ("d.png", 4)):
        (folder / "images" / name).write_bytes(picture(number))
    shown = [("a", "a.png"), ("a", "a2.png"), ("b", "b.png"), ("c", "gone.png"), ("d", "d.png")]
    write_images(folder / "shop.image", shown)
    write_urls(folder / "shop.urls", [("a", "https://x/a"), ("d", "https://x/d")])
    return folder


def make(shop: Path, *flags: str) -> Path:
    words = ["filter", "shop", f"--data_path={shop.parent}", f"--out={shop.parent}", "--name=new"]
    assert main([*words, *flags]) == 0
    return shop.parent / "new"


def cells(folder: Path) -> list[list[str]]:
    return [row for _, row in read_table(folder / f"{folder.name}.inter")[1]]


def test_without_a_filter_everything_stays_as_it_was(shop: Path) -> None:
    new = make(shop)
    assert (new / "new.inter").read_bytes() == (shop / "shop.inter").read_bytes()
    assert dict(read_text(new / "new.text")[1]) == {
        "c": ["Sea", ""],
        "a": ["A\ttab", None],
        "b": ["B", "Bee"],
        "d": [None, None],
    }
    assert list(read_urls(new / "new.urls")) == [("a", "https://x/a"), ("d", "https://x/d")]
    shown = [
        (item, (new / "images" / file).read_bytes())
        for item, file in read_images(new / "new.image")
    ]
    assert shown == [("a", picture(1)), ("a", picture(2)), ("b", picture(3)), ("d", picture(4))]
    card = (new / "README.md").read_text()
    assert "python -m dataset_tools filter shop --name new" in card
    assert str(shop.parent) not in card


def test_items_whose_picture_never_came_go_and_the_core_after_them(shop: Path) -> None:
    new = make(shop, "--require=image", "--min_inter=2")
    assert {row[1] for row in cells(new)} == {"a", "b"}  # c has no picture, d one interaction
    assert len(cells(new)) == 6
    assert {item for item, _ in read_images(new / "new.image")} == {"a", "b"}
    assert list(read_urls(new / "new.urls")) == [("a", "https://x/a")]


def test_attributes_and_titles_count(shop: Path) -> None:
    assert {row[1] for row in cells(make(shop, "--require=brand"))} == {"b"}
    assert {row[1] for row in cells(make(shop, "--max_title=2", "--force"))} == {"b", "d"}


def test_mistakes_get_one_sentence(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = [f"--data_path={shop.parent}", f"--out={shop.parent}"]
    assert main(["filter", "shap", "--name=new", *where]) == 1
    assert "name a dataset that is there" in capsys.readouterr().err
    assert main(["filter", "shop", "--name=shop", *where]) == 1
    assert "exists already" in capsys.readouterr().err
    assert main(["filter", "shop", "--name=new", "--require=plot", *where]) == 1
    assert "'plot' is none of title, brand, image" in capsys.readouterr().err
    assert main(["filter", "shop", "--name=new", "--min_inter=9", *where]) == 1
    assert "lower it" in capsys.readouterr().err

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
from tests.dataset_tools.shop_server import open_shop, picture


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


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A dataset of RecBole's alone: unsorted, with a label, users and items, and features."""
    folder = tmp_path / "dataset" / "shop"
    folder.mkdir(parents=True)
    header = ["label:float", "user_id:token", "item_id:token", "timestamp:float"]
    rows = [("1", "u2", "b", "10"), ("0", "u1", "a", "9"), ("1", "u2", "a", "9"),
            ("1", "u3", "z", "1"), ("1", "u2", "c", "9"), ("0", "u1", "b", "1e0")]  # fmt: skip
    write_table(folder / "shop.inter", header, rows)
    items = [("blue", "a", "Care Bath"), ("", "z", ""), ("red", "b", "x y")]
    write_table(folder / "shop.item", ["colour:token", "item_id:token", "kind:token_seq"], items)
    write_table(folder / "shop.user", ["user_id:token", "age:float"], [("u3", "7"), ("u1", "8")])
    (folder / "shop.minilm.npy").write_bytes(b"")
    return folder


def test_rows_are_sorted_by_user_and_time(plain: Path) -> None:
    assert cells(make(plain)) == [
        ["u2", "a", "9"],  # of one day as they were
        ["u2", "c", "9"],
        ["u2", "b", "10"],
        ["u1", "b", "1e0"],
        ["u1", "a", "9"],
        ["u3", "z", "1"],
    ]


def test_a_time_that_is_none(plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (plain / "shop.inter").open("a") as file:
        file.write("1\tu1\ta\tnoon\n")
    assert main(["filter", "shop", f"--data_path={plain.parent}", "--name=new"]) == 1
    assert "shop.inter, row 8, column timestamp: 'noon' is no number" in capsys.readouterr().err


def test_attributes_of_items_and_users_that_are_left_are_as_they_were(plain: Path) -> None:
    new = make(plain, "--min_inter=2,1")
    assert (new / "new.item").read_text().splitlines() == [
        "colour:token\titem_id:token\tkind:token_seq",
        "blue\ta\tCare Bath",
        "red\tb\tx y",
    ]
    assert (new / "new.user").read_text() == "user_id:token\tage:float\nu1\t8\n"
    card = (new / "README.md").read_text()
    assert "- not carried over, columns of .inter: label\n" in card
    assert "- not carried over, files: shop.minilm.npy\n" in card


def test_what_is_carried_over_whole_is_not_excused(shop: Path) -> None:
    assert "not carried over" not in (make(shop) / "README.md").read_text()


def test_what_was_fetched_is_not_fetched_again(tmp_path: Path) -> None:
    with open_shop() as server:
        server.answers = {"/a": picture(1), "/b": picture(2), "/d": picture(4)}
        folder = tmp_path / "shop"
        folder.mkdir()
        header = ["user_id:token", "item_id:token", "timestamp:float"]
        rows = [(user, item, "1") for user in ("u1", "u2") for item in ("a", "a2", "b", "c")]
        write_table(folder / "shop.inter", header, [*rows, ("u1", "d", "2")])
        addresses = {"a": "/a", "a2": "/a", "b": "/b", "c": "/gone", "d": "/d"}
        urls = [(item, server.url(path)) for item, path in addresses.items()]
        write_urls(folder / "shop.urls", urls)
        fetch = ["images", f"--data_path={tmp_path}", "--rate=0", "--allow_local"]
        assert main([*fetch, "shop"]) == 0
        asked = dict(server.asked)
        words = ["filter", "shop", "--name=new", "--min_inter=2"]
        assert main([*words, f"--data_path={tmp_path}", f"--out={tmp_path}"]) == 0
        table = (tmp_path / "new" / "new.image").read_text()
        manifest = (tmp_path / "new" / "images" / "manifest.jsonl").read_text()
        assert "/gone" in manifest
        assert "/d" not in manifest
        assert main([*fetch, "new"]) == 0
        assert dict(server.asked) == asked
    assert (tmp_path / "new" / "new.image").read_text() == table
    assert [item for item, _ in read_images(tmp_path / "new" / "new.image")] == ["a", "a2", "b"]
    assert len(list((tmp_path / "new" / "images").rglob("*.jpg"))) == 2

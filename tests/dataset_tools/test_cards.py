"""The command on a dataset's card makes the same dataset again."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from dataset_tools.__main__ import main

from .amazon_files import PRODUCTS_2014, REVIEWS, pack
from .shop_server import picture


def made_again(place: Path, *words: str) -> list[str]:
    """Makes a dataset, makes it once more by its card, compares; returns the card's words."""
    assert main([*words, f"--out={place / 'one'}"]) == 0
    [one] = (place / "one").iterdir()
    card = (one / "README.md").read_text()
    [command] = [line for line in card.splitlines() if "-m dataset_tools" in line]
    again = shlex.split(command)
    assert again[:3] == ["python", "-m", "dataset_tools"]
    assert main([*again[3:], f"--out={place / 'two'}"]) == 0
    assert contents(place / "two" / one.name) == contents(one)
    return again


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_of_a_source_with_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pack(tmp_path / "raw" / "reviews_Beauty_5.json.gz", REVIEWS)
    pack(tmp_path / "raw" / "meta_Beauty.json.gz", PRODUCTS_2014)
    (tmp_path / "an order.txt").write_text("u1 a b c d\nu2 a b c\n")
    flags = ["--category=Beauty", "--name=mine", "--min_inter=2", "--order_from=an order.txt"]
    assert "mine" in made_again(tmp_path, "amazon2014", *flags)


COLUMNS = ('item_id=the item\'s "id"', "title=a $title; & more", "timestamp=when was it")


def test_of_tables_with_odd_columns_and_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    item, title, time = (column.partition("=")[2] for column in COLUMNS)
    clicks, items = tmp_path / "Ann's clicks.tsv", tmp_path / '5" items $HOME.tsv'
    clicks.write_text(f"user\t{item}\t{time}\nu\ta\t1\nu\tb\t2\nv\ta\t1\n")
    items.write_text(f"{item}\t{title}\timage\na\tA\t1.png\nb\tB\t2.png\n")
    (tmp_path / "two photos").mkdir()
    for number in (1, 2):
        (tmp_path / "two photos" / f"{number}.png").write_bytes(picture(number))
    flags = [f"--interactions={clicks}", f"--items={items}", f"--images={tmp_path / 'two photos'}"]
    flags += [f"--columns={','.join(COLUMNS)}", "--require=title"]
    words = made_again(tmp_path, "table", "--name=shop", *flags)
    assert ",".join(COLUMNS) in words
    assert not any(str(tmp_path) in word for word in words)


def test_of_a_dataset_of_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "dataset" / "Ann's shop"
    folder.mkdir(parents=True)
    (folder / f"{folder.name}.inter").write_text(
        "user_id:token\titem_id:token\ttimestamp:float\nu\ta\t1\nu\tb\t2\nv\ta\t1\n"
    )
    made_again(tmp_path, "filter", folder.name, "--name=new", "--min_inter=1,2")

"""From anyone's tables to atomic files."""

from __future__ import annotations

import csv
import json
import re
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from dataset_tools.__main__ import main
from dataset_tools.filters import core
from dataset_tools.sources import read
from dataset_tools.table import parse_times
from recbole_mm.data.atomic import safe_token
from recbole_mm.data.content import ItemContent
from recbole_mm.data.images import ImageStore
from recbole_mm.errors import UserError
from tests.data.atomic_data import bare_config

HARD = [
    'a "quoted" title',
    '"',
    "tab\there",
    "line\nbreak\r\nand \r alone",
    "None",
    "NA",
    "null",
    "\\N",
    "\\t is no tab",
    " spaces ",
    "#hash, comma; semicolon",
    "💄🧴 日本語 é \u2028 \x85 \x0b",
    "long " * 2_000,
]


def write_csv(path: Path, header: list[str], rows: list[list[Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def write_tsv(path: Path, header: list[str], rows: list[list[Any]]) -> Path:
    lines = ["\t".join(map(str, row)) for row in [header, *rows]]
    path.write_bytes(("\n".join(lines) + "\n").encode())
    return path


def write_jsonl(path: Path, header: list[str], rows: list[list[Any]]) -> Path:
    lines = [json.dumps(dict(zip(header, row, strict=True))) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def need_pyarrow() -> Any:
    """The package, or a skip where it is absent or too new for numpy 1."""
    return pytest.importorskip("pyarrow", reason="needs [parquet]", exc_type=ImportError)


def write_parquet(path: Path, header: list[str], rows: list[list[Any]]) -> Path:
    pa = need_pyarrow()
    from pyarrow import parquet

    columns = dict(zip(header, map(list, zip(*rows, strict=True)), strict=True))
    parquet.write_table(pa.table(columns), path)
    return path


WRITERS = {
    ".csv": write_csv,
    ".tsv": write_tsv,
    ".jsonl": write_jsonl,
    ".parquet": write_parquet,
}


def make(tmp_path: Path, **flags: Any) -> Path:
    """Runs `python -m dataset_tools table` and returns the dataset's folder."""
    words = {"name": "d", "out": tmp_path / "dataset", **flags}
    assert main(["table", *(f"--{flag}={value}" for flag, value in words.items())]) == 0
    return Path(words["out"]) / words["name"]


def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, **flags: Any) -> str:
    """Runs the same, which must fail with one sentence."""
    words = {"name": "d", "out": tmp_path / "dataset", **flags}
    capsys.readouterr()
    assert main(["table", *(f"--{flag}={value}" for flag, value in words.items())]) == 1
    out = capsys.readouterr()
    assert out.out == ""
    assert out.err.startswith("Error: ")
    assert out.err.count("\n") == 1
    assert not list((tmp_path / "dataset").glob("*"))
    return out.err


def inter(folder: Path) -> list[list[str]]:
    lines = (folder / f"{folder.name}.inter").read_text(encoding="utf-8").splitlines()
    return [line.split("\t") for line in lines]


def clicks(tmp_path: Path, rows: list[list[Any]], *extra: str) -> Path:
    return write_csv(tmp_path / "clicks.csv", ["user_id", "item_id", "timestamp", *extra], rows)


def shop(tmp_path: Path) -> tuple[Path, Path]:
    """Two users, three items."""
    rows = [["b", "x", 3], ["a", "x", 9], ["b", "y", 1], ["a", "z", 2]]
    items = [["x", "Soap"], ["y", "Comb"], ["z", "Brush"], ["unsold", "Dust"]]
    return clicks(tmp_path, rows), write_csv(tmp_path / "items.csv", ["item_id", "title"], items)


@pytest.mark.parametrize("suffix", WRITERS)
def test_hard_texts_survive_from_the_table_to_the_content(suffix: str, tmp_path: Path) -> None:
    texts = [t for t in HARD if suffix != ".tsv" or not set(t) & set("\t\n")]
    ids = [f"i{n}" for n in range(len(texts))]
    rows = [[f"u{n}", item, n] for n, item in enumerate(ids)]
    table = [[item, text, text] for item, text in zip(ids, texts, strict=True)]
    items = WRITERS[suffix](tmp_path / f"items{suffix}", ["item_id", "title", "categories"], table)
    folder = make(tmp_path, interactions=clicks(tmp_path, rows), items=items)
    content = ItemContent(folder, "d", ["[PAD]", *ids])
    assert [content.text(n + 1, "title") for n in range(len(ids))] == texts
    assert [content.text(n + 1, "categories") for n in range(len(ids))] == texts


@pytest.mark.parametrize("suffix", WRITERS)
def test_all_formats_give_the_same_dataset(suffix: str, tmp_path: Path) -> None:
    write = WRITERS[suffix]
    rows = [["b", "x", "3", "4.50"], ["a", "x", "9", "1"], ["b", "y", "1", "2"]]
    interactions = write(tmp_path / f"c{suffix}", ["user", "item", "time", "rating"], rows)
    items = write(tmp_path / f"i{suffix}", ["item", "title"], [["x", "Soap"], ["y", "Comb"]])
    folder = make(tmp_path, interactions=interactions, items=items)
    assert inter(folder) == [
        ["user_id:token", "item_id:token", "timestamp:float", "rating:float"],
        ["b", "y", "1", "2"],
        ["b", "x", "3", "4.50"],
        ["a", "x", "9", "1"],
    ]
    assert (folder / "d.text").read_text() == "item_id:token\ttitle:text\nx\tSoap\ny\tComb\n"


def test_json_numbers_lists_and_nulls(tmp_path: Path) -> None:
    lines = [
        '{"item_id": 7, "title": null, "price": 4.50, "categories": [["Care", "Nails"], ["Sale"]]}',
        "",
        '{"item_id": 8, "title": "", "price": NaN, "new": true, "size": {"cm": 3}}',
    ]
    items = tmp_path / "items.jsonl"
    items.write_text("\n".join(lines))
    sequences = tmp_path / "seq.jsonl"
    sequences.write_text('{"user_id": 1, "item_ids": [8, 7, 8]}\n')
    folder = make(tmp_path, sequences=sequences, items=items)
    assert inter(folder)[1:] == [["1", "8", "1"], ["1", "7", "2"], ["1", "8", "3"]]
    assert (folder / "d.text").read_text().splitlines() == [
        "item_id:token\ttitle:text\tprice:text\tcategories:text\tnew:text\tsize:text",
        "7\t\\N\t4.50\tCare > Nails > Sale\t\\N\t\\N",
        '8\t\t\\N\t\\N\ttrue\t{"cm": "3"}',
    ]
    assert (folder / "d.item").read_text().splitlines() == [
        "item_id:token\tcategories:token_seq\tprice:float",
        "7\tCare Nails Sale\t4.50",
        "8\t\t",
    ]


def test_rows_are_sorted_by_user_and_time_and_ties_keep_their_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [[f"u{rng.integers(6)}", f"i{n}", int(rng.integers(5))] for n in range(200)]
    items = write_csv(tmp_path / "items.csv", ["item_id", "title"], [["i7", "Soap"]])
    folder = make(tmp_path, interactions=clicks(tmp_path, rows), items=items)
    users = list(dict.fromkeys(row[0] for row in rows))
    expected = [
        [str(cell) for cell in row]
        for user in users
        for row in sorted((r for r in rows if r[0] == user), key=lambda r: r[2])
    ]
    assert inter(folder)[1:] == expected


def test_sequences_keep_their_order_and_positions_are_times(tmp_path: Path) -> None:
    sequences = write_tsv(
        tmp_path / "s.tsv",
        ["user_id", "item_ids_chronological"],
        [["9", "x z  x"], ["1", "y,z, x"]],
    )
    folder = make(tmp_path, sequences=sequences, items=shop(tmp_path)[1])
    assert inter(folder)[1:] == [
        ["9", "x", "1"],
        ["9", "z", "2"],
        ["9", "x", "3"],
        ["1", "y", "1"],
        ["1", "z", "2"],
        ["1", "x", "3"],
    ]


@pytest.mark.parametrize(
    ("cell", "ids"),
    [
        ('["x", "y", "z"]', ["x", "y", "z"]),
        ("['x', 'y', 'z']", ["x", "y", "z"]),
        (' ["x","x"]  ', ["x", "x"]),
        ("[7, 8, 7]", ["7", "8", "7"]),
        ('[7, 1.50, "007"]', ["7", "1.50", "007"]),  # as it is written
        ("['7', 8]", ["7", "8"]),
        ('["red bowl", "a,b"]', ["red bowl", "a,b"]),
        ("['it\\'s', \"x' y\"]", ["it's", "x' y"]),
        ('["\\u00e9t\\u00e9"]', ["été"]),
    ],
)
@pytest.mark.parametrize("write", [write_csv, write_tsv, write_jsonl])
def test_a_sequence_may_be_written_as_a_list(
    cell: str, ids: list[str], write: Any, tmp_path: Path
) -> None:
    suffix = {write_csv: "csv", write_tsv: "tsv", write_jsonl: "jsonl"}[write]
    sequences = write(tmp_path / f"s.{suffix}", ["user_id", "item_ids"], [["u", cell], ["v", "q"]])
    items = write_csv(tmp_path / "i.csv", ["item_id", "title"], [[i, "t"] for i in {*ids, "q"}])
    folder = make(tmp_path, sequences=sequences, items=items)
    expected = [["u", safe_token(item), str(n)] for n, item in enumerate(ids, 1)]
    assert inter(folder)[1:] == [*expected, ["v", "q", "1"]]


@pytest.mark.parametrize(
    "cell",
    [
        '["x", "y"',
        "[x, y]",
        "['x' 'y']",  # as numpy prints: Python would read one id, xy
        "[1 2]",
        '["x", null]',
        '["x", ["y"]]',
        "[None]",
        "[True]",
        "[x] y",
        "[__import__('os').getcwd()]",
        "[" * 100_000,
    ],
)
def test_a_list_that_cannot_be_read_names_its_row(
    cell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [["u", '["x"]'], ["v", cell]]
    sequences = write_csv(tmp_path / "s.csv", ["user_id", "item_ids"], rows)
    told = refused(capsys, tmp_path, sequences=sequences, items=shop(tmp_path)[1])
    assert "s.csv, row 3, column 'item_ids': this is no list of item ids such as" in told


def test_an_empty_list_is_a_user_without_items(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sequences = write_csv(tmp_path / "s.csv", ["user_id", "item_ids"], [["u", "x"], ["v", "[]"]])
    told = refused(capsys, tmp_path, sequences=sequences, items=shop(tmp_path)[1])
    assert "row 3, column 'item_ids': the user has no items" in told


def test_tables_that_have_no_item_in_common_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    interactions, _ = shop(tmp_path)
    others = [["B01", "Soap", "x"], ["B02", "Comb", "y"]]
    items = write_csv(tmp_path / "other.csv", ["item_id", "title", "sku"], others)
    told = refused(capsys, tmp_path, interactions=interactions, items=items)
    assert "other.csv, column 'item_id': no item of the interactions is among its ids" in told
    assert "'B01'" in told
    assert "--columns" in told


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (["3", "10", "-1"], ["3", "10", "-1"]),
        (["964980499", " 1.5e9 ", "2.50"], ["964980499", "1.5e9", "2.50"]),
        (["2014-07-23", "1970-01-01", "1969-12-31"], ["1406073600", "0", "-86400"]),
        (["2014-07-23T18:00:00", "2014-07-23 18:00:00.25"], ["1406138400", "1406138400.25"]),
        (["2014-07-23T18:00:00+02:00", "2014-07-23T16:00:00Z"], ["1406131200", "1406131200"]),
    ],
)
def test_times(cells: list[str], expected: list[str], tmp_path: Path) -> None:
    table = read(write_csv(tmp_path / "t.csv", ["time", "x"], [[c, 1] for c in cells]))
    texts, numbers = parse_times(table, "time")
    assert texts.tolist() == expected
    order = np.argsort([float(cell) for cell in expected], kind="stable")
    assert np.argsort(numbers, kind="stable").tolist() == order.tolist()


@pytest.mark.parametrize(
    ("cells", "row"),
    [
        (["1", "2", "soon", "4"], 4),
        (["2014-07-23", "2014-07-24", "23.7.2014"], 4),
        (["2014-07-23", "2014-07-24", "1406131200"], 4),
        (["1", "2", ""], 4),
        (["nan", "nan"], 2),
        (["1", "2", "inf"], 4),
        (["2014-07-23", "2014-13-45"], 3),
    ],
)
def test_a_time_that_cannot_be_read_names_its_row(
    cells: list[str], row: int, tmp_path: Path
) -> None:
    table = read(write_csv(tmp_path / "t.csv", ["when", "x"], [[c, 1] for c in cells]))
    with pytest.raises(UserError, match=f"row {row}, column 'when'.* is no time"):
        parse_times(table, "when")


def naive_core(rows: list[tuple[str, str]], users: int, items: int) -> list[tuple[str, str]]:
    """Drops one unfit interaction at a time, in another order than ours."""
    left = list(rows)
    while True:
        of_user, of_item = Counter(u for u, _ in left), Counter(i for _, i in left)
        for place in range(len(left) - 1, -1, -1):
            user, item = left[place]
            if of_user[user] < users or of_item[item] < items:
                del left[place]
                break
        else:
            return left


@pytest.mark.parametrize("least", [(1, 1), (3, 3), (2, 5), (6, 2)])
@pytest.mark.parametrize("seed", range(3))
def test_the_core_is_that_of_a_naive_loop(least: tuple[int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = [(f"u{rng.geometric(0.05)}", f"i{rng.geometric(0.05)}") for _ in range(300)]
    expected = naive_core(rows, *least)
    assert 0 < len(expected) < 300 or least == (1, 1)
    out = core(pd.DataFrame(rows, columns=["user_id", "item_id"]), *least)
    assert list(zip(out["user_id"], out["item_id"], strict=True)) == expected


def test_min_inter_by_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [["a", "x", 1], ["a", "y", 2], ["a", "x", 3], ["b", "x", 1], ["b", "z", 2]]
    _, items = shop(tmp_path)
    flags = {"interactions": clicks(tmp_path, rows), "items": items}
    assert "leaves no interaction" in refused(capsys, tmp_path, min_inter=9, **flags)
    for wrong in ("x", "1,2,3", "-1", "", "2,"):
        assert "as in 6,5" in refused(capsys, tmp_path, min_inter=wrong, **flags)
    assert len(inter(make(tmp_path, name="all", **flags))) == 6
    assert inter(make(tmp_path, name="two", min_inter=2, **flags))[1:] == [
        ["a", "x", "1"],
        ["a", "x", "3"],
    ]
    assert len(inter(make(tmp_path, name="users", min_inter="3,0", **flags))) == 4


def test_ids_that_recbole_cannot_read_are_the_same_everywhere(tmp_path: Path) -> None:
    ids = [
        "NA",
        "None",
        'q"uote',
        "tab\t",
        "[PAD]",
        " lead",
        "a%22",
        "new\nline",
        "null",
        "💄",
        '"',
    ]
    rows = [[user, item, n] for user in ids for n, item in enumerate(ids)]
    items = [[item, f"title of {item}"] for item in [*ids, "stranger"]]
    folder = make(
        tmp_path,
        interactions=clicks(tmp_path, rows),
        items=write_csv(tmp_path / "i.csv", ["item_id", "title"], items),
    )
    from recbole.data.dataset import SequentialDataset

    from recbole_mm.data.dataset import MMSequentialDataset

    for kind in (MMSequentialDataset, SequentialDataset):
        dataset = kind(bare_config("GRU4Rec", folder))
        assert (dataset.user_num, dataset.item_num) == (len(ids) + 1, len(ids) + 1)
        tokens = dataset.field2id_token["item_id"]
        content = ItemContent(folder, "d", list(tokens))
        titles = {content.text(item, "title") for item in range(1, len(tokens))}
        assert titles == {f"title of {item}" for item in ids}
        assert content.ignored["text"] == 0


def test_recboles_models_read_the_item_file(tmp_path: Path) -> None:
    from recbole_mm.data.dataset import MMDataset

    items = [
        ["x", "Beauty > Skin Care", 'L"Oréal', "$1,200.00"],
        ["y", "NA|None", "None", "?"],
        ["z", "", "", ""],
        ["unsold", "Dust", "Dust", "1"],
    ]
    table = write_csv(tmp_path / "i.csv", ["item_id", "categories", "brand", "price"], items)
    folder = make(tmp_path, interactions=shop(tmp_path)[0], items=table)
    config = bare_config(
        "FM", folder, load_col=None, eval_args={**bare_config("BPR", None)["eval_args"]}
    )
    dataset = MMDataset(config)
    assert dataset.item_num == 4
    assert set(dataset.field2id_token["brand"]) == {"[PAD]", "LOréal", "None_"}
    words = {"[PAD]", "Beauty", "Skin_Care", "NA_", "None_"}
    assert set(dataset.field2id_token["categories"]) == words


def test_columns_are_found_by_flag_name_and_alias(tmp_path: Path) -> None:
    rows = [["u", "other", "k1", "2020-01-01", "x"]]
    interactions = write_csv(
        tmp_path / "c.csv", ["UserID", "item_id", "key", "Date", "comment"], rows
    )
    items = write_csv(
        tmp_path / "i.csv",
        ["sku", "title", "Product", "Genres", "colour"],
        [["k1", "T-1", "Soap", "Care|Bath", "red"]],
    )
    columns = "item_id=sku,item_id=key,title=Product,description=title"
    folder = make(tmp_path, interactions=interactions, items=items, columns=columns)
    assert inter(folder)[1:] == [["u", "k1", "1577836800"]]
    assert (folder / "d.text").read_text().splitlines() == [
        "item_id:token\tdescription:text\ttitle:text\tcategories:text\tcolour:text",
        "k1\tT-1\tSoap\tCare|Bath\tred",
    ]
    assert (folder / "d.item").read_text().splitlines()[1] == "k1\tCare Bath"
    assert f"--columns {columns}" in (folder / "README.md").read_text()


def pictures(folder: Path) -> None:
    folder.mkdir()
    Image.new("RGB", (8, 8), "red").save(folder / "one.jpeg")
    Image.new("RGB", (8, 8), "lime").save(folder / "two.png")
    Image.new("RGB", (8, 8), "blue").save(folder / "three", "WEBP")
    (folder / "broken.jpg").write_bytes((folder / "one.jpeg").read_bytes()[:200])
    (folder / "page.jpg").write_text("<html>404</html>")


def test_pictures_are_checked_and_copied_under_safe_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures(tmp_path / "shots")
    ids = ["CON", "con", "../b", "c", "d", "e"]
    shots = [["one.jpeg", "one.jpeg"], "two.png", "three", "broken.jpg", "gone.jpg", None]
    items = write_jsonl(
        tmp_path / "i.jsonl", ["item_id", "image"], [list(r) for r in zip(ids, shots, strict=True)]
    )
    with items.open("a") as file:
        file.write('{"item_id": "unsold", "image": "page.jpg"}\n')
    rows = [["u", item, n] for n, item in enumerate(ids)]
    folder = make(
        tmp_path, interactions=clicks(tmp_path, rows), items=items, images=tmp_path / "shots"
    )
    out = capsys.readouterr().out
    assert "items with image: 3 (50.0 %)" in out
    assert "pictures left out, broken file: 1" in out
    assert "pictures left out, absent file: 1" in out
    names = sorted(path.name for path in (folder / "images").iterdir())
    assert len({name.lower() for name in names}) == 4
    assert all(re.fullmatch(r"[0-9a-f]{16}(-\d)?\.(jpg|png|webp)", name) for name in names)
    store = ImageStore(ItemContent(folder, "d", ["[PAD]", *ids]))
    colours = [image and image.getpixel((4, 4)) for image in map(store.get, range(1, 7))]
    assert colours[3:] == [None] * 3
    for found, wanted in zip(colours, [(254, 0, 0), (0, 255, 0), (0, 0, 255)], strict=False):
        assert found is not None
        np.testing.assert_allclose(found, wanted, atol=4)


def test_pictures_lie_beside_the_items_by_default(tmp_path: Path) -> None:
    pictures(tmp_path / "shots")
    interactions, _ = shop(tmp_path)
    items = write_csv(tmp_path / "i.csv", ["item_id", "poster"], [["x", "shots/one.jpeg"]])
    folder = make(tmp_path, interactions=interactions, items=items)
    [path] = (folder / "images").iterdir()
    assert (folder / "d.image").read_text().splitlines()[1:] == [f"x\t{path.name}"]
    assert path.read_bytes() == (tmp_path / "shots" / "one.jpeg").read_bytes()


@pytest.mark.parametrize("path", ["../secret.jpg", "{root}/secret.jpg", "link.jpg", "a/../../x"])
def test_a_picture_outside_is_refused(
    path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures(tmp_path / "shots")
    shutil.copy(tmp_path / "shots" / "one.jpeg", tmp_path / "secret.jpg")
    (tmp_path / "shots" / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    interactions, _ = shop(tmp_path)
    rows = [["x", "one.jpeg"], ["y", path.format(root=tmp_path)]]
    items = write_csv(tmp_path / "i.csv", ["item_id", "image"], rows)
    images = tmp_path / "shots"
    error = refused(capsys, tmp_path, interactions=interactions, items=items, images=images)
    assert "row 3, column 'image'" in error
    assert "lies outside" in error


def test_the_summary_and_the_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    interactions, items = shop(tmp_path)
    with items.open("a") as file:
        file.write("more,\n")
    folder = make(tmp_path, interactions=interactions, items=items, min_inter=1)
    out, card = capsys.readouterr().out, (folder / "README.md").read_text()
    for line in (
        "users: 2",
        "items: 3",
        "interactions: 4 (2.00 a user, 1.33 an item)",
        "sparsity: 33.333 %",
        "items with title: 3 (100.0 %)",
        "items left out, without interaction: 2",
    ):
        assert f"  {line}\n" in out
        assert f"- {line}\n" in card
    assert "--interactions clicks.csv --items items.csv --min_inter 1" in card
    assert str(tmp_path) not in card


def test_an_item_without_a_row_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    interactions, _ = shop(tmp_path)
    items = write_csv(tmp_path / "i.csv", ["item_id", "title"], [["x", "Soap"], ["y", ""]])
    make(tmp_path, interactions=interactions, items=items)
    out = capsys.readouterr().out
    assert "items without a row in i.csv: 1" in out
    assert "items with title: 1 (33.3 %)" in out


def test_an_old_dataset_is_only_replaced_by_force(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    interactions, items = shop(tmp_path)
    flags = [f"--interactions={interactions}", f"--items={items}", f"--out={tmp_path}/o"]
    assert main(["table", "--name=d", *flags]) == 0
    clicks(tmp_path, [["new", "x", 1]])
    assert main(["table", "--name=d", *flags]) == 1
    assert "--force" in capsys.readouterr().err
    assert len(inter(tmp_path / "o" / "d")) == 5
    assert main(["table", "--name=d", *flags, "--force"]) == 0
    assert inter(tmp_path / "o" / "d")[1:] == [["new", "x", "1"]]
    assert [path.name for path in (tmp_path / "o").iterdir()] == ["d"]


@pytest.mark.parametrize("name", ["", "a/b", "..", "a b", ".hidden"])
def test_a_name_that_is_no_folder_name(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    interactions, items = shop(tmp_path)
    error = refused(capsys, tmp_path, name=name, interactions=interactions, items=items)
    assert "use letters" in error


@pytest.mark.parametrize(
    ("interactions", "items", "sentence"),
    [
        (None, "item_id\nx\n", "There is no file"),
        ("", "item_id\nx\n", "has no rows"),
        ("user_id,item_id,timestamp\n", "item_id\nx\n", "has no rows"),
        ("user_id,item,when\na,x,1\n", "item_id\nx\n", "--columns timestamp=COLUMN"),
        ("user_id,item_id,time\na,,1\n", "item_id\nx\n", "row 2, column 'item_id': an id"),
        ("user_id,item_id,time\na,x,1\n\n,x,1\n", "item_id\nx\n", "row 4, column 'user_id'"),
        ("user_id,item_id,time\na,x\n", "item_id\nx\n", "row 2: 2 cells where the header has 3"),
        (
            "user_id,item_id,time\na,x,1,2\n",
            "item_id\nx\n",
            "row 2: 4 cells where the header has 3",
        ),
        ('user_id,item_id,time\na,"x,1\n', "item_id\nx\n", "row 2: unexpected end of data"),
        ("user_id,user_id,time\na,x,1\n", "item_id\nx\n", "column name 'user_id' is empty or"),
        ("user_id,,time\na,x,1\n", "item_id\nx\n", "column name '' is empty or occurs twice"),
        ("user_id,item_id,time\na,x,soon\n", "item_id\nx\n", "row 2, column 'time': 'soon' is"),
        ("user,item,time,rating\na,x,1,good\n", "item_id\nx\n", "column 'rating': 'good' is no n"),
        ("user,item,time\na,x,1\n", "sku\nx\n", "items.csv has no column 'item_id'; it has sku"),
        ("user,item,time\na,x,1\n", "item_id,t\nx,1\ny,1\nx,1\n", "row 4, column 'item_id': 'x'"),
        ("user,item,time\na,x,1\n", "item_id,Title,title,name\nx,1,2,3\n", None),
    ],
)
def test_a_mistake_in_the_tables_is_one_sentence(
    interactions: str | None,
    items: str,
    sentence: str | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    paths = tmp_path / "clicks.csv", tmp_path / "items.csv"
    if interactions is not None:
        paths[0].write_text(interactions)
    paths[1].write_text(items)
    flags = {"interactions": paths[0], "items": paths[1]}
    if sentence is None:  # the exact name wins, others keep theirs
        make(tmp_path, **flags)
    else:
        assert sentence in refused(capsys, tmp_path, **flags)


@pytest.mark.parametrize(
    ("sequences", "sentence"),
    [
        ("user_id\titem_ids\na\tx\na\ty\n", "row 3, column 'user_id': 'a' has a row already"),
        ("user_id\titem_ids\na\tx\nb\t \n", "row 3, column 'item_ids': the user has no items"),
        ("user_id\tlist\na\tx\n", "--columns item_ids=COLUMN"),
    ],
)
def test_a_mistake_in_sequences_is_one_sentence(
    sequences: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "s.tsv"
    path.write_text(sequences)
    assert sentence in refused(capsys, tmp_path, sequences=path, items=shop(tmp_path)[1])


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ("title", "'title' is not OURS=THEIRS"),
        ("titel=title", "did you mean 'title'"),
        ("title=titel", "has a column 'titel' (did you mean 'title'?)"),
        ("timestamp=title", "has no column 'timestamp'"),
        ("timestamp=when,item_id=item_id,image=title", "second 'image'"),
    ],
)
def test_a_mistake_in_columns_is_one_sentence(
    columns: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    interactions = write_csv(tmp_path / "c.csv", ["user", "item_id", "when"], [["a", "x", 1]])
    items = write_csv(tmp_path / "i.csv", ["item_id", "title", "image"], [["x", "Soap", ""]])
    flags = {"interactions": interactions, "items": items, "columns": columns}
    assert sentence in refused(capsys, tmp_path, **flags)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("t.xlsx", b"", "ends in one of .tsv, .csv"),
        ("t.tsv", b"a\tb\n\xff\t1\n", "not UTF-8"),
        ("t.jsonl", b'{"a": 1}\n{"a"\n', "row 2: no JSON"),
        ("t.jsonl", b'{"a": 1}\n[1]\n', "row 2: each line must be one JSON object"),
        ("t.jsonl", b'{"a": ' + b"[" * 100_000, "row 1: no JSON"),
        ("t.parquet", b"PAR1 no", "no Parquet file"),
    ],
)
def test_a_file_that_is_no_table(name: str, content: bytes, sentence: str, tmp_path: Path) -> None:
    if name.endswith("parquet"):
        need_pyarrow()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        read(tmp_path / name)


def test_without_pyarrow_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"pip install 'recbole-mm\[parquet\]'"):
        read(tmp_path / "t.parquet")


def test_lines_of_windows_in_tsv(tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_bytes(b"\xef\xbb\xbfa\tb\r\n1\tx\ry\r\n2\t\r\n\r\n")
    frame = read(tmp_path / "t.tsv").frame
    assert frame.to_dict("list") == {"a": ["1", "2"], "b": ["x\ry", None]}
    assert frame.index.tolist() == [2, 3]


def test_parquet_types(tmp_path: Path) -> None:
    pa = need_pyarrow()
    from datetime import datetime

    from pyarrow import parquet

    columns = {
        "id": pa.array([1, 2**60 + 1, None]),
        "when": pa.array([datetime(2014, 7, 23, 18, 0, 0)] * 3),
        "words": pa.array([["a", None, "b"], [], None]),
        "deep": pa.array([[["a"], ["b"]], None, [[]]]),
        "flag": pa.array([True, False, None]),
    }
    parquet.write_table(pa.table(columns), tmp_path / "t.parquet")
    table = read(tmp_path / "t.parquet")
    frame = table.frame
    assert frame["id"].tolist() == ["1", "1152921504606846977", None]
    assert frame["words"].tolist() == [["a", "b"], [], None]
    assert frame["deep"].tolist() == [["a", "b"], None, []]
    assert frame["flag"].tolist() == ["true", "false", None]
    assert parse_times(table, "when")[0].tolist() == ["1406138400"] * 3


def test_help_names_every_converter(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["table", "--help"])
    assert caught.value.code == 0
    assert "--min_inter" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert "table" in out
    assert "demo" in out


def test_amazon_beauty(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = shared_data / "amazon-beauty"
    began = time.perf_counter()
    folder = make(
        tmp_path,
        name="amazon-beauty",
        sequences=source / "sequences.tsv",
        items=source / "items.tsv",
    )
    assert time.perf_counter() - began < 30
    out = capsys.readouterr().out
    for fact in ("users: 22,363\n", "items: 12,101\n", "interactions: 198,502 (8.88 a user"):
        assert fact in out
    assert "items with brand: 10,003" in out
    lines = (source / "sequences.tsv").read_text(encoding="utf-8").splitlines()[1:]
    expected = [
        [user, item, str(place)]
        for user, _, items in (line.split("\t") for line in lines)
        for place, item in enumerate(items.split(), 1)
    ]
    assert inter(folder)[1:] == expected


def test_ml_latest_small(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = shared_data / "ml-latest-small"
    folder = make(
        tmp_path,
        name="ml",
        interactions=source / "interactions.tsv",
        items=source / "items.tsv",
    )
    out = capsys.readouterr().out
    for fact in ("users: 610\n", "items: 3,495\n", "interactions: 87,193 ("):
        assert fact in out
    assert "items with image: 3,495 (100.0 %)" in out
    assert len(list((folder / "images").iterdir())) == 3_495
    content = ItemContent(folder, "ml", ["[PAD]", "2"])
    assert content.text(1, "title") == "Jumanji (1995)"
    [path] = content.image_paths(1)
    assert path.read_bytes() == (source / "posters" / "2.jpg").read_bytes()


@pytest.mark.parametrize("model", ["LRURec", "BPR"])
def test_a_model_runs_on_it_without_a_yaml(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from recbole_mm.cli import main as run

    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    ids = [f"i{n}" for n in range(30)]
    rows = [[f"u{n // 10}", rng.choice(ids), n] for n in range(150)]
    items = [[item, f"Title {item}", "Care > Bath"] for item in ids]
    make(
        tmp_path,
        name="my-shop",
        interactions=clicks(tmp_path, rows),
        items=write_csv(tmp_path / "i.csv", ["item_id", "title", "categories"], items),
    )
    flags = ["--dataset=my-shop", "--epochs=1", "--show_progress=False", "--result_file=r.json"]
    assert run([f"--model={model}", *flags]) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    [result] = result if isinstance(result, list) else [result]
    assert (result["dataset"], result["test_users"]) == ("my-shop", 15)

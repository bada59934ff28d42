"""Cells, tables and folders of atomic files."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recbole_mm.data.atomic import (
    NA_WORDS,
    PAD,
    escape,
    is_address,
    item_cell,
    new_folder,
    read_columns,
    read_images,
    read_table,
    read_text,
    read_urls,
    safe_token,
    safe_word,
    stays_below,
    unescape,
    write_images,
    write_text,
    write_urls,
)
from recbole_mm.errors import UserError

STRINGS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
HARD = [
    "",
    "None",
    "NA",
    'a "quoted" title',
    '"',
    "tab\there",
    "line\nbreak\r\nand \r alone",
    "\\N",
    "\\",
    "\\\\t",
    "C:\\new\\table",
    "\x85\u2028\u2029\x0b\x0c\x1c",
    "\x00",
    "\ufeffbom",
    " spaces ",
    "💄🧴 日本語 é",
    "x" * 10_000,
]


def read_back(path: Path) -> dict[str, list[str | None]]:
    return dict(read_text(path)[1])


@given(st.none() | STRINGS)
def test_escape_is_undone_by_unescape(value: str | None) -> None:
    cell = escape(value)
    assert unescape(cell) == value
    assert not set(cell) & set("\t\n\r")


@given(STRINGS, STRINGS)
def test_no_two_strings_share_a_cell_or_a_token(one: str, other: str) -> None:
    assert (escape(one) == escape(other)) == (one == other)
    if one and other:
        assert (safe_token(one) == safe_token(other)) == (one == other)


@pytest.mark.parametrize("raw", ['a"', "NA", PAD])
def test_a_rewritten_token_is_not_another_id_as_it_came(raw: str) -> None:
    taken = safe_token(raw)
    assert taken != raw
    assert safe_token(taken) != taken


@pytest.mark.parametrize("cell", ["\\x", "a\\", "\\n\\q", "\\N\\N", "x\\N"])
def test_an_unknown_escape_is_no_cell(cell: str) -> None:
    with pytest.raises(ValueError, match="unknown escape"):
        unescape(cell)


def test_hard_strings_survive_a_text_file(tmp_path: Path) -> None:
    path = tmp_path / "d.text"
    rows = [(f"i{n}", (value, None)) for n, value in enumerate(HARD)]
    assert write_text(path, ["title", "other"], rows) == len(HARD)
    assert read_back(path) == {item: list(values) for item, values in rows}


def test_a_text_file_of_windows_is_read_alike(tmp_path: Path) -> None:
    path = tmp_path / "d.text"
    path.write_bytes(b"\xef\xbb\xbfitem_id:token\ttitle:text\r\ni1\ta\\r\r\n")
    assert read_back(path) == {"i1": ["a\r"]}


@given(st.lists(STRINGS.filter(bool), min_size=1, unique=True))
def test_recbole_reads_every_token_as_written(raw: list[str]) -> None:
    tokens = [safe_token(token) for token in raw]
    text = "".join(f"{token}\tx\n" for token in tokens)
    for engine in ("python", "c"):  # RecBole's way of reading, and ours
        frame = pd.read_csv(
            io.StringIO(f"id:token\tx:token\n{text}"), sep="\t", dtype=str, engine=engine
        )
        assert frame["id:token"].tolist() == tokens


@pytest.mark.parametrize("word", sorted(NA_WORDS))
def test_words_that_pandas_takes_for_missing(word: str) -> None:
    for safe in (safe_token(word), safe_word(word)):
        assert pd.read_csv(io.StringIO(f"a\n{safe}\n"), dtype=str)["a"].notna().all()


def test_our_list_of_missing_words_is_all_of_pandas() -> None:
    from pandas._libs.parsers import STR_NA_VALUES

    assert set(STR_NA_VALUES) - {""} <= NA_WORDS


def test_an_ordinary_id_stays() -> None:
    for token in ("B00INVENT1", "1", "a b", "50%", "ü", "nan2", "a%zz"):
        assert safe_token(token) == token
    with pytest.raises(ValueError, match="empty"):
        safe_token("")


@pytest.mark.parametrize(
    ("field", "value", "cell"),
    [
        ("categories", "Beauty > Skin Care > Face", "Beauty Skin_Care Face"),
        ("categories", "Action|Sci-Fi", "Action Sci-Fi"),
        ("categories", "Hair, Make-up", "Hair Make-up"),
        ("categories", "> NA >> x", "NA_ x"),
        ("categories", None, ""),
        ("brand", 'L\'Oréal "Paris"\n', "L'Oréal_Paris"),
        ("brand", "None", "None_"),
        ("brand", '"', ""),
        ("price", "$1,299.50", "1299.50"),
        ("price", "USD 7", "7"),
        ("price", "12,99", ""),
        ("price", "3 - 5", ""),
        ("price", "1.2.3", ""),
        ("price", "٣", ""),
        ("price", "cheap", ""),
        ("price", None, ""),
    ],
)
def test_cells_for_recboles_models(field: str, value: str | None, cell: str) -> None:
    assert item_cell(field, value) == cell


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "row 1: header cell ''"),
        ("item_id\n", "'item_id' is not 'name:type'"),
        ("title:text\titem_id:token\n", "first column must be 'item_id:token'"),
        ("item_id:token\ttitle:token\n", "'title' must be 'title:text'"),
        ("item_id:token\ttitle:txt\n", "did you mean 'text'"),
        ("item_id:token\ta:text\ta:text\n", "'a' occurs twice"),
        ("item_id:token\timage:text\n", "belongs in the .image file"),
        ("item_id:token\ta:text\n1\tx\n2\n", "row 3: 1 cells where the header has 2"),
        ("item_id:token\ta:text\n1\tx\ty\n", "row 2: 3 cells"),
        ("item_id:token\ta:text\n1\tx\n1\ty\n", r"row 3, column item_id: .*\(row 2\)"),
        ("item_id:token\ta:text\n\tx\n", "row 2, column item_id: the item id is empty"),
        ("item_id:token\ta:text\tb:text\n1\tx\t\\q\n", r"row 2, column b: unknown escape '\\q'"),
    ],
)
def test_a_broken_text_file_is_told_with_its_place(
    content: str, sentence: str, tmp_path: Path
) -> None:
    path = tmp_path / "d.text"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=sentence) as caught:
        read_back(path)
    assert str(path) in str(caught.value)


def test_bytes_that_are_no_text_are_told_with_their_row(tmp_path: Path) -> None:
    path = tmp_path / "d.text"
    path.write_bytes(b"item_id:token\ta:text\n1\tok\n2\t\xff\n")
    with pytest.raises(UserError, match="row 3: not UTF-8"):
        read_back(path)


def test_columns_come_in_the_order_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "d.inter"
    path.write_text("user_id:token\titem_id:token\trating:float\nu\ti\t5\nv\tj\t4\n")
    assert [*read_columns(path, ["rating", "user_id"])] == [["5", "u"], ["4", "v"]]
    with pytest.raises(UserError, match=r"d.inter has no column 'price:token'"):
        read_columns(path, ["price"])


def test_a_folder_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_table(tmp_path)


def test_images_keep_order_and_odd_names(tmp_path: Path) -> None:
    rows = [("b", "x/1.jpg"), ("a", "tab\there.png"), ("b", "..dots.jpg"), ("b", "é/2.webp")]
    write_images(tmp_path / "d.image", rows)
    assert list(read_images(tmp_path / "d.image")) == rows


@pytest.mark.parametrize(
    "path", ["../x", "a/../../x", "/etc/passwd", "\\\\host\\x", "C:\\x", "a\\..\\x", "..", "a\0b"]
)
def test_a_path_that_leaves_the_folder(path: str, tmp_path: Path) -> None:
    assert not stays_below(path)
    write_images(tmp_path / "d.image", [("i1", "fine.jpg"), ("i2", path)])
    with pytest.raises(UserError, match=r"row 3, column image.*leaves the images folder"):
        list(read_images(tmp_path / "d.image"))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("item_id:token\tpath:image\n", "must be 'item_id:token' and 'image:image'"),
        ("item_id:token\timage:image\ni\t\n", "row 2, column image: the cell is empty"),
        ("item_id:token\timage:image\ni\t\\N\n", "row 2, column image: the cell is empty"),
        ("item_id:token\timage:image\n\tx\n", "row 2, column item_id: the cell is empty"),
    ],
)
def test_a_broken_image_file(content: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "d.image").write_text(content)
    with pytest.raises(UserError, match=sentence):
        list(read_images(tmp_path / "d.image"))


def make(folder: Path, word: str, force: bool = False) -> None:
    with new_folder(folder, force) as fresh:
        (fresh / f"{folder.name}.inter").write_text(word)


def fail_half_way(folder: Path) -> None:
    with new_folder(folder, force=True) as fresh:
        (fresh / "d.inter").write_text("half")
        raise ZeroDivisionError


def test_addresses_keep_order_and_odd_letters(tmp_path: Path) -> None:
    rows = [("b", "https://x/2.jpg"), ("a", "http://x/\\n%09.jpg"), ("b", 'https://x/"1".jpg')]
    assert write_urls(tmp_path / "d.urls", rows) == 3
    assert list(read_urls(tmp_path / "d.urls")) == rows
    assert (tmp_path / "d.urls").read_text().startswith("item_id:token\turl:token\nb\thttps://")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("item_id:token\timage:token\na\tb\n", "row 1: the columns must be"),
        ("item_id:token\na\n", "row 1: the columns must be"),
        ("url:token\titem_id:token\na\tb\n", "row 1: the first column must be"),
        ("item_id:token\turl:image\na\tb\n", "row 1: column 'url' has the unknown type 'image'"),
        ("item_id:token\turl:token\na\t\n", "row 2, column url: the cell is empty"),
        ("item_id:token\turl:token\na\t\\N\n", "row 2, column url: the cell is empty"),
        ("item_id:token\turl:token\n\thttp://x\n", "row 2, column item_id: the cell is empty"),
        ("item_id:token\turl:token\na\tb\tc\n", "row 2: 3 cells"),
    ],
)
def test_a_broken_file_of_addresses(content: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "d.urls").write_text(content)
    with pytest.raises(UserError, match=sentence):
        list(read_urls(tmp_path / "d.urls"))


@pytest.mark.parametrize(
    "text", ["https://x/a.jpg", "http://x", "HTTPS://x/é.jpg", "http://" + "x" * 1_993]
)
def test_an_address(text: str) -> None:
    assert is_address(text)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "x.jpg",
            "//x/a.jpg",
            "http:/x",
            "http://",
            "https:",
            "ftp://x/a",
            "file:///etc/passwd",
        ),
        *("javascript://x", "data:image/png;base64,AA", " http://x", "http://x/a b", "http://x/\n"),
        *("http://x/\t", "http://x/\0", "http://x/\x7f", "http://x/\u2028", "http://x/\xa0a"),
        *("http://x/\u202egpj.", "http://x/\ud800", "http://" + "x" * 1_994),
    ],
)
def test_no_address(text: str) -> None:
    assert not is_address(text)


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "d"
    with pytest.raises(ZeroDivisionError):
        fail_half_way(folder)
    assert list((tmp_path / "deep").iterdir()) == []
    make(folder, "one")
    with pytest.raises(UserError, match="--force"):
        make(folder, "two")
    with pytest.raises(ZeroDivisionError):
        fail_half_way(folder)
    assert (folder / "d.inter").read_text() == "one"
    (folder / "old").write_text("")
    make(folder, "two", force=True)
    assert [p.name for p in folder.iterdir()] == ["d.inter"]
    assert (folder / "d.inter").read_text() == "two"
    assert list((tmp_path / "deep").iterdir()) == [folder]


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


KILLED = """
import os, sys
from pathlib import Path
from recbole_mm.data import atomic
folder, place = Path(sys.argv[1]), sys.argv[2]
replace = os.replace
def fatal(*paths):
    replace(*paths)
    os._exit(9)
if place == "between":
    atomic.os.replace = fatal
with atomic.new_folder(folder, force=True) as fresh:
    (fresh / f"{folder.name}.inter").write_text("two")
    if place == "before":
        os._exit(9)
"""


def killed(folder: Path, place: str) -> list[str]:
    """Kills a process that replaces `folder`; returns what it left beside it."""
    words = [sys.executable, "-c", KILLED, str(folder), place]
    assert subprocess.run(words, check=False).returncode == 9
    return sorted(path.name for path in folder.parent.iterdir())


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    folder, other = tmp_path / "d", tmp_path / "d.x"
    make(folder, "one")
    assert len(killed(folder, "before")) == 2
    with new_folder(other) as fresh:  # whose name begins alike
        (fresh / "d.x.inter").write_text("")
        make(folder, "three", force=True)
        assert sorted(tmp_path.iterdir()) == sorted([folder, fresh])
    assert sorted(tmp_path.iterdir()) == [folder, other]


def test_a_dataset_set_aside_by_a_killed_process_is_put_back(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    make(folder, "one")
    assert len(killed(folder, "between")) == 2
    assert not folder.exists()
    with pytest.raises(UserError, match="exists already"):
        make(folder, "three")
    assert (folder / "d.inter").read_text() == "one"
    assert list(tmp_path.iterdir()) == [folder]


def test_what_a_living_process_writes_stays(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    with new_folder(folder) as fresh:
        make(folder, "one")
        assert fresh.is_dir()
        foreign = fresh.with_name(
            re.sub(r"\.[0-9a-f]{8}-\d+-", f".00000000-{dead_pid()}-", fresh.name)
        )
        foreign.mkdir()
        (fresh / "d.inter").write_text("two")
        make(folder, "three", force=True)
        assert foreign.is_dir()  # of another machine, where that process may run
        assert fresh.is_dir()


def test_an_interrupt_between_the_renames_puts_the_old_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, replace = tmp_path / "d", os.replace
    make(folder, "one")

    def interrupted(source: Path, target: Path) -> None:
        replace(source, target)
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(folder, "two", force=True)
    assert (folder / "d.inter").read_text() == "one"
    assert list(tmp_path.iterdir()) == [folder]


def test_force_never_replaces_what_is_no_dataset(tmp_path: Path) -> None:
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="is no dataset"):
        make(folder, "one", force=True)
    assert (folder / "thesis.tex").read_text() == "years of work"


def test_a_place_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written to"):
        make(tmp_path / "file" / "d", "one")

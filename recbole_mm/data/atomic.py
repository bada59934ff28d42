r"""Reading and writing atomic files: RecBole's `.inter`, `.item`, our `.text`, `.image`, `.urls`.

All are UTF-8, tab-separated, one record a line, with a header of ``name:type`` cells.

`.text` holds raw strings. A cell escapes what would break the table: ``\t`` tab, ``\n`` newline,
``\r`` carriage return, ``\\`` backslash. ``\N`` alone means *missing*; an empty cell is the empty
string. `.image` holds paths below the dataset's `images` folder, and `.urls` the addresses of
pictures that were not fetched yet, both escaped the same way.

RecBole reads `.inter` and `.item` with pandas, where a quote may swallow lines and words such as
``None`` become missing. So `safe_token` and `safe_word` rewrite what goes there; `.text` needs no
such care.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from recbole_mm.errors import UserError, nearest

ITEM = "item_id"
IMAGE = "image"
URL = "url"
URL_HEADER = (f"{ITEM}:token", f"{URL}:token")
LONGEST_URL = 2_000
PAD = "[PAD]"  # RecBole's token of id 0
RECBOLE_TYPES = ("token", "token_seq", "float", "float_seq")

# What pandas.read_csv takes for a missing value by default.
NA_WORDS = frozenset(
    (
        "#N/A",
        "#N/A N/A",
        "#NA",
        "-1.#IND",
        "-1.#QNAN",
        "-NaN",
        "-nan",
        "1.#IND",
        "1.#QNAN",
        "<NA>",
        "N/A",
        "NA",
        "NULL",
        "NaN",
        "None",
        "n/a",
        "nan",
        "null",
    )
)
_MISSING = "\\N"
_ESCAPES = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})
_UNESCAPES = {"\\\\": "\\", "\\t": "\t", "\\n": "\n", "\\r": "\r"}
_ESCAPED = re.compile(r"\\.?", re.DOTALL)
# A percent sign before two hex digits goes too, so that no two ids become the same.
_UNSAFE = re.compile(r'[\x00-\x1f\x7f"\ud800-\udfff]|^\s|\s$|%(?=[0-9A-Fa-f]{2})')
# Absolute, a drive letter, a '..' step, or a NUL.
_LEAVES = re.compile(r"^[/\\]|^[A-Za-z]:|(^|[/\\])\.\.([/\\]|$)|\0")
_WORD_BREAK = re.compile(r"[\s\x00-\x1f\x7f]+")

# One number, with commas at thousands only: '12,99' may be a decimal comma and stays unclear.
_PRICE = re.compile(r"[^\d.]*((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?)[^\d.]*", re.ASCII)

# The text attributes that RecBole's zoo can use, with their types in `.item`.
ITEM_FIELDS = {"categories": "token_seq", "brand": "token", "price": "float"}

Header = list[tuple[str, str]]


# ---------------------------------------------------------------- cells


def escape(value: str | None) -> str:
    """The `.text` cell of a raw string; None (missing) becomes ``\\N``."""
    return _MISSING if value is None else value.translate(_ESCAPES)


def unescape(cell: str) -> str | None:
    """The raw string of a `.text` cell; None when it is missing.

    Raises:
        ValueError: a backslash is followed by anything else than ``t n r \\``.
    """
    if "\\" not in cell:
        return cell
    return None if cell == _MISSING else _ESCAPED.sub(_unescape_one, cell)


def _unescape_one(found: re.Match[str]) -> str:
    try:
        return _UNESCAPES[found.group()]
    except KeyError:
        raise ValueError(f"unknown escape '{found.group()}'") from None


def safe_token(token: str) -> str:
    """An id as RecBole can read it: percent-encoded where pandas would lose or change it.

    Raises:
        ValueError: the id is empty.
    """
    if not token:
        raise ValueError("empty id")
    if token in NA_WORDS:
        return f"%{ord(token[0]):02X}{token[1:]}"
    if token == PAD:
        return "%5BPAD]"
    return _UNSAFE.sub(lambda found: f"%{ord(found.group()):02X}", token)


def safe_word(text: str) -> str:
    """One word of an `.item` cell: no whitespace, no quotes, no word pandas takes for missing."""
    word = _WORD_BREAK.sub("_", text.replace('"', "").strip())
    return f"{word}_" if word in NA_WORDS or word == PAD else word


def item_cell(field: str, value: str | None) -> str:
    """The `.item` cell for RecBole's zoo of a text attribute named in `ITEM_FIELDS`.

    ``categories`` are split at ``>``, else ``|``, ``;`` or ``,`` into words; ``brand`` is one word;
    ``price`` is the one number in its text. What is missing or unclear is an empty cell.
    """
    value = value or ""
    if field == "price":
        found = _PRICE.fullmatch(value)
        return found.group(1).replace(",", "") if found else ""
    if field == "brand":
        return safe_word(value)
    separator = next((mark for mark in ">|;," if mark in value), None)
    return " ".join(filter(None, map(safe_word, value.split(separator) if separator else [value])))


# ---------------------------------------------------------------- reading


def read_table(
    path: Path, kinds: Sequence[str] = RECBOLE_TYPES
) -> tuple[Header, Iterator[tuple[int, list[str]]]]:
    """Opens an atomic file: its header, and its rows (line number from 1, cells) one at a time.

    Raises:
        UserError: not UTF-8, an empty file, a header cell that is not ``name:type`` with a type of
            `kinds`, a repeated column, or (while iterating) a row with another number of cells
            than the header.
    """
    lines = _lines(path)
    _, first = next(lines, (1, ""))
    header = [_header_cell(path, cell, kinds) for cell in first.split("\t")]
    names = [name for name, _ in header]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{path}, row 1: column '{name}' occurs twice; rename one of the two.")
    return header, _rows(path, lines, len(header))


def read_columns(path: Path, columns: Sequence[str]) -> Iterator[list[str]]:
    """The cells of some columns of an atomic file, in the order asked for, a row at a time.

    Raises:
        UserError: what `read_table` raises, or there is no such column.
    """
    header, rows = read_table(path)
    names = [name for name, _ in header]
    for column in columns:
        if column not in names:
            raise UserError(f"{path} has no column '{column}:token'.")
    at = [names.index(column) for column in columns]
    return ([cells[i] for i in at] for _, cells in rows)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                encoding = "utf-8-sig" if number == 1 else "utf-8"
                yield number, line.decode(encoding).removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}, row {number}: not UTF-8 ({error.reason}); re-encode it."
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None


def _header_cell(path: Path, cell: str, kinds: Sequence[str]) -> tuple[str, str]:
    name, colon, kind = cell.rpartition(":")
    if not colon or not name:
        raise UserError(
            f"{path}, row 1: header cell '{cell}' is not 'name:type', as in '{ITEM}:token'."
        )
    if kind not in kinds:
        raise UserError(
            f"{path}, row 1: column '{name}' has the unknown type '{kind}'{nearest(kind, kinds)}; "
            f"known here: {', '.join(kinds)}."
        )
    return name, kind


def _rows(
    path: Path, lines: Iterator[tuple[int, str]], width: int
) -> Iterator[tuple[int, list[str]]]:
    for number, line in lines:
        cells = line.split("\t")
        if len(cells) != width:
            raise UserError(
                f"{path}, row {number}: {len(cells)} cells where the header has {width}; "
                "a tab or newline inside a cell is written as \\t or \\n."
            )
        yield number, cells


def _read_item_table(path: Path, kind: str) -> tuple[Header, Iterator[tuple[int, list[str]]]]:
    """`read_table` for `item_id:token` followed by columns of one other type."""
    header, rows = read_table(path, ["token", kind])
    if header[0] != (ITEM, "token"):
        raise UserError(f"{path}, row 1: the first column must be '{ITEM}:token'.")
    for name, found in header[1:]:
        if found != kind:
            raise UserError(f"{path}, row 1: column '{name}' must be '{name}:{kind}'.")
    return header, rows


def read_text(
    path: Path, keep: Callable[[str], bool] = lambda _: True
) -> tuple[list[str], Iterator[tuple[str, list[str | None]]]]:
    """Reads a `.text` file: the attribute names, and (item, values) one row at a time.

    Args:
        path: the file.
        keep: called with each item token; where it is false the row yields no values.

    Raises:
        UserError: what `read_table` raises, an unknown type, a repeated or empty item id, or an
            unknown escape; with file, row and column.
    """
    header, rows = _read_item_table(path, "text")
    names = [name for name, _ in header[1:]]
    if IMAGE in names:
        raise UserError(f"{path}, row 1: '{IMAGE}' belongs in the .image file; rename the column.")
    return names, _text_rows(path, names, rows, keep)


def _text_rows(
    path: Path,
    names: list[str],
    rows: Iterator[tuple[int, list[str]]],
    keep: Callable[[str], bool],
) -> Iterator[tuple[str, list[str | None]]]:
    seen: dict[str, int] = {}
    for number, (item, *cells) in rows:
        first = seen.setdefault(item, number)
        if first != number:
            raise UserError(
                f"{path}, row {number}, column {ITEM}: item '{item}' has a row already "
                f"(row {first}); keep one of them."
            )
        if not item:
            raise UserError(f"{path}, row {number}, column {ITEM}: the item id is empty.")
        yield item, _unescape_row(path, number, names, cells) if keep(item) else []


def _unescape_row(path: Path, number: int, names: list[str], cells: list[str]) -> list[str | None]:
    values: list[str | None] = []
    for name, cell in zip(names, cells, strict=True):
        try:
            values.append(unescape(cell))
        except ValueError as error:
            raise UserError(
                f"{path}, row {number}, column {name}: {error}; write a backslash as \\\\."
            ) from None
    return values


def read_images(path: Path) -> Iterator[tuple[str, str]]:
    """Reads an `.image` file: (item, path below `images/`), several rows an item allowed.

    Raises:
        UserError: what `read_table` raises, other columns than ``item_id:token image:image``, an
            empty cell, or a path that leaves the images folder; with file, row and column.
    """
    header, rows = _read_item_table(path, "image")
    if header[1:] != [(IMAGE, "image")]:
        raise UserError(f"{path}, row 1: the columns must be '{ITEM}:token' and '{IMAGE}:image'.")
    return _image_rows(path, rows)


def _image_rows(path: Path, rows: Iterator[tuple[int, list[str]]]) -> Iterator[tuple[str, str]]:
    for number, (item, cell) in rows:
        [image] = _unescape_row(path, number, [IMAGE], [cell])
        if not item or not image:
            column = IMAGE if item else ITEM
            raise UserError(f"{path}, row {number}, column {column}: the cell is empty.")
        if not stays_below(image):
            raise UserError(
                f"{path}, row {number}, column {IMAGE}: '{image}' leaves the images folder; "
                "paths are relative to it and hold no '..'."
            )
        yield item, image


def stays_below(path: str) -> bool:
    """Whether a relative path names something below its base, by its letters alone."""
    return not _LEAVES.search(path)


def read_urls(path: Path) -> Iterator[tuple[str, str]]:
    """Reads a `.urls` file: (item, address of a picture), several rows an item, the best first.

    Whether an address may be fetched is for whoever fetches it.

    Raises:
        UserError: what `read_table` raises, other columns than ``item_id:token url:token``, or an
            empty cell; with file, row and column.
    """
    header, rows = _read_item_table(path, "token")
    if header[1:] != [(URL, "token")]:
        raise UserError(f"{path}, row 1: the columns must be '{ITEM}:token' and '{URL}:token'.")
    return _url_rows(path, rows)


def _url_rows(path: Path, rows: Iterator[tuple[int, list[str]]]) -> Iterator[tuple[str, str]]:
    for number, (item, cell) in rows:
        [url] = _unescape_row(path, number, [URL], [cell])
        if not item or not url:
            column = URL if item else ITEM
            raise UserError(f"{path}, row {number}, column {column}: the cell is empty.")
        yield item, url


def is_address(text: str) -> bool:
    """Whether a text can be the address of a picture: http or https, not endless, all printable."""
    scheme, mark, rest = text.partition("://")
    is_web = scheme.lower() in ("http", "https") and bool(mark and rest)
    return is_web and len(text) <= LONGEST_URL and text.isprintable() and " " not in text


# ---------------------------------------------------------------- writing


@contextmanager
def open_table(path: Path, header: Sequence[str]) -> Iterator[Callable[[Sequence[str]], object]]:
    """Opens an atomic file; what it yields writes one row of cells that need no escaping."""
    # A lone surrogate is no text: it is written as '?'.
    with path.open("w", encoding="utf-8", errors="replace", newline="\n") as file:
        file.write("\t".join(header) + "\n")
        yield lambda cells: file.write("\t".join(cells) + "\n")


def write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> int:
    """Writes an atomic file of cells that need no escaping any more; returns the number of rows."""
    count = 0
    with open_table(path, header) as write:
        for count, row in enumerate(rows, 1):  # noqa: B007
            write(row)
    return count


def write_text(
    path: Path, attributes: Sequence[str], rows: Iterable[tuple[str, Sequence[str | None]]]
) -> int:
    """Writes a `.text` file from (item, one value an attribute); returns the number of rows."""
    cells = ((item, *map(escape, values)) for item, values in rows)
    return write_table(path, text_header(attributes), cells)


def text_header(attributes: Sequence[str]) -> list[str]:
    """The header of a `.text` file."""
    return [f"{ITEM}:token", *(f"{name}:text" for name in attributes)]


def write_images(path: Path, rows: Iterable[tuple[str, str]]) -> int:
    """Writes an `.image` file from (item, path below `images/`); returns the number of rows."""
    header = [f"{ITEM}:token", f"{IMAGE}:image"]
    return write_table(path, header, ((item, escape(image)) for item, image in rows))


def write_urls(path: Path, rows: Iterable[tuple[str, str]]) -> int:
    """Writes a `.urls` file from (item, address), the best first; returns the number of rows."""
    return write_table(path, URL_HEADER, ((item, escape(url)) for item, url in rows))


def check_free(folder: Path, force: bool) -> None:
    """Checks that a dataset may be written to `folder`, and mends what a killed run left there.

    Raises:
        UserError: it exists and `force` is false, or it is something else than a dataset.
    """
    _mend(folder)
    if not folder.exists():
        return
    if not (folder / f"{folder.name}.inter").is_file():
        raise UserError(
            f"{folder} exists and is no dataset (there is no {folder.name}.inter in it), so it is "
            "never replaced; give another name."
        )
    if not force:
        raise UserError(f"{folder} exists already; give another name, or --force to replace it.")


@contextmanager
def new_folder(folder: Path, force: bool = False) -> Iterator[Path]:
    """Yields an empty temporary folder beside `folder`, which takes its place at a clean exit.

    After an error `folder` is as it was; after a kill it is, at the latest, when it is next written
    to. An existing dataset is replaced as a whole, and only with `force`.

    Raises:
        UserError: see `check_free`; or the place cannot be written to.
    """
    check_free(folder, force)
    stem = f".{folder.name}.{_machine()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    fresh = folder.with_name(f"{stem}.tmp")
    try:
        fresh.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{folder.parent} cannot be written to: {error.strerror}.") from None
    try:
        yield fresh
        _take_place(fresh, folder, folder.with_name(f"{stem}.old"))
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _take_place(fresh: Path, folder: Path, aside: Path) -> None:
    try:
        if folder.exists():
            os.replace(folder, aside)
        os.replace(fresh, folder)
    except BaseException:
        if aside.exists() and not folder.exists():
            os.replace(aside, folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _mend(folder: Path) -> None:
    """Puts a dataset back that stands aside for ever, and removes other folders of dead runs."""
    import psutil  # type: ignore[import-untyped]

    form = re.compile(
        rf"\.{re.escape(folder.name)}\.{_machine()}-(\d{{1,9}})-[0-9a-f]{{8}}\.(tmp|old)"
    )
    try:
        around = sorted(folder.parent.iterdir())
    except OSError:  # it is not there, or nothing we may look at
        return
    for path in around:
        found = form.fullmatch(path.name)
        if not found or psutil.pid_exists(int(found[1])):
            continue
        if found[2] == "old" and not folder.exists():
            os.replace(path, folder)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _machine() -> str:
    """A mark of this machine: on another one, which may share the disk, process ids say nothing."""
    return f"{zlib.crc32(platform.node().encode()):08x}"

"""Reading the sources' big files of one record a line: a line at a time, and safely.

Sources are what strangers wrote: a line that is no record is counted and passed over; a file that
is cut off, or that unpacks to far more than it should, is an error.
"""

from __future__ import annotations

import ast
import csv
import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from recbole_mm.errors import UserError

LONGEST_LINE = 1 << 20  # bytes; a product's record has some thousand
END_OF_TIME = 1 << 62  # what 64 bits hold, with room
LARGEST = 3.4028234e38  # what 32 bits of a rating hold
_MOST_TIMES = 200  # unpacked bytes a packed one: text has ten, a bomb a thousand
_FREE = 1 << 22  # unpacked bytes before that counts
_STEP = 1 << 16  # unpacked bytes between two looks at the bar
_DECODER = json.JSONDecoder()

Record = dict[str, Any]


def records(path: Path, bad: Counter[str]) -> Iterator[Record]:
    """The records of a file `.json`, `.jsonl`, or either with `.gz`, with a bar over its bytes.

    Lines are JSON objects or, as in Amazon's files of 2014, Python's literals.

    Args:
        path: the file.
        bad: counts lines that are neither, by what is wrong.

    Raises:
        UserError: the file is missing, cut off, no gzip, or unpacks to far too much.
    """
    for line in _lines(path):
        if (record := _record(line, bad)) is not None:
            yield record


def text_lines(path: Path) -> Iterator[str]:
    """The lines of a text file, each with its ``\\n``, with a bar over its bytes.

    UTF-8 or, where a line is not, Latin-1, as older releases have it; a carriage return inside a
    line is a space.

    Raises:
        UserError: the file is missing or cannot be read.
    """
    for number, line in enumerate(_lines(path)):
        try:
            text = line.decode("utf-8" if number else "utf-8-sig")
        except UnicodeDecodeError:
            text = line.decode("latin-1")
        yield text.replace("\r\n", "\n").replace("\r", " ")


def csv_cells(line: str) -> list[str] | None:
    """The cells of one line; None where its quotes do not close: no line swallows others."""
    line = line.rstrip("\n")
    if '"' not in line:
        return line.split(",")
    try:
        return next(csv.reader([line], strict=True))
    except csv.Error:
        return None


def _lines(path: Path) -> Iterator[bytes]:
    """Lines with their breaks; a line that is too long is given up to the limit."""
    if not path.is_file():
        raise UserError(f"There is no file {path}.")
    with path.open("rb") as file, _bar(path) as bar:
        try:
            yield from _checked(file, path, bar)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(
                f"{path} cannot be unpacked ({error}): it was cut off or is no gzip file; "
                f"delete {path} and give the command again."
            ) from None
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None


def _bar(path: Path) -> Any:
    return tqdm(total=path.stat().st_size, unit="B", unit_scale=True, ncols=100, desc=path.name)


def _checked(file: IO[bytes], path: Path, bar: Any) -> Iterator[bytes]:
    source: Any = gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file
    seen, due, cut = 0, 0, False
    while line := source.readline(LONGEST_LINE):
        seen += len(line)
        if seen >= due:
            due = seen + _STEP
            bar.update(file.tell() - bar.n)
            if seen > _FREE and seen > _MOST_TIMES * bar.n:
                raise UserError(
                    f"{path} unpacks to more than {_MOST_TIMES} times its size: this is no file "
                    "of its source; it was not read."
                )
        begins, cut = not cut, not line.endswith(b"\n")
        if begins:  # what follows a cut is the rest of the same line
            yield line
    bar.update(file.tell() - bar.n)


def _record(line: bytes, bad: Counter[str]) -> Record | None:
    if len(line) >= LONGEST_LINE:
        bad["longer than a megabyte"] += 1
        return None
    line = line.strip()
    if not line:
        return None
    try:
        value = _literal(line.decode("utf-8"))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        bad["neither JSON nor a Python literal"] += 1
        return None
    if not isinstance(value, dict):
        bad["no record of named values"] += 1
        return None
    return value


def _literal(text: str) -> Any:
    try:
        value, end = _DECODER.raw_decode(text)  # half as much again takes json.loads
        if end == len(text):
            return value
    except ValueError:
        pass
    return ast.literal_eval(text)

"""Reading a user's table, whatever its format, and finding the columns that are meant."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from recbole_mm.errors import UserError, nearest

# Other names under which a column is recognised, upper or lower case.
ALIASES: dict[str, tuple[str, ...]] = {
    "user_id": ("user", "userid", "uid", "reviewerid", "reviewer_id"),
    "item_id": ("item", "itemid", "iid", "asin", "parent_asin", "movieid", "product_id"),
    "item_ids": ("item_ids_chronological", "sequence", "history", "items"),
    "timestamp": ("time", "date", "datetime", "unixreviewtime", "position"),
    "rating": ("overall", "stars"),
    "title": ("name",),
    "categories": ("category", "genres", "genre"),
    "brand": (),
    "price": (),
    "description": (),
    "image": ("images", "image_path", "poster"),
}
SUFFIXES = (".tsv", ".csv", ".jsonl", ".ndjson", ".parquet")
_LONGEST = 2**31 - 1  # characters of a CSV cell

Rows = Iterator[tuple[int, list[str]]]
Mapped = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Table:
    """A table as its file has it.

    Attributes:
        path: the file.
        frame: cells are raw strings, lists of strings, or None where missing; the index is the
            number of its (last) line in the file, or of the row of a Parquet file, from 1.
    """

    path: Path
    frame: pd.DataFrame

    def where(self, row: Any, column: str) -> str:
        """How an error names a cell."""
        return f"{self.path}, row {row}, column '{column}'"


def read(path: Path) -> Table:
    """Reads `.tsv` (no quoting), `.csv` (quoting), `.jsonl` or `.parquet`.

    Raises:
        UserError: absent, of unknown format, malformed, without rows, or with a repeated column.
    """
    if (suffix := path.suffix.lower()) not in SUFFIXES:
        raise UserError(f"{path}: give a table that ends in one of {', '.join(SUFFIXES)}.")
    readers = (_read_tsv, _read_csv, _read_jsonl, _read_jsonl, _read_parquet)
    reader = dict(zip(SUFFIXES, readers, strict=True))[suffix]
    if not path.is_file():
        raise UserError(f"There is no file {path}.")
    try:
        frame = reader(path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason}); re-encode it.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None
    if frame.empty:
        raise UserError(f"{path} has no rows; the first one must name the columns.")
    return Table(path, frame.apply(_plain))


def _plain(column: pd.Series[Any]) -> pd.Series[Any]:
    """Whatever pandas takes for missing becomes None."""
    cells = [cell if isinstance(cell, str | list) else None for cell in column]
    return pd.Series(cells, index=column.index, dtype=object)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that end in ``\\n`` alone: other breaks that Python knows are text."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")


def _read_tsv(path: Path) -> pd.DataFrame:
    return _frame(path, _tsv_rows(path))


def _tsv_rows(path: Path) -> Rows:
    """Lines end in ``\\n`` or ``\\r\\n``; a lone ``\\r`` inside a cell is text."""
    for number, line in _lines(path):
        if text := line.removesuffix("\n").removesuffix("\r"):
            yield number, text.split("\t")


def _read_csv(path: Path) -> pd.DataFrame:
    return _frame(path, _csv_rows(path))


def _csv_rows(path: Path) -> Rows:
    csv.field_size_limit(_LONGEST)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            for row in reader:
                if row:
                    yield reader.line_num, row
        except csv.Error as error:
            raise UserError(f"{path}, row {reader.line_num}: {error}.") from None


def _frame(path: Path, rows: Rows) -> pd.DataFrame:
    """Takes the first row for the names of the columns; an empty cell is a missing one."""
    first, names = next(rows, (1, []))
    for name in names:
        if not name.strip() or names.count(name) > 1:
            raise UserError(
                f"{path}, row {first}: column name '{name.strip()}' is empty or occurs twice; "
                "the first row must name the columns."
            )
    numbers: list[int] = []
    cells: list[list[str | None]] = []
    for number, row in rows:
        if len(row) != len(names):
            raise UserError(
                f"{path}, row {number}: {len(row)} cells where the header has {len(names)}."
            )
        numbers.append(number)
        cells.append([cell or None for cell in row])
    return pd.DataFrame(cells, index=numbers, columns=names, dtype=object)


def _read_jsonl(path: Path) -> pd.DataFrame:
    rows = dict(_json_rows(path))
    return pd.DataFrame(list(rows.values()), index=list(rows), dtype=object)


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            # Numbers stay as they are written.
            row = json.loads(line, parse_int=str, parse_float=str, parse_constant=lambda _: None)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, row {number}: no JSON ({error}).") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, row {number}: each line must be one JSON object.")
        yield number, {name: _cell(value) for name, value in row.items()}


def _cell(value: Any) -> str | list[str] | None:
    """A JSON or Parquet value as a raw string, a flat list of them, or None."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list):
        return _flat(value)
    if isinstance(value, bool | dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


def _flat(values: list[Any]) -> list[str]:
    flat: list[str] = []
    for value in values:
        cell = _cell(value)
        flat += cell if isinstance(cell, list) else [cell] if cell is not None else []
    return flat


def _read_parquet(path: Path) -> pd.DataFrame:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(
            f"{path}: Parquet needs pyarrow ({error}): `pip install 'recbole-mm[parquet]'`."
        ) from None
    try:
        table = parquet.read_table(path)
    except pa.ArrowException as error:
        raise UserError(f"{path} is no Parquet file: {error}.") from None
    columns = {name: _arrow_cells(pa, table[name]) for name in table.column_names}
    index = range(1, table.num_rows + 1)
    return pd.DataFrame(
        {name: pd.Series(cells, index=index, dtype=object) for name, cells in columns.items()}
    )


def _arrow_cells(pa: Any, column: Any) -> list[Any]:
    """The cells of an Arrow column: flat types as text, nested ones value by value."""
    if not pa.types.is_nested(column.type):
        try:
            return column.cast(pa.string()).to_pylist()
        except pa.ArrowException:
            pass  # a type that Arrow cannot write as text
    return [_cell(value) for value in column.to_pylist()]


# ---------------------------------------------------------------- columns


def parse_columns(text: str) -> dict[str, list[str]]:
    """Reads ``--columns title=name,item_id=sku,item_id=asin``: their columns by our names.

    Raises:
        UserError: a part is not ``OURS=THEIRS``, or OURS is not a name of `ALIASES`.
    """
    mapped: dict[str, list[str]] = {}
    for part in filter(None, text.split(",")):
        ours, equals, theirs = (word.strip() for word in part.partition("="))
        if not equals or not theirs:
            raise UserError(f"--columns: '{part}' is not OURS=THEIRS, as in title=product_name.")
        if ours not in ALIASES:
            raise UserError(
                f"--columns: there is no column '{ours}'{nearest(ours, ALIASES)}; "
                f"ours are {', '.join(ALIASES)}, all others keep their names."
            )
        mapped.setdefault(ours, []).append(theirs)
    return mapped


def check_columns(mapped: Mapped, tables: Sequence[Table]) -> None:
    """Raises `UserError` if a column named by the user is in none of the tables."""
    known = [str(name) for table in tables for name in table.frame.columns]
    for ours, names in mapped.items():
        for theirs in names:
            if theirs not in known:
                paths = " nor ".join(str(table.path) for table in tables)
                raise UserError(
                    f"--columns {ours}={theirs}: neither {paths} has a column '{theirs}'"
                    f"{nearest(theirs, known)}."
                )


def find(table: Table, ours: str, mapped: Mapped) -> str | None:
    """The table's column for one of our names: as mapped, else by name, else by alias."""
    names = list(map(str, table.frame.columns))
    if named := [name for name in mapped.get(ours, ()) if name in names]:
        return named[0]
    taken = {theirs for other in mapped.values() for theirs in other}
    by_lower = {name.lower(): name for name in reversed(names) if name not in taken}
    if ours in names and ours not in taken:
        return ours
    return next((by_lower[a] for a in (ours, *ALIASES[ours]) if a in by_lower), None)


def need(table: Table, ours: str, mapped: Mapped) -> str:
    """As `find`.

    Raises:
        UserError: there is none.
    """
    found = find(table, ours, mapped)
    if found is None:
        names = [str(name) for name in table.frame.columns]
        raise UserError(
            f"{table.path} has no column '{ours}'; it has {', '.join(names)}: "
            f"name the right one with --columns {ours}=COLUMN."
        )
    return found


def refuse_repeats(table: Table, column: str) -> None:
    """Raises `UserError` if a cell occurs twice in a column."""
    again = table.frame[column].duplicated()
    if again.any():
        row = first(again)
        raise UserError(
            f"{table.where(row, column)}: '{table.frame[column][row]}' has a row already; "
            "keep one of them."
        )


def first(bad: pd.Series[Any]) -> Any:
    """The row number of the first true one."""
    return bad.index.tolist()[bad.to_numpy().argmax()]

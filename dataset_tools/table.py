"""Turns tables of interactions and items into a dataset.

Tables end in .tsv (tab-separated, no quoting), .csv (quoted), .jsonl or .parquet. Usual column
names are recognised; others are named by --columns OURS=THEIRS, where ours are: user_id, item_id,
item_ids (of --sequences), timestamp, rating, title, categories, brand, price, description, image.
Every other column of --items is kept as a text attribute of its own name.

  python -m dataset_tools table --name shop --interactions clicks.csv --items products.jsonl \\
      --images photos --columns item_id=sku,timestamp=clicked_at,image=photo --min_inter 5
"""

from __future__ import annotations

import argparse
import ast
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dataset_tools.sources import (
    ALIASES,
    Mapped,
    Table,
    check_columns,
    find,
    need,
    parse_columns,
    read,
)
from dataset_tools.write import Content, write_dataset
from recbole_mm.data.atomic import IMAGE, ITEM, check_free, safe_token, stays_below
from recbole_mm.errors import UserError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_ATTRIBUTES = [name for name in list(ALIASES)[list(ALIASES).index("title") :] if name != IMAGE]
_BREAKS = re.compile(r"[\x00-\x1f\x7f]")
_BETWEEN = re.compile(r"[\s,]+")
_NO_COMMA = re.compile(r"""['"]\s+['"]""")  # ['a' 'b'], as numpy prints: Python would read 'ab'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `python -m dataset_tools table`."""
    add = parser.add_argument
    add("--name", required=True, help="of the dataset: letters, digits, '.', '_' and '-'")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--interactions", metavar="FILE", help="a row an interaction, with a time")
    source.add_argument(
        "--sequences", metavar="FILE", help="a row a user, with item ids from oldest to newest"
    )
    add("--items", required=True, metavar="FILE", help="a row an item")
    add("--images", metavar="DIR", help="where the image column's paths begin (the items' folder)")
    add("--columns", default="", metavar="OURS=THEIRS,...", help="names of columns, see above")
    add(
        "--min_inter",
        default="0",
        metavar="N|U,I",
        help="keep users and items with at least so many interactions, repeated until all have",
    )


def run(arguments: argparse.Namespace) -> str:
    """Makes the dataset and returns its name.

    Raises:
        UserError: a mistake in the flags or in the tables.
    """
    name: str = arguments.name
    if not _NAME.fullmatch(name):
        raise UserError(f"--name '{name}': use letters, digits, '.', '_' and '-' only.")
    folder = Path(arguments.out) / name
    check_free(folder, arguments.force)
    mapped, least = parse_columns(arguments.columns), parse_least(arguments.min_inter)
    source = read(Path(arguments.interactions or arguments.sequences))
    items = read(Path(arguments.items))
    check_columns(mapped, [source, items])
    reading = read_interactions if arguments.interactions else read_sequences
    rows = core(reading(source, mapped), *least)
    root = Path(arguments.images) if arguments.images else items.path.parent
    write_dataset(folder, _content(rows, items, root, mapped), _command(arguments), arguments.force)
    return name


def _command(arguments: argparse.Namespace) -> str:
    """The command for the card, with file names instead of paths."""
    words = ["python -m dataset_tools table --name", arguments.name]
    for flag in ("interactions", "sequences", "items", "images"):
        if value := getattr(arguments, flag):
            words += [f"--{flag}", Path(value).name]
    words += ["--columns", f"'{arguments.columns}'"] if arguments.columns else []
    words += ["--min_inter", arguments.min_inter] if arguments.min_inter != "0" else []
    return " ".join(words)


def parse_least(text: str) -> tuple[int, int]:
    """Reads ``--min_inter``: ``N``, or ``U,I`` for users and items.

    Raises:
        UserError: it is neither.
    """
    words = text.split(",")
    if len(words) > 2 or not all(word.strip().isdecimal() for word in words):
        raise UserError(f"--min_inter '{text}': give N, or U,I for users and items, as in 6,5.")
    return int(words[0]), int(words[-1])


# ---------------------------------------------------------------- interactions


def read_interactions(table: Table, mapped: Mapped) -> pd.DataFrame:
    """Rows sorted by user (in order of appearance), then time; equal times keep their order.

    Returns:
        Columns user_id, item_id, timestamp and, where given, rating, all text.

    Raises:
        UserError: a column or cell is missing, or a time or rating cannot be read.
    """
    columns = {ours: need(table, ours, mapped) for ours in ("user_id", ITEM, "timestamp")}
    users = _ids(table, columns["user_id"])
    cells, times = parse_times(table, columns["timestamp"])
    rows = {"user_id": users, ITEM: _ids(table, columns[ITEM]), "timestamp": cells}
    if rating := find(table, "rating", mapped):
        rows["rating"] = _numbers(table, rating)
    order = np.lexsort((times, pd.factorize(users)[0]))
    return pd.DataFrame(rows).iloc[order].reset_index(drop=True)


def read_sequences(table: Table, mapped: Mapped) -> pd.DataFrame:
    """One row a user with a list of items; the position in it, from 1, is the timestamp.

    Returns:
        Columns user_id, item_id and timestamp, all text.

    Raises:
        UserError: a column, an id or the items of a user are missing, or a user has two rows.
    """
    user, column = need(table, "user_id", mapped), need(table, "item_ids", mapped)
    _refuse_repeats(table, user)
    lists = [_words(cell, table.where(row, column)) for row, cell in table.frame[column].items()]
    lengths = np.array([len(items) for items in lists])
    if not lengths.all():
        row = table.frame.index.tolist()[lengths.argmin()]
        raise UserError(f"{table.where(row, column)}: the user has no items; leave the row out.")
    items = pd.Series([item for row in lists for item in row], dtype=object)
    items.index = np.repeat(table.frame.index.to_numpy(), lengths)
    starts = np.repeat(np.cumsum(lengths) - lengths, lengths)  # of each item's list. (N,)
    return pd.DataFrame(
        {
            "user_id": np.repeat(_ids(table, user), lengths),
            ITEM: _safe(items, lambda row: table.where(row, column)),
            "timestamp": (np.arange(len(items)) - starts + 1).astype(str).astype(object),
        }
    )


def _words(cell: Any, where: str) -> list[str]:
    """The item ids of one user: a list, one written as JSON or as Python prints it, or words."""
    if isinstance(cell, list):
        return cell
    if cell and cell.lstrip().startswith("["):
        return _listed(cell.strip(), where)
    return [word for word in _BETWEEN.split(cell or "") if word]


def _listed(cell: str, where: str) -> list[str]:
    try:
        ids = _from_json(cell)
    except (ValueError, RecursionError):
        ids = None if _NO_COMMA.search(cell) else _from_python(cell)
    if not isinstance(ids, list) or not all(type(item) in (str, int) for item in ids):
        raise UserError(
            f'{where}: this is no list of item ids such as ["a", "b"]; mend it, or write the ids '
            "with spaces between and no brackets."
        )
    return [str(item) for item in ids]


def _from_json(cell: str) -> Any:
    return json.loads(cell, parse_int=str, parse_float=str)  # numbers stay as they are written


def _from_python(cell: str) -> Any:
    try:
        return ast.literal_eval(cell)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def _ids(table: Table, column: str) -> NDArray[Any]:
    return _safe(table.frame[column], lambda row: table.where(row, column))


def _safe(ids: pd.Series[Any], where: Callable[[Any], str]) -> NDArray[Any]:
    """Ids by `safe_token`. Shape: (N,)."""
    odd = ids.map(lambda cell: not isinstance(cell, str) or not cell)
    if odd.any():
        raise UserError(f"{where(_first(odd))}: an id is needed here.")
    codes, known = pd.factorize(ids.to_numpy(dtype=object))
    return np.array([safe_token(raw) for raw in known], dtype=object)[codes]


def _first(bad: pd.Series[Any]) -> Any:
    """The row number of the first true one."""
    return bad.index.tolist()[bad.to_numpy().argmax()]


def parse_times(table: Table, column: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Times as cells for `.inter`, and as numbers to sort by.

    Numbers (unix seconds, positions) stay as they are written; ISO 8601 dates become unix seconds,
    UTC where they name no zone.

    Returns:
        Text and numbers, both of shape (N,).

    Raises:
        UserError: a cell is neither, or is another kind than most.
    """
    cells = table.frame[column]
    numbers = _finite(cells)
    if numbers.notna().all():
        return cells.str.strip().to_numpy(dtype=object), numbers.to_numpy()
    dates = pd.to_datetime(cells.where(numbers.isna()), format="ISO8601", utc=True, errors="coerce")
    bad = numbers.isna() if numbers.notna().mean() > 0.5 else dates.isna()
    if bad.any():
        row = _first(bad)
        raise UserError(
            f"{table.where(row, column)}: '{cells[row]}' is no time; all rows need unix seconds, "
            "positions, or dates such as 2014-07-23 or 2014-07-23T18:00:00."
        )
    micros = ((dates - pd.Timestamp(0, tz="UTC")) // pd.Timedelta(microseconds=1)).to_numpy()
    texts = [f"{m // 10**6}" if m % 10**6 == 0 else f"{m / 10**6!r}" for m in micros.tolist()]
    return np.array(texts, dtype=object), micros


def _finite(cells: pd.Series[Any]) -> pd.Series[Any]:
    """Numbers, NaN where a cell is none."""
    numbers = pd.to_numeric(cells.map(lambda cell: cell if isinstance(cell, str) else ""), "coerce")
    return numbers.where(np.isfinite(numbers.astype(np.float64)))


def _numbers(table: Table, column: str) -> NDArray[Any]:
    cells = table.frame[column]
    bad = _finite(cells).isna()
    if bad.any():
        row = _first(bad)
        raise UserError(f"{table.where(row, column)}: '{cells[row]}' is no number.")
    return cells.str.strip().to_numpy(dtype=object)


def core(rows: pd.DataFrame, users: int, items: int) -> pd.DataFrame:
    """Drops users and items with too few interactions until none has.

    Args:
        rows: with columns user_id and item_id.
        users: least interactions of a user.
        items: least interactions of an item.

    Raises:
        UserError: nothing is left.
    """
    user, item = (pd.factorize(rows[name])[0] for name in ("user_id", ITEM))
    left = np.arange(len(rows))  # (N,)
    while True:
        enough = (np.bincount(user[left])[user[left]] >= users) & (
            np.bincount(item[left])[item[left]] >= items
        )
        if not enough.any():
            raise UserError(f"--min_inter {users},{items} leaves no interaction; lower it.")
        if enough.all():
            return rows.iloc[left].reset_index(drop=True)
        left = left[enough]


# ---------------------------------------------------------------- items


def _content(rows: pd.DataFrame, table: Table, root: Path, mapped: Mapped) -> Content:
    """Puts together what is known about the items of the interactions."""
    key = need(table, ITEM, mapped)
    _refuse_repeats(table, key)
    tokens = pd.Series(_ids(table, key), index=table.frame.index)
    wanted = tokens.isin(rows[ITEM].unique())
    image = find(table, IMAGE, mapped)
    items = _attributes(table, key, image, mapped)
    items.insert(0, ITEM, tokens)
    if not wanted.any():
        raise UserError(
            f"{table.path}, column '{key}': no item of the interactions is among its ids, which "
            f"begin with '{tokens.iloc[0]}', theirs with '{rows[ITEM].iloc[0]}': name the right "
            "columns with --columns."
        )
    images = [] if image is None else _images(table, image, root, tokens, wanted)
    notes = []
    if extra := int((~wanted).sum()):
        notes.append(f"items left out, without interaction: {extra:,}")
    if bare := rows[ITEM].nunique() - int(wanted.sum()):
        notes.append(f"items without a row in {table.path.name}: {bare:,}")
    return Content(rows, items[wanted], images, notes)


def _refuse_repeats(table: Table, column: str) -> None:
    again = table.frame[column].duplicated()
    if again.any():
        row = _first(again)
        raise UserError(
            f"{table.where(row, column)}: '{table.frame[column][row]}' has a row already; "
            "keep one of them."
        )


def _attributes(table: Table, key: str, image: str | None, mapped: Mapped) -> pd.DataFrame:
    """Every column but ids and pictures, under our name or its own; raw strings or None."""
    names = {find(table, ours, mapped): ours for ours in reversed(_ATTRIBUTES)}
    columns: dict[str, pd.Series[Any]] = {}
    for theirs in map(str, table.frame.columns):
        if theirs in (key, image):
            continue
        name = names.get(theirs) or _BREAKS.sub("_", theirs)
        if name in (ITEM, IMAGE, *columns):
            raise UserError(
                f"{table.path}: the column '{theirs}' would become a second '{name}'; rename it."
            )
        columns[name] = _joined(table.frame[theirs], " > " if name == "categories" else "\n")
    return pd.DataFrame(columns, index=table.frame.index, dtype=object)


def _joined(cells: pd.Series[Any], between: str) -> pd.Series[Any]:
    joined = [between.join(cell) if isinstance(cell, list) else cell for cell in cells]
    return pd.Series(joined, index=cells.index, dtype=object)


def _images(
    table: Table, column: str, root: Path, tokens: pd.Series[Any], wanted: pd.Series[Any]
) -> list[tuple[str, Path]]:
    if not root.is_dir():
        raise UserError(f"--images: there is no folder {root}.")
    found: list[tuple[str, Path]] = []
    for row, cell in table.frame.loc[wanted, column].items():
        paths: Sequence[str] = cell if isinstance(cell, list) else [cell] if cell else []
        for path in paths:
            source = root / path
            if not stays_below(path) or not source.resolve().is_relative_to(root.resolve()):
                raise UserError(
                    f"{table.where(row, column)}: '{path}' lies outside {root}; give a path "
                    "relative to --images."
                )
            found.append((tokens[row], source))
    return found

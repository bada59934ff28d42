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
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dataset_tools.filters import Filters, add_filters, filter_words
from dataset_tools.raw import check_name
from dataset_tools.sequences import sequences
from dataset_tools.sources import (
    ALIASES,
    Mapped,
    Table,
    check_columns,
    find,
    first,
    need,
    parse_columns,
    read,
    refuse_repeats,
)
from dataset_tools.write import Content, Interactions, Item, write_dataset
from recbole_mm.data.atomic import IMAGE, ITEM, check_free, safe_token, stays_below
from recbole_mm.errors import UserError

_LEAST = "0"
_ATTRIBUTES = [name for name in list(ALIASES)[list(ALIASES).index("title") :] if name != IMAGE]
_BREAKS = re.compile(r"[\x00-\x1f\x7f]")


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
    add_filters(parser, _LEAST, "attributes, or image")


def run(arguments: argparse.Namespace) -> str:
    """Makes the dataset and returns its name.

    Raises:
        UserError: a mistake in the flags or in the tables.
    """
    name: str = arguments.name
    check_name(name)
    folder = Path(arguments.out) / name
    check_free(folder, arguments.force)
    mapped, filters = parse_columns(arguments.columns), Filters.of(arguments)
    source = read(Path(arguments.interactions or arguments.sequences))
    items = read(Path(arguments.items))
    check_columns(mapped, [source, items])
    reading = read_interactions if arguments.interactions else read_sequences
    known = Items(items, mapped, Path(arguments.images or items.path.parent))
    content = known.content(reading(source, mapped), filters)
    write_dataset(folder, content, _command(arguments), arguments.force)
    return name


def _command(arguments: argparse.Namespace) -> str:
    """The command for the card, with file names instead of paths."""
    words = ["python", "-m", "dataset_tools", "table", "--name", arguments.name]
    for flag in ("interactions", "sequences", "items", "images"):
        if value := getattr(arguments, flag):
            words += [f"--{flag}", Path(value).name or "."]
    words += ["--columns", arguments.columns] if arguments.columns else []
    return " ".join([shlex.join(words), *filter_words(arguments, _LEAST)])


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
    users, lists = sequences(table, mapped)
    items = lists.explode()
    lengths = lists.map(len).to_numpy()
    starts = np.repeat(np.cumsum(lengths) - lengths, lengths)  # of each item's list. (N,)
    return pd.DataFrame(
        {
            "user_id": np.repeat(_ids(table, str(users.name)), lengths),
            ITEM: _safe(items, lambda row: table.where(row, str(lists.name))),
            "timestamp": (np.arange(len(items)) - starts + 1).astype(str).astype(object),
        }
    )


def _ids(table: Table, column: str) -> NDArray[Any]:
    return _safe(table.frame[column], lambda row: table.where(row, column))


def _safe(ids: pd.Series[Any], where: Callable[[Any], str]) -> NDArray[Any]:
    """Ids by `safe_token`. Shape: (N,)."""
    odd = ids.map(lambda cell: not isinstance(cell, str) or not cell)
    if odd.any():
        raise UserError(f"{where(first(odd))}: an id is needed here.")
    codes, known = pd.factorize(ids.to_numpy(dtype=object))
    return np.array([safe_token(raw) for raw in known], dtype=object)[codes]


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
        row = first(bad)
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
        row = first(bad)
        raise UserError(f"{table.where(row, column)}: '{cells[row]}' is no number.")
    return cells.str.strip().to_numpy(dtype=object)


# ---------------------------------------------------------------- items


class Items:
    """A table of items.

    Args:
        table: as it was read.
        mapped: names of its columns.
        root: folder where paths of pictures begin.

    Raises:
        UserError: a column is missing, or an item has two rows.
    """

    def __init__(self, table: Table, mapped: Mapped, root: Path) -> None:
        self.key = need(table, ITEM, mapped)
        refuse_repeats(table, self.key)
        self.table, self.root = table, root
        self.tokens = pd.Series(_ids(table, self.key), index=table.frame.index)
        self._image = find(table, IMAGE, mapped)
        self._values = _attributes(table, self.key, self._image, mapped)

    def content(self, rows: pd.DataFrame, filters: Filters) -> Content:
        """Puts interactions and what is known about their items together.

        Raises:
            UserError: they have no item in common, the filters leave nothing, or a path of a
                picture leads out.
        """
        filters.check_required([str(name) for name in self._values.columns])
        self._refuse_strangers(rows)
        codes, known = pd.factorize(rows[ITEM])
        rows, notes = filters.narrow(rows, self._misfits(known, filters)[codes])
        wanted = self.tokens.isin(rows[ITEM].unique())
        if extra := int((~wanted).sum()):
            notes.append(f"items left out, without interaction: {extra:,}")
        if bare := rows[ITEM].nunique() - int(wanted.sum()):
            notes.append(f"items without a row in {self.table.path.name}: {bare:,}")
        values = self._values[wanted].itertuples(index=False, name=None)
        items = map(Item, self.tokens[wanted], values)
        names = [str(name) for name in self._values.columns]
        return Content(Interactions.of(rows), names, items, self._images(wanted), notes)

    def _refuse_strangers(self, rows: pd.DataFrame) -> None:
        if not self.tokens.isin(rows[ITEM].unique()).any():
            raise UserError(
                f"{self.table.path}, column '{self.key}': no item of the interactions is among its "
                f"ids, which begin with '{self.tokens.iloc[0]}', theirs with "
                f"'{rows[ITEM].iloc[0]}': name the right columns with --columns."
            )

    def _misfits(self, known: pd.Index[Any], filters: Filters) -> NDArray[np.uint8]:
        """See `Filters.misfits`, for items by their tokens, in the table or not."""
        values = self._values.set_axis(self.tokens).reindex(known)

        def has(name: str) -> NDArray[np.bool_]:
            if name == IMAGE:
                images = self._images(self.tokens.isin(known))
                return known.isin([token for token, path in images if path.is_file()])
            return np.array([isinstance(cell, str) and cell != "" for cell in values[name]])

        titles = values.get("title", pd.Series("", index=known))
        lengths = [len(title) if isinstance(title, str) else 0 for title in titles]
        return filters.misfits(has, np.array(lengths, dtype=np.int32))

    def _images(self, wanted: pd.Series[Any]) -> list[tuple[str, Path]]:
        if self._image is None:
            return []
        if not self.root.is_dir():
            raise UserError(f"--images: there is no folder {self.root}.")
        return [
            (self.tokens[row], self._inside(row, path))
            for row, cell in self.table.frame.loc[wanted, self._image].items()
            for path in (cell if isinstance(cell, list) else [cell] if cell else [])
        ]

    def _inside(self, row: Any, path: str) -> Path:
        source = self.root / path
        if not stays_below(path) or not source.resolve().is_relative_to(self.root.resolve()):
            raise UserError(
                f"{self.table.where(row, str(self._image))}: '{path}' lies outside {self.root}; "
                "give a path relative to --images."
            )
        return source


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

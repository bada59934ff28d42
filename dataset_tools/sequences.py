"""Tables with a row a user and a list of its items."""

from __future__ import annotations

import ast
import json
import re
from typing import Any

import pandas as pd

from dataset_tools.sources import Mapped, Table, need, refuse_repeats
from recbole_mm.errors import UserError

_BETWEEN = re.compile(r"[\s,]+")
_NO_COMMA = re.compile(r"""['"]\s+['"]""")  # ['a' 'b'], as numpy prints: Python would read 'ab'


def sequences(table: Table, mapped: Mapped) -> tuple[pd.Series[Any], pd.Series[Any]]:
    """The users of a table and their lists of item ids, as they are written.

    Raises:
        UserError: a column or the items of a user are missing, a list cannot be read, or a user
            has two rows.
    """
    user, column = need(table, "user_id", mapped), need(table, "item_ids", mapped)
    refuse_repeats(table, user)
    lists = [_words(cell, table.where(row, column)) for row, cell in table.frame[column].items()]
    for row, items in zip(table.frame.index, lists, strict=True):
        if not items:
            where = table.where(row, column)
            raise UserError(f"{where}: the user has no items; leave the row out.")
    return table.frame[user], pd.Series(lists, index=table.frame.index, name=column, dtype=object)


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

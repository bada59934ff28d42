"""Texts that a model made of items, as a file of one JSON object a line: written by every run, and
read back from another one or from anywhere else.

    {"dataset": "mm-demo", "items": ["B001", "B007"], "text": "The user likes …"}

`items` is one item, of which the text is a description, or a history, the oldest first. `dataset`
may be missing in files from elsewhere: items of other datasets may have the same ids.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from recbole_mm.errors import UserError

Ids = tuple[int, ...]


def write_texts(
    path: Path, texts: Mapping[Ids, str], item_tokens: Sequence[str], dataset: str
) -> None:
    """Writes the file, whole or not at all.

    Args:
        path: the file.
        texts: by internal item ids.
        item_tokens: raw tokens in id order.
        dataset: its name.
    """
    lines = (
        json.dumps({"dataset": dataset, "items": [item_tokens[i] for i in items], "text": text})
        for items, text in texts.items()
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.draft")
    draft.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    draft.replace(path)


def read_texts(path: Path, item_tokens: Sequence[str], dataset: str, key: str) -> dict[Ids, str]:
    """The texts of items that the dataset has.

    Args:
        path: the file.
        item_tokens: raw tokens in id order, row 0 the pad.
        dataset: its name.
        key: that names the file.

    Raises:
        UserError: it cannot be read, or is of another dataset.
    """
    ids = {token: item for item, token in enumerate(item_tokens) if item > 0}
    found: dict[Ids, str] = {}
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: it cannot be read as a text file: name another.") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            theirs, tokens, text = _record(path, number, line)
            if theirs not in (None, dataset):
                raise UserError(
                    f"{path}, line {number}: it is of the dataset {theirs}, not of {dataset}: set "
                    f"{key} to texts of {dataset}."
                )
            if all(token in ids for token in tokens):
                found[tuple(ids[token] for token in tokens)] = text
    if not found:
        raise UserError(
            f"{path}: not one of its lines is about items of {dataset}, such as "
            f"'{item_tokens[-1]}': it is of another dataset, set {key} to texts of this one."
        )
    return found


def _record(path: Path, number: int, line: str) -> tuple[str | None, list[str], str]:
    """Whose text a line has: of which dataset, of which items."""
    try:
        record = json.loads(line)
        dataset, tokens, text = record.get("dataset"), record["items"], record["text"]
        if isinstance(tokens, list) and tokens and isinstance(text, str):
            named = None if dataset is None else str(dataset)
            return named, [str(token) for token in tokens], text
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise UserError(
        f'{path}, line {number}: expected {{"items": ["ITEM"], "text": "…"}}, found {line[:60]!r}.'
    )

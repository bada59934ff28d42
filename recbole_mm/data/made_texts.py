"""Texts that a model made of items, as a file of one JSON object a line: written by every run, and
read back from another one or from anywhere else.

    {"items": ["B001", "B007"], "text": "The user likes …"}

`items` is one item, of which the text is a description, or a history, the oldest first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from recbole_mm.errors import UserError

Ids = tuple[int, ...]


def write_texts(path: Path, texts: Mapping[Ids, str], item_tokens: Sequence[str]) -> None:
    """Writes the file, whole or not at all.

    Args:
        path: the file.
        texts: by internal item ids.
        item_tokens: raw tokens in id order.
    """
    lines = (
        json.dumps({"items": [item_tokens[item] for item in items], "text": text})
        for items, text in texts.items()
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.draft")
    draft.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    draft.replace(path)


def read_texts(path: Path, item_tokens: Sequence[str]) -> dict[Ids, str]:
    """The texts of items that the dataset has.

    Args:
        path: the file.
        item_tokens: raw tokens in id order, row 0 the pad.

    Raises:
        UserError: it cannot be read, or no line is about items of this dataset.
    """
    ids = {token: item for item, token in enumerate(item_tokens) if item > 0}
    found: dict[Ids, str] = {}
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: it cannot be read as a text file: name another.") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            tokens, text = _record(path, number, line)
            if all(token in ids for token in tokens):
                found[tuple(ids[token] for token in tokens)] = text
    if not found:
        raise UserError(
            f"{path}: not one of its lines is about items of this dataset, such as "
            f"'{item_tokens[-1]}': it is of another dataset, name the file of this one."
        )
    return found


def _record(path: Path, number: int, line: str) -> tuple[list[str], str]:
    try:
        record = json.loads(line)
        tokens, text = record["items"], record["text"]
        if isinstance(tokens, list) and tokens and isinstance(text, str):
            return [str(token) for token in tokens], text
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(
        f'{path}, line {number}: expected {{"items": ["ITEM"], "text": "…"}}, found {line[:60]!r}.'
    )

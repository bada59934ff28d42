"""What the converters of public sources share: flags, the items kept, the words of the card."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from dataset_tools.events import Events
from recbole_mm.data.atomic import ITEM, safe_token

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_DEFAULTS = {"min_inter": "5", "limit": 0}


def add_flags(parser: argparse.ArgumentParser, name: str, rows: str) -> None:
    """`--raw_dir`, `--name`, `--min_inter` and `--limit`.

    Args:
        parser: of the converter.
        name: what the dataset is called by itself.
        rows: what the source calls its interactions.
    """
    add = parser.add_argument
    add("--raw_dir", required=True, metavar="DIR", help="where the source's files are")
    add("--name", help=f"of the dataset ({name})")
    add("--min_inter", default=_DEFAULTS["min_inter"], metavar="N|U,I", help="least interactions")
    add("--limit", type=int, default=0, help=f"read so many {rows} only (0: all)")


def kept_items(events: Events, rows: pd.DataFrame) -> list[str]:
    """The ids, as the source has them, of the items that are left in coded rows, each once."""
    ids = list(events.items)
    return [ids[code] for code in pd.unique(rows[ITEM]).tolist()]


def pictures_by_id(folder: Path, items: Sequence[str]) -> list[tuple[str, Path]]:
    """A file `ID.jpg` (or .png, …) for each item that has one; ids are numbers, but who knows."""
    found = []
    for item in items:
        files = (folder / f"{item}{suffix}" for suffix in _SUFFIXES) if item.isalnum() else ()
        found += [(safe_token(item), file) for file in files if file.is_file()][:1]
    return found


def left_out(bad: Counter[str]) -> list[str]:
    """What was left out, a sentence a reason."""
    return [f"left out, {why}: {count:,}" for why, count in sorted(bad.items())]


def command(converter: str, arguments: argparse.Namespace, *words: str) -> str:
    """The command for the card, without paths of this machine.

    Args:
        converter: its name.
        arguments: the parsed flags.
        words: flags of this converter alone.
    """
    said = [f"python -m dataset_tools {converter}", *words, "--raw_dir raw"]
    said += [
        f"--{flag} {getattr(arguments, flag)}"
        for flag, default in _DEFAULTS.items()
        if getattr(arguments, flag) != default
    ]
    return " ".join(said)

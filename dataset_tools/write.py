"""The one writer of datasets: atomic files, copied pictures, a summary and a dataset card."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import pandas as pd

from recbole_mm.data.atomic import (
    ITEM,
    ITEM_FIELDS,
    item_cell,
    new_folder,
    write_images,
    write_table,
    write_text,
)
from recbole_mm.data.images import BadImageError, decode, open_header, read_bytes

_TYPES = {"user_id": "token", "item_id": "token", "timestamp": "float", "rating": "float"}
_SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif"}


@dataclass(frozen=True)
class Content:
    """What a converter has made of its source.

    Attributes:
        interactions: columns user_id, item_id, timestamp and perhaps rating, all text; ids by
            `safe_token`; rows in final order, a user's together and oldest first.
        items: item_id and one column an attribute, raw strings or None; no other items than those
            of the interactions.
        images: item and source file, in the order of preference; a file may not exist.
        notes: sentences for summary and card, such as what was left out.
    """

    interactions: pd.DataFrame
    items: pd.DataFrame
    images: Sequence[tuple[str, Path]] = ()
    notes: Sequence[str] = ()


@dataclass
class Summary:
    """What is in a dataset.

    Attributes:
        name: of the dataset.
        users, items, interactions: how many.
        coverage: items that have each attribute (not missing, not empty) or a usable picture.
        bad_images: pictures left out, by reason.
        notes: as in `Content`.
    """

    name: str
    users: int
    items: int
    interactions: int
    coverage: dict[str, int] = field(default_factory=dict)
    bad_images: Counter[str] = field(default_factory=Counter)
    notes: Sequence[str] = ()

    @property
    def sparsity(self) -> float:
        """The share of user-item pairs without an interaction, repeated ones counted."""
        return 1 - self.interactions / (self.users * self.items)

    def lines(self) -> list[str]:
        """The summary in words, a fact a line."""
        lines = [
            f"users: {self.users:,}",
            f"items: {self.items:,}",
            f"interactions: {self.interactions:,} "
            f"({self.interactions / self.users:.2f} a user, {self.interactions / self.items:.2f} "
            "an item)",
            f"sparsity: {100 * self.sparsity:.3f} %",
        ]
        lines += [
            f"items with {name}: {count:,} ({100 * count / self.items:.1f} %)"
            for name, count in self.coverage.items()
        ]
        lines += [f"pictures left out, {why}: {n:,}" for why, n in sorted(self.bad_images.items())]
        return [*lines, *self.notes]


def write_dataset(folder: Path, content: Content, how: str, force: bool = False) -> Summary:
    """Writes a dataset as a whole or not at all, and prints its summary.

    Args:
        folder: of the dataset; its name is the dataset's.
        content: what to write.
        how: the command that makes it, for the card; without paths of this machine.
        force: whether an existing dataset is replaced.

    Raises:
        UserError: see `new_folder`.
    """
    name = folder.name
    with new_folder(folder, force) as fresh:
        _write_interactions(fresh / f"{name}.inter", content.interactions)
        _write_items(fresh, name, content.items)
        images, bad = _copy_images(fresh / "images", content.images)
        if images:
            write_images(fresh / f"{name}.image", images)
        summary = _summary(name, content, len(set(dict(images))), bad)
        (fresh / "README.md").write_text(_card(summary, how), encoding="utf-8")
    print("\n".join([str(folder), *(f"  {line}" for line in summary.lines())]))
    return summary


def _write_interactions(path: Path, rows: pd.DataFrame) -> None:
    header = [f"{name}:{_TYPES[name]}" for name in rows.columns]
    write_table(path, header, zip(*(rows[name] for name in rows.columns), strict=True))


def _write_items(folder: Path, name: str, items: pd.DataFrame) -> None:
    """`.text` with everything, and `.item` with what RecBole's own models can use."""
    attributes = [str(column) for column in items.columns if column != ITEM]
    if attributes:
        values = zip(*(items[attribute] for attribute in attributes), strict=True)
        write_text(folder / f"{name}.text", attributes, zip(items[ITEM], values, strict=True))
    known = [attribute for attribute in ITEM_FIELDS if attribute in attributes]
    if not known:
        return
    header = [f"{ITEM}:token", *(f"{column}:{ITEM_FIELDS[column]}" for column in known)]
    cells = [[item_cell(column, value) for value in items[column]] for column in known]
    write_table(folder / f"{name}.item", header, zip(items[ITEM], *cells, strict=True))


def _copy_images(
    folder: Path, images: Sequence[tuple[str, Path]]
) -> tuple[list[tuple[str, str]], Counter[str]]:
    """Copies what can be decoded; returns (item, name of the copy) and the reasons for the rest."""
    copied: list[tuple[str, str]] = []
    taken: set[str] = set()
    bad: Counter[str] = Counter()
    for item, source in images:
        try:
            data = read_bytes(source)
            decode(data)
            kind = str(open_header(data).format)
        except BadImageError as error:
            bad[str(error)] += 1
            continue
        folder.mkdir(exist_ok=True)
        target = _free_name(item, _SUFFIXES[kind], taken)
        (folder / target).write_bytes(data)
        copied.append((item, target))
    return copied, bad


def _free_name(item: str, suffix: str, taken: set[str]) -> str:
    """A free file name by a digest of the item: an id may be a path, a device, or endless."""
    stem = sha256(item.encode()).hexdigest()[:16]
    name, number = f"{stem}.{suffix}", 1
    while name in taken:
        number += 1
        name = f"{stem}-{number}.{suffix}"
    taken.add(name)
    return name


def _summary(name: str, content: Content, pictured: int, bad: Counter[str]) -> Summary:
    rows, items = content.interactions, content.items
    coverage = {
        str(column): int(items[column].map(bool).sum())
        for column in items.columns
        if column != ITEM
    }
    if content.images:
        coverage["image"] = pictured
    return Summary(
        name,
        rows["user_id"].nunique(),
        rows[ITEM].nunique(),
        len(rows),
        coverage,
        bad,
        content.notes,
    )


def _card(summary: Summary, how: str) -> str:
    """The dataset card: what is in the folder and how it was made."""
    facts = "\n".join(f"- {line}" for line in summary.lines())
    return f"""# {summary.name}

{facts}

Made by

    {how}

| file | what |
|---|---|
| `{summary.name}.inter` | interactions, sorted by user, oldest first |
| `{summary.name}.item` | item attributes that RecBole's own models read |
| `{summary.name}.text` | texts of items as they came, with `\\t \\n \\r \\\\`; `\\N` is missing |
| `{summary.name}.image` | pictures of items, below `images/` |

Files without content are left out. Licence and terms are those of the source.
"""

"""The one writer of datasets: atomic files, copied pictures, a summary and a dataset card.

Interactions and items are read once and a row at a time, so they may be on disk until then.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from tqdm import tqdm

from recbole_mm.data.atomic import (
    ITEM,
    ITEM_FIELDS,
    URL_HEADER,
    escape,
    item_cell,
    new_folder,
    open_table,
    text_header,
    write_images,
    write_table,
)
from recbole_mm.data.images import BadImageError, decode, open_header, read_bytes

_TYPES = {"user_id": "token", "item_id": "token", "timestamp": "float", "rating": "float"}
_SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif"}


@dataclass(frozen=True)
class Interactions:
    """Rows of `.inter`, in final order: a user's together and oldest first.

    Attributes:
        columns: user_id, item_id, timestamp and perhaps rating.
        rows: their cells, all text, ids by `safe_token`; read once.
        users, items, count: how many there are.
    """

    columns: Sequence[str]
    rows: Iterable[Sequence[str]]
    users: int
    items: int
    count: int

    @classmethod
    def of(cls, frame: pd.DataFrame) -> Interactions:
        """Those of a frame of text."""
        rows = zip(*(frame[name] for name in frame.columns), strict=True)
        users, items = frame["user_id"].nunique(), frame[ITEM].nunique()
        return cls([str(name) for name in frame.columns], rows, users, items, len(frame))


class Item(NamedTuple):
    """What is known of an item.

    Attributes:
        token: its id, by `safe_token`.
        values: raw strings or None, one an attribute.
        urls: addresses of pictures, the best first.
    """

    token: str
    values: Sequence[str | None]
    urls: Sequence[str] = ()


@dataclass(frozen=True)
class Content:
    """What a converter has made of its source.

    Attributes:
        interactions: who took what, and when.
        attributes: names of the items' values.
        items: no others than those of the interactions, each once; read once.
        images: item and source file, in the order of preference; a file may not exist.
        notes: sentences for summary and card, such as what was left out.
        root: folder below which pictures keep their paths; None: they are named by their item.
        files: lines of further files by their paths below the dataset's folder, written last.
    """

    interactions: Interactions
    attributes: Sequence[str]
    items: Iterable[Item]
    images: Sequence[tuple[str, Path]] = ()
    notes: Sequence[str] = ()
    root: Path | None = None
    files: Mapping[str, Iterable[str]] = field(default_factory=dict)


@dataclass
class Summary:
    """What is in a dataset.

    Attributes:
        name: of the dataset.
        users, items, interactions: how many.
        coverage: items that have each attribute (not missing, not empty), an address of a picture
            or a usable picture.
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
        coverage = _write_items(fresh, name, content)
        images, bad = _copy_images(fresh / "images", content.images, content.root)
        if images:
            write_images(fresh / f"{name}.image", images)
        if content.images:
            coverage["image"] = len(set(dict(images)))
        _write_files(fresh, content.files)
        rows = content.interactions
        counts = (rows.users, rows.items, rows.count)
        summary = Summary(name, *counts, coverage, bad, content.notes)
        (fresh / "README.md").write_text(_card(summary, how), encoding="utf-8")
    print("\n".join([str(folder), *(f"  {line}" for line in summary.lines())]))
    return summary


def _write_interactions(path: Path, interactions: Interactions) -> None:
    header = [f"{name}:{_TYPES[name]}" for name in interactions.columns]
    write_table(path, header, interactions.rows)


def _write_files(folder: Path, files: Mapping[str, Iterable[str]]) -> None:
    for path, lines in files.items():
        (folder / path).parent.mkdir(exist_ok=True)
        with (folder / path).open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(f"{line}\n" for line in lines)


def _write_items(folder: Path, dataset: str, content: Content) -> dict[str, int]:
    """Writes `.text` with everything, `.item` with what RecBole's own models can use and `.urls`;
    returns how many items have something there."""
    names = list(content.attributes)
    known = [(name, names.index(name)) for name in ITEM_FIELDS if name in names]
    fields = [f"{ITEM}:token", *(f"{name}:{ITEM_FIELDS[name]}" for name, _ in known)]
    paths = {suffix: folder / f"{dataset}.{suffix}" for suffix in ("text", "item", "urls")}
    had, addressed = Counter(dict.fromkeys(names, 0)), 0
    with (
        open_table(paths["text"], text_header(names)) as write_text,
        open_table(paths["item"], fields) as write_item,
        open_table(paths["urls"], URL_HEADER) as write_url,
    ):
        for item in content.items:
            write_text([item.token, *map(escape, item.values)])
            write_item([item.token, *(item_cell(name, item.values[at]) for name, at in known)])
            for url in item.urls:
                write_url([item.token, escape(url)])
            had.update(name for name, value in zip(names, item.values, strict=True) if value)
            addressed += bool(item.urls)
    for suffix, used in (("text", names), ("item", known), ("urls", addressed)):
        if not used:
            paths[suffix].unlink()
    return {**had, **({"address of a picture": addressed} if addressed else {})}


def _copy_images(
    folder: Path, images: Sequence[tuple[str, Path]], root: Path | None
) -> tuple[list[tuple[str, str]], Counter[str]]:
    """Copies what can be decoded; returns (item, name of the copy) and the reasons for the rest.

    Below `root` pictures keep their paths, and one of several items is copied once.
    """
    copied: list[tuple[str, str]] = []
    taken: set[str] = set()
    bad: Counter[str] = Counter()
    bar = tqdm(images, desc="pictures", unit="picture", ncols=100, disable=not images)
    for item, source in bar:
        target = source.relative_to(root).as_posix() if root else ""
        if target in taken:
            copied.append((item, target))
            continue
        try:
            data = read_bytes(source)
            decode(data)
            kind = str(open_header(data).format)
        except BadImageError as error:
            bad[str(error)] += 1
            continue
        target = target or _free_name(item, _SUFFIXES[kind], taken)
        taken.add(target)
        (folder / target).parent.mkdir(parents=True, exist_ok=True)
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
    return name


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
| `{summary.name}.user` | attributes of users that RecBole's own models read |
| `{summary.name}.text` | texts of items as they came, with `\\t \\n \\r \\\\`; `\\N` is missing |
| `{summary.name}.image` | pictures of items, below `images/` |
| `{summary.name}.urls` | addresses of pictures that were not fetched, the best first |

Files without content are left out. Licence and terms are those of the source.
"""

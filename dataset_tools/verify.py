"""Recounts a dataset and puts the figures of the papers' tables beside its own.

The exit code is 1 where a figure differs that should be met. Some cannot be: the table says why.
Pictures count where their files are there.

  python -m dataset_tools verify amazon-beauty
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from recbole_mm.data.atomic import IMAGE, ITEM, read_columns, read_images
from recbole_mm.errors import UserError, nearest

_DIFFERS = "DIFFERS"
COUNTED = ("users", "items", "interactions", "images")
_DEAD = "many addresses of 2014 are dead"
_NO_PICTURES = "no pictures were fetched: run images"
_FILTERS = "the paper's filters do not lead there from the public files"


@dataclass(frozen=True)
class Published:
    """A line of a paper's table of datasets.

    Attributes:
        where: paper and table.
        figures: by what is counted; ``198k`` is a number of whole thousands, the rest cut off.
        out_of_reach: what cannot be met, and why.
    """

    where: str
    figures: Mapping[str, int | str]
    out_of_reach: Mapping[str, str] = field(default_factory=dict)


def _prime(users: int, items: int, interactions: str, images: int) -> Published:
    figures: dict[str, int | str] = {
        "users": users,
        "items": items,
        "interactions": interactions,
        "images": images,
    }
    return Published("PRIME, table 1", figures, {"images": _DEAD})


def _illmrec(*figures: int) -> Published:
    found = dict(zip(COUNTED, figures, strict=False))
    return Published("I-LLMRec, table 5", found, dict.fromkeys(found, _FILTERS))


def _rarec(*figures: int) -> Published:
    found = dict(zip(COUNTED, figures, strict=False))
    why = "users drawn as described have a tenth of so many interactions"
    return Published("RA-Rec, table 1", found, dict.fromkeys(COUNTED[1:3], why))


def _msr(*figures: int, **out_of_reach: str) -> Published:
    found = dict(zip(COUNTED, figures, strict=False))
    return Published("MLLM-MSR, datasets", found, out_of_reach)


PUBLISHED = {
    "amazon-beauty": _prime(22_363, 12_101, "198k", 12_023),
    "amazon-clothing": _prime(39_387, 23_033, "278k", 22_299),
    "amazon-sports": _prime(35_598, 18_357, "296k", 17_943),
    "amazon-toys": _prime(19_412, 11_924, "167k", 11_895),
    "amazon2018-sports": _illmrec(24_665, 9_884, 179_491),
    "amazon2018-grocery": _illmrec(84_896, 25_632, 739_628),
    "amazon2018-arts": _illmrec(14_986, 5_801, 121_917),
    "amazon2018-phones": _illmrec(59_307, 19_671, 403_194),
    "amazon2018-books": _rarec(80_000, 1_041_948, 4_194_561),
    "amazon2018-clothing": _rarec(100_000, 1_023_230, 3_391_436),
    "amazon2023-baby": _msr(
        *(41_081, 14_393, 400_876),
        **dict.fromkeys(COUNTED[:3], "its authors' own files have 99,722 users and 31,199 items"),
    ),
    "amazon2023-games": _msr(
        *(38_808, 13_379, 352_136),
        **dict.fromkeys(COUNTED[:3], "its authors' own files have 62,793 users and 22,069 items"),
    ),
    "microlens-50k": _msr(
        *(25_411, 20_276, 223_263),
        items="the (6,5)-core of the released file has 11,896, the whole file 19,220",
        interactions="the (6,5)-core of the released file has 220,472",
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `python -m dataset_tools verify`."""
    parser.add_argument("name", help=f"of the dataset; figures are known of {', '.join(PUBLISHED)}")
    parser.add_argument("--data_path", default="dataset", help="where datasets lie (dataset)")


def run(arguments: argparse.Namespace) -> None:
    """Prints the figures.

    Raises:
        UserError: there is no such dataset, none has published its figures, or one differs that
            should be met.
    """
    name: str = arguments.name
    found = count(Path(arguments.data_path) / name)
    published = PUBLISHED.get(name)
    if published is None:
        _print([[what, f"{number:,}"] for what, number in found.items()])
        raise UserError(
            f"No paper's figures are known for '{name}'{nearest(name, PUBLISHED)}, only for "
            f"{', '.join(PUBLISHED)}."
        )
    rows = [_row(what, number, published) for what, number in found.items()]
    _print([["", "here", published.where, ""], *rows])
    if wrong := [row[0] for row in rows if row[3] == _DIFFERS]:
        raise UserError(
            f"{name} differs from {published.where} in {' and '.join(wrong)}: docs/data.md says "
            "with which files and flags it is made."
        )


def count(folder: Path) -> dict[str, int]:
    """Users, items and interactions of a dataset, and its items with a picture, from its files.

    Raises:
        UserError: a file is missing or broken.
    """
    users, items, interactions = set[str](), set[str](), 0
    for user, item in read_columns(folder / f"{folder.name}.inter", ("user_id", ITEM)):
        users.add(user)
        items.add(item)
        interactions += 1
    pictured = len(items & _pictured(folder))
    return dict(zip(COUNTED, (len(users), len(items), interactions, pictured), strict=True))


def _pictured(folder: Path) -> set[str]:
    """Items with a picture whose file is there."""
    path = folder / f"{folder.name}.{IMAGE}"
    if not path.is_file():
        return set()
    return {item for item, file in read_images(path) if (folder / "images" / file).is_file()}


def _row(what: str, number: int, published: Published) -> list[str]:
    """What is counted, here, there, and what to think of it."""
    figure = published.figures.get(what)
    if figure is None:
        return [what, f"{number:,}", "-", ""]
    exact = isinstance(figure, int)
    verdict = "equal"
    if figure != (number if exact else f"{number // 1000}k"):
        verdict = _verdict(what, number, published)
    return [what, f"{number:,}", f"{figure:,}" if exact else str(figure), verdict]


def _verdict(what: str, number: int, published: Published) -> str:
    """What to think of a figure that differs."""
    if what == "images" and not number:
        return _NO_PICTURES
    why = published.out_of_reach.get(what)
    return f"out of reach: {why}" if why else _DIFFERS


def _print(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )

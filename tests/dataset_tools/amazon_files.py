"""Small files in the form of Amazon's releases, and what became of them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from dataset_tools.__main__ import main
from recbole_mm.data.atomic import read_table, read_text

DAY = 86_400


def pack(path: Path, lines: list[Any]) -> None:
    """Texts as they are, everything else as JSON; packed where the name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines)
    data = text.encode("utf-8", "surrogatepass")
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def review(user: str, item: str, day: int, **changes: Any) -> dict[str, Any]:
    """As in the releases of 2014 and 2018."""
    plain = {"reviewerID": user, "asin": item, "overall": 5.0, "unixReviewTime": day * DAY}
    return {**plain, "reviewText": "fine", "helpful": [0, 0], **changes}


# Everybody takes a, b and c within three days; d is u1's alone.
REVIEWS = [
    *(review(user, item, day) for day, item in enumerate("abc", 1) for user in ("u1", "u2", "u3")),
    review("u1", "d", 0),
]
PRODUCTS_2014 = [  # Python's literals, as the file is
    "{'asin': 'a', 'title': \"Nail's polish\", 'price': 3.5, 'brand': 'OPI', "
    "'categories': [['Beauty', 'Nails'], ['Gifts']], 'imUrl': 'http://x/a.jpg'}",
    "{'asin': 'b', 'description': 'Soft.', 'categories': [['Beauty']], 'related': {'also': []}}",
    "{'asin': 'zzz', 'title': 'Never sold'}",
]


def make(
    raw: Path, out: Path, command: str = "amazon2014", category: str = "Beauty", *flags: str
) -> int:
    words = [command, f"--category={category}", f"--raw_dir={raw}", f"--out={out}"]
    return main([*words, "--no-download", *flags])


def interactions(folder: Path) -> list[list[str]]:
    _, rows = read_table(folder / f"{folder.name}.inter")
    return [cells for _, cells in rows]


def texts(folder: Path) -> dict[str, dict[str, str | None]]:
    names, rows = read_text(folder / f"{folder.name}.text")
    return {item: dict(zip(names, values, strict=True)) for item, values in rows}

"""Makes mm-demo: generated products whose purchases follow what only their pictures show."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from recbole_mm.data.atomic import new_folder
from recbole_mm.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `python -m dataset_tools demo`."""
    parser.add_argument(
        "--permuted",
        action="store_true",
        help="make mm-demo-permuted, whose pictures are permuted among the items",
    )
    parser.add_argument("--seed", type=int, default=2020, help="of everything drawn (2020)")


def run(arguments: argparse.Namespace) -> str:
    """Makes the dataset and returns its name.

    Raises:
        UserError: the seed is negative, or the folder exists and there is no `--force`.
    """
    from recbole_mm.data.demo import make_demo

    if arguments.seed < 0:
        raise UserError(f"--seed is {arguments.seed}: give 0 or more.")
    name = "mm-demo-permuted" if arguments.permuted else "mm-demo"
    folder = Path(arguments.out) / name
    with (
        new_folder(folder, arguments.force) as fresh,
        tempfile.TemporaryDirectory(dir=fresh.parent, prefix=".") as place,
    ):
        make_demo(Path(place) / name, permuted=arguments.permuted, seed=arguments.seed)
        os.replace(Path(place) / name, fresh)
    print(f"Made {folder}")
    return name

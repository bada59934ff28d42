"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data extracts, or a skip with the reason."""
    folder = Path(os.environ.get("RECBOLE_MM_TEST_DATA", REPO / ".." / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real data not found in {folder}: set RECBOLE_MM_TEST_DATA")
    return folder


@pytest.fixture(scope="session")
def real_tables(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Amazon Beauty (text alone) and MovieLens with posters as atomic files."""
    from dataset_tools.__main__ import main

    out = tmp_path_factory.mktemp("dataset")
    for name, kind, rows in (
        ("amazon-beauty", "--sequences", "sequences.tsv"),
        ("ml-latest-small", "--interactions", "interactions.tsv"),
    ):
        source = shared_data / name
        flags = ["--name", name, kind, str(source / rows), "--items", str(source / "items.tsv")]
        assert main(["table", *flags, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="session")
def demo_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds `mm-demo`, drawn once: that takes longer than many a run on it."""
    from recbole_mm.data.demo import make_demo

    root = tmp_path_factory.mktemp("demo")
    make_demo(root / "mm-demo")
    return root

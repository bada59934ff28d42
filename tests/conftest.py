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

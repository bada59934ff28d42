"""What is asked of the machine itself."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from recbole_mm.machine import give_back_memory


def resident() -> int:
    """Bytes held by this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_freed_between_living_blocks_goes_back() -> None:
    blocks = [bytearray(100_000) for _ in range(4_000)]  # 400 MB, each below the size of a mapping
    for block in blocks:
        block[::4096] = b"x" * len(block[::4096])  # touched
    kept = blocks[::50]
    before = resident()
    del blocks, block
    held = resident()
    give_back_memory()
    assert resident() < before - 300_000_000
    assert resident() <= held
    assert len(kept) == 80

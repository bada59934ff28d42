"""SIGTERM, which schedulers send, stops a converter as Ctrl-C does."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dataset_tools.__main__ import main

PROGRAM = """
import os, signal, sys, time
from dataset_tools import write
from dataset_tools.__main__ import main
def endless(*_):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
write._write_interactions = endless
raise SystemExit(main(sys.argv[1:]))
"""


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    (tmp_path / "clicks.tsv").write_text("user\titem\ttime\nu\ta\t1\nu\tb\t2\n")
    (tmp_path / "items.tsv").write_text("item\ttitle\na\tA\nb\tB\n")
    files = [f"--interactions={tmp_path / 'clicks.tsv'}", f"--items={tmp_path / 'items.tsv'}"]
    return ["table", "--name=shop", *files, f"--out={tmp_path / 'dataset'}"]


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGTERM to catch")
def test_a_converter_leaves_nothing(words: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 130
    assert "Interrupted; nothing was written." in done.stderr
    assert list((tmp_path / "dataset").iterdir()) == []


def test_the_handler_is_put_back_and_other_threads_need_none(words: list[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert main(words) == 0
    assert signal.getsignal(signal.SIGTERM) is before
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(main([*words, "--force"])))
    thread.start()
    thread.join()
    assert codes == [0]

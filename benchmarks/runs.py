"""Runs of the command line for benchmarks, kept on disk, and what is said of their numbers."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def run(work: Path, name: str, flags: dict[str, str], model: str = "PRIME") -> dict[str, Any]:
    """The result of one run, from the disk where it is there."""
    path = work / f"{name}.json"
    if not path.is_file():
        words = [f"--{key}={value}" for key, value in {**flags, "result_file": path.name}.items()]
        command = [sys.executable, str(ROOT / "run_recbole_mm.py"), f"--model={model}", *words]
        with (work / f"{name}.log").open("w") as log:
            subprocess.run(command, cwd=work, stdout=log, stderr=log, check=True)
        print(f"{name} done", flush=True)
    return dict(json.loads(path.read_text(encoding="utf-8")))


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean and standard error."""
    if not values:
        return {}
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    rounded = [round(value, 6) for value in values]
    return {"mean": round(statistics.mean(values), 6), "error": error, "values": rounded}

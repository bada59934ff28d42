"""The rows of a table: each way to read each model's scores, over all seeds of it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Line:
    """One row of a table.

    Attributes:
        name: of the model, its variant and the way to read it.
        row: that way's own name, as in `rows` of a result; empty where there is only one.
        results: of the runs, one a seed.
        rows: that row of each of them.
    """

    name: str
    row: str
    results: Sequence[Result]
    rows: Sequence[Mapping[str, Any]]


def table_lines(results: Sequence[Result]) -> list[Line]:
    """The rows in the order of the results.

    Variants of a model share what stands before their difference: a row beside a variant's result
    that is equal, seed by seed, to one of the same name above is left out.

    Args:
        results: as `quick_start.run` returns them.
    """
    groups: dict[tuple[str, str | None], list[Result]] = {}
    for result in results:
        groups.setdefault((result["model"], result.get("variant")), []).append(result)
    lines: list[Line] = []
    for (model, variant), runs in groups.items():
        head = model if variant is None else f"{model} {variant}"
        for row in rows_of(runs[0]):
            line = _line(f"{head}{': ' if variant and row['name'] else ' '}", row["name"], runs)
            if row.get("chosen", True) or not any(_repeats(line, above) for above in lines):
                lines.append(line)
    return lines


def rows_of(result: Result) -> Sequence[Mapping[str, Any]]:
    """The rows of a result; one without a name where a model is read in one way only."""
    own = {"name": "", "test": result["test"], "test_protocols": result["test_protocols"]}
    return result["rows"] or [own]


def _line(head: str, name: str, runs: Sequence[Result]) -> Line:
    found = [(run, row) for run in runs for row in rows_of(run) if row["name"] == name]
    results, rows = zip(*found, strict=True)
    return Line(f"{head}{name}".strip(), name, results, rows)


def _repeats(line: Line, above: Line) -> bool:
    """Whether every number of it stands in a row above of the same model and name already."""
    if (line.row, line.results[0]["model"]) != (above.row, above.results[0]["model"]):
        return False
    shown = {r.get("seed"): row["test"] for r, row in zip(above.results, above.rows, strict=True)}
    return all(
        shown.get(result.get("seed")) == row["test"]
        for result, row in zip(line.results, line.rows, strict=True)
    )


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of several values, at least two."""
    return statistics.stdev(values) / len(values) ** 0.5

"""How far the rows of a table are from its first one, and which of that may be chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recbole_mm.errors import UserError
from recbole_mm.report.lines import Line, table_lines
from recbole_mm.report.places import PLACES, WITH_PLACES, compare_sides, side
from recbole_mm.report.table import format_rows


def difference_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Each row's difference to the first by the validation metric, with its paired bootstrap over
    users; a user's value is the mean over seeds. Empty where runs differ in neither variant nor
    seed, or left no places.

    Args:
        results: as `jobs.run_jobs` yields them, of one dataset and protocol.
    """
    varied = len({(r.get("variant"), r.get("seed")) for r in results}) > 1
    metric = str(results[0]["valid_metric"]).lower()
    if not varied or metric.partition("@")[0] not in WITH_PLACES:
        return ""
    lines = [line for line in table_lines(results) if _has_places(line)]
    if len(lines) < 2:
        return ""
    try:
        cells = _cells(lines, metric)
    except UserError:
        return "Differences: none, rows were tested on different users (limit_users draws by seed)."
    title = f"{metric} less that of {lines[0].name}, paired bootstrap over users, 95 %"
    return f"{title}\n{format_rows(['model', 'difference', 'from', 'to', ''], cells)}"


def _cells(lines: Sequence[Line], metric: str) -> list[list[str]]:
    first, *others = (side(_runs(line), metric) for line in lines)
    cells = []
    for line, other in zip(lines[1:], others, strict=True):
        found = compare_sides(other, first)
        numbers = (found.first - found.second, found.low, found.high)
        told = "" if found.differ else "may be chance"
        cells.append([line.name, *(f"{number:+.4f}" for number in numbers), told])
    return cells


def _runs(line: Line) -> list[str]:
    return [f"{result['run_dir']}:{line.row}".rstrip(":") for result in line.results]


def _has_places(line: Line) -> bool:
    return all((Path(r.get("run_dir", "")) / PLACES).is_file() for r in line.results)

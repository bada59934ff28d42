"""How far rows of a table are from each other, and which of that may be chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recbole_mm.errors import UserError
from recbole_mm.report.lines import Line, Result, table_lines
from recbole_mm.report.places import PLACES, WITH_PLACES, compare_sides, named, side
from recbole_mm.report.table import format_rows

Side = Mapping[Any, str]  # `RUN[:ROW]` by seed
_HOW = "paired bootstrap over users, 95 %"


def difference_table(results: Sequence[Result]) -> str:
    """Each row's difference to the first one of its protocol, a user's value being its mean over
    the seeds that both have.

    Args:
        results: as `jobs.run_jobs` yields them, of one dataset.

    Returns:
        Empty where runs differ in neither variant nor seed, or left no places.
    """
    protocols = dict.fromkeys(result["protocol"] for result in results)
    tables = [_to_the_first([r for r in results if r["protocol"] == name]) for name in protocols]
    return "\n\n".join(filter(None, tables))


def _to_the_first(results: Sequence[Result]) -> str:
    lines = [line for line in table_lines(results) if _left_places(line.results)]
    if len({(r.get("variant"), r.get("seed")) for r in results}) < 2 or len(lines) < 2:
        return ""
    first, *others = lines
    rows = [(line.name, _side_of(line), _side_of(first)) for line in others]
    return _table(f"less that of {first.name}", rows, shared_metric(results))


def pair_table(results: Sequence[Result], pairs: Sequence[Sequence[str]]) -> str:
    """The differences that a recipe asks for with `compare`; empty where none can be had.

    Args:
        results: as `jobs.run_jobs` yields them.
        pairs: names as `python -m recbole_mm.report.places --results` takes them.
    """
    rows, used = [], list[Result]()
    for pair in pairs:
        try:
            sides = [named(results, name) for name in pair]
        except UserError:  # a variant that was not run, or not yet
            continue
        if not all(map(_left_places, sides)) or len({r["protocol"] for s in sides for r in s}) > 1:
            continue
        one, other = (
            {r.get("seed"): _run(r, name.partition(":")[2]) for r in found}
            for found, name in zip(sides, pair, strict=True)
        )
        rows.append((f"{pair[0]} less {pair[1]}", one, other))
        used += [result for found in sides for result in found]
    return _table("of pairs", rows, shared_metric(used)) if rows else ""


def shared_metric(results: Sequence[Result]) -> str | None:
    """The first run's validation metric, or the same at the largest k that all runs have; None
    where places do not give it."""
    metric = str(results[0]["valid_metric"]).lower()
    kind = metric.partition("@")[0]
    shared = [name for name in results[0]["test"] if all(name in r["test"] for r in results)]
    alike = [name for name in shared if name.partition("@")[0] == kind]
    if kind not in WITH_PLACES or not alike:
        return None
    return metric if metric in alike else alike[-1]


def _table(title: str, rows: Sequence[tuple[str, Side, Side]], metric: str | None) -> str:
    if metric is None:
        return ""
    try:
        found = [_cells(name, one, other, metric) for name, one, other in rows]
    except UserError as error:
        return f"No differences {title}: {error}"
    cells = [cell for cell in found if cell]
    table = format_rows(["", "difference", "from", "to", ""], cells) if cells else "none"
    return f"{metric} {title}, {_HOW}\n{table}"


def _cells(name: str, one: Side, other: Side, metric: str) -> list[str]:
    """A row of the table; empty where the two have no seed in common."""
    seeds = [seed for seed in one if seed in other]
    if not seeds:
        return []
    found = compare_sides(
        side([one[seed] for seed in seeds], metric), side([other[seed] for seed in seeds], metric)
    )
    numbers = (found.first - found.second, found.low, found.high)
    told = "" if found.differ else "may be chance"
    return [name, *(f"{number:+.4f}" for number in numbers), told]


def _side_of(line: Line) -> Side:
    return {result.get("seed"): _run(result, line.row) for result in line.results}


def _run(result: Result, row: str) -> str:
    return f"{result['run_dir']}:{row}" if row else str(result["run_dir"])


def _left_places(results: Sequence[Result]) -> bool:
    return all((Path(result.get("run_dir", "")) / PLACES).is_file() for result in results)

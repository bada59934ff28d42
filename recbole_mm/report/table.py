"""The table at the end: a row for each model, or for each way to read a model's scores."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from recbole_mm.report.lines import Line, standard_error, table_lines

_EPOCHS_CUT = {
    "epochs": "all epochs",
    "steps": "all steps",
    "patience": "early stop",
    "time": "time up",
    "given": "as given",
    "untrained": "untrained",
    "made": "made",
}
_BOTH = {"full", "full-masked"}
_USUAL_SPLIT = "LS/TO"  # leave one out, ordered by time


def format_rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in plain text, first column left and the others right."""
    widths = [max(len(str(line[i])) for line in [header, *rows]) for i in range(len(header))]
    lines = []
    for line in [header, *rows]:
        cells = [
            str(c).rjust(w) if i else str(c).ljust(w)
            for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def _shown(names: Sequence[str], metric: str, few: bool) -> list[str]:
    """Which metrics fit a screen: AUC of lists, recall and ndcg; with two columns each, only at one
    k: that which chose the model, or the largest."""
    kept = [n for n in names if n.split("@")[0] in ("recall", "ndcg")] or list(names)
    ks = list(dict.fromkeys(n.partition("@")[2] for n in kept))
    k = metric.partition("@")[2]
    ks = [k if k in ks else ks[-1]] if few else ks[-3:]
    areas = [n for n in names if n == "auc" and n not in kept]
    return areas + [n for n in kept if n.partition("@")[2] in ks]


def _columns(results: Sequence[Mapping[str, Any]], masked: bool) -> list[tuple[str, str, str]]:
    """(title, key of the result, metric) for each column; metrics that all results have, if any."""
    tests = [result["test"] for result in results]
    every = list(dict.fromkeys(name for test in tests for name in test))
    shared = [name for name in every if all(name in test for test in tests)]
    names = _shown(shared or every, results[0]["valid_metric"], few=masked)
    if not masked:
        return [(name, "test", name) for name in names]
    titles = (("unmasked", "full"), ("masked", "full-masked"))
    return [(f"{name} {title}", protocol, name) for name in names for title, protocol in titles]


def _value(line: Line, where: str, name: str) -> str:
    """One number, or the mean over seeds with its standard error."""
    of_rows = [
        row["test"] if where == "test" else row.get("test_protocols", {}).get(where) or {}
        for row in line.rows
    ]
    values = [found[name] for found in of_rows if name in found]
    if not values:
        return "-"
    error = f" ±{standard_error(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{error}"


def result_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Test metrics of all results with what is needed to read them rightly: a table a protocol.

    General models rank what they were trained on first when the history is not masked, so a table
    that has one shows both columns, where both were measured.

    Args:
        results: as `quick_start.run` returns them, of one dataset.
    """
    protocols = dict.fromkeys(result["protocol"] for result in results)
    tables = [_table([r for r in results if r["protocol"] == name]) for name in protocols]
    return "\n\n".join(tables)


def _table(results: Sequence[Mapping[str, Any]]) -> str:
    """The table of results of one protocol."""
    first = results[0]
    masked = any(r["general"] and set(r["test_protocols"]) >= _BOTH for r in results)
    columns = _columns(results, masked)
    titles = [title for title, _, _ in columns]
    header = ["model", "backbone", "train mode", "trained", *titles, "seconds"]
    seeds = len({result.get("seed") for result in results})
    lines = [
        [
            _label(line, seeds),
            *(line.results[0]["backbone"] or "-", line.results[0]["train_mode"]),
            _trained(line),
            *(_value(line, where, name) for _, where, name in columns),
            f"{statistics.mean(result['seconds'] for result in line.results):.0f}",
        ]
        for line in table_lines(results)
    ]
    title = f"{first['dataset']}, protocol {first['protocol']}, test on {first['test_users']} users"
    if first.get("split", _USUAL_SPLIT) != _USUAL_SPLIT:
        title += f", split {first['split']}"
    if first.get("limit_users"):
        title += f" (limit_users {first['limit_users']})"
    if seeds > 1:
        title += f", {seeds} seeds (mean ±standard error)"
    if len({result.get("variant") for result in results}) > 1:
        title += ", equal rows of variants once"
    return f"{title}\n{format_rows(header, lines)}"


def _label(line: Line, seeds: int) -> str:
    """Its name, and the number of its seeds where a killed command has left some out."""
    count = len(line.results)
    return line.name if count == seeds else f"{line.name} ({count} of {seeds} seeds)"


def _trained(line: Line) -> str:
    """How the last stage of training ended, of all seeds where they ended alike, and which stages
    before it ended by time alone."""
    cut = dict.fromkeys(
        stage
        for result in line.results
        for stage in list(result["stages"])[:-1]
        if result["stages"][stage].get("stopped") == "time"
    )
    lasts = [list(result["stages"].values() or [{}])[-1] for result in line.results]
    counts = [
        f"{last['epochs']} ep" if last.get("epochs") else f"{last.get('steps', 0)} steps"
        for last in lasts
    ]
    ends = dict.fromkeys(_EPOCHS_CUT.get(last.get("stopped", ""), "-") for last in lasts)
    count = counts[0] if len({*counts}) == 1 else f"{len(counts)} seeds"
    early = "".join(f", {stage}: time up" for stage in cut)
    return f"{count}, {' or '.join(ends)}{early}"

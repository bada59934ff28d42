"""Where each test user's target stood: the file a run leaves, and the comparison of two runs by it.

    python -m recbole_mm.report.places RUN[:ROW] RUN[:ROW] [--metric ndcg@10]
    python -m recbole_mm.report.places --results FILE NAME[:ROW] NAME[:ROW]

Two models are compared on the same users: each user's value by the first less that by the second,
and the mean of these differences is resampled over users (paired bootstrap). Several runs of one
side, such as other seeds, are given with commas: a user's value is then their mean. With a result
file, what it holds is named instead, each with all its seeds: a model, a variant of a recipe, or
both ("PRIME whole:ranker").
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from recbole_mm.errors import UserError, nearest, told

PLACES = "places.tsv"
WITH_PLACES = ("recall", "hit", "ndcg", "mrr")  # metrics that the place of one target gives
Floats = NDArray[np.float64]
_WHOLE = "result"  # the name of the only row of a model that has no others
_AT_ONCE = 1 << 22  # numbers drawn together


def write_places(
    path: Path, dataset: Any, places: Mapping[str, tuple[Tensor, Tensor] | None]
) -> None:
    """Writes a line a test user: its token, and the place of its target by each row of the result.

    Places count from 1; 0 is beyond the longest `topk`. Nothing is written where a user has several
    targets.

    Args:
        path: the file.
        dataset: RecBole's, which knows the users' tokens.
        places: of each row of the result, user ids and places. Shapes: (N,).
    """
    kept = {name: found for name, found in places.items() if found is not None}
    users = [found[0].tolist() for found in kept.values()]
    if not kept or any(len(set(row)) < len(row) or row != users[0] for row in users):
        return
    tokens = dataset.id2token(dataset.uid_field, users[0])
    columns = [found[1].tolist() for found in kept.values()]
    with path.open("w", encoding="utf-8", newline="") as file:
        out = csv.writer(file, delimiter="\t", lineterminator="\n")
        out.writerow(["user", *(name or _WHOLE for name in kept)])
        out.writerows(
            [token, *(f"{x:g}" for x in row)] for token, *row in zip(tokens, *columns, strict=True)
        )


def read_places(run: str) -> dict[str, float]:
    """The place of each user's target, from `RUN` or `RUN:ROW`.

    Raises:
        UserError: there is no such file or row.
    """
    folder, _, row = run.partition(":")
    path = Path(folder) / PLACES
    if not path.is_file():
        raise UserError(f"{path} is not there: name a finished run with one target a user.")
    with path.open(encoding="utf-8", newline="") as file:
        header, *lines = csv.reader(file, delimiter="\t")
    row = row or _chosen(Path(folder), header)
    if row not in header[1:]:
        raise UserError(
            f"{path} has no row '{row}'{nearest(row, header[1:])}: it has {', '.join(header[1:])}."
        )
    at = header.index(row)
    return {line[0]: float(line[at]) for line in lines}


def _chosen(folder: Path, header: Sequence[str]) -> str:
    """The row that is the run's result."""
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return next((row["name"] for row in result["rows"] if row["chosen"]), header[1])


def values(places: Floats, metric: str) -> Floats:
    """Each user's metric with one target.

    Args:
        places: 1 is the top, 0 beyond all lists. Shape: (N,).
        metric: `recall@k`, `hit@k`, `ndcg@k` or `mrr@k`.

    Raises:
        UserError: another metric.
    """
    name, _, k = metric.lower().partition("@")
    if name not in WITH_PLACES or not k.isdecimal():
        raise UserError(f"--metric: '{metric}' is none of recall@k, hit@k, ndcg@k, mrr@k.")
    inside = (places > 0) & (places <= int(k))
    safe = np.where(inside, places, 1.0)
    gain = {"ndcg": 1 / np.log2(safe + 1), "mrr": 1 / safe}.get(name, np.ones_like(safe))
    return np.where(inside, gain, 0.0)


@dataclass(frozen=True)
class Comparison:
    """Two models on the same users.

    Attributes:
        users: how many.
        first: the mean of the first.
        second: the mean of the second.
        low: of the difference first - second: the lower end of its 95 % interval.
        high: the upper end.
    """

    users: int
    first: float
    second: float
    low: float
    high: float

    @property
    def differ(self) -> bool:
        """Whether zero lies outside the interval."""
        return self.low > 0 or self.high < 0


def compare(first: Floats, second: Floats, resamples: int = 10_000, seed: int = 0) -> Comparison:
    """Paired bootstrap over users of the difference of two means (Efron 1979, percentiles).

    Args:
        first: each user's value. Shape: (N,).
        second: of the same users. Shape: (N,).
        resamples: draws of N users with replacement.
        seed: of the draws.
    """
    gap, rng = first - second, np.random.default_rng(seed)
    # Most users differ not at all or alike: a resample is a draw of how often each value occurs.
    kinds, counts = np.unique(gap, return_counts=True)
    at_once = max(1, _AT_ONCE // len(kinds))
    means = [
        rng.multinomial(len(gap), counts / len(gap), size=min(at_once, resamples - done)) @ kinds
        for done in range(0, resamples, at_once)
    ]
    low, high = np.quantile(np.concatenate(means) / len(gap), (0.025, 0.975))
    return Comparison(len(gap), float(first.mean()), float(second.mean()), float(low), float(high))


def side(runs: Sequence[str], metric: str) -> dict[str, float]:
    """Each user's value: of several runs `RUN[:ROW]`, the mean over them.

    Raises:
        UserError: the runs tested different users.
    """
    found = []
    for run in runs:
        places = read_places(run)
        found.append(dict(zip(places, values(np.array([*places.values()]), metric), strict=True)))
        _check_reach(run, metric)
        if found[-1].keys() != found[0].keys():
            raise UserError(f"{run} tested other users than the runs before it: compare like runs.")
    if not found:
        raise UserError("No run is named: write saved/MODEL-DATASET-ID.")
    return {user: float(np.mean([values[user] for values in found])) for user in found[0]}


def compare_sides(one: Mapping[str, float], other: Mapping[str, float]) -> Comparison:
    """`compare` of values by user.

    Raises:
        UserError: they are of different users.
    """
    if one.keys() != other.keys():
        raise UserError("The two sides tested different users: compare runs of one dataset.")
    return compare(np.array([*one.values()]), np.array([other[user] for user in one]))


def named(results: Sequence[Mapping[str, Any]], name: str) -> list[Mapping[str, Any]]:
    """The results of one model or variant, a seed each.

    Args:
        results: as a result file holds them.
        name: `MODEL`, `VARIANT` or `MODEL VARIANT`, perhaps with `:ROW` behind.

    Raises:
        UserError: there is none of this name, or several.
    """
    bare, known = name.partition(":")[0], dict[str, list[Mapping[str, Any]]]()
    for result in results:
        model, variant = str(result["model"]), result.get("variant")
        for key in {model, str(variant or model), f"{model} {variant or ''}".strip()}:
            known.setdefault(key, []).append(result)
    found = known.get(bare, [])
    if not found:
        raise UserError(
            f"There is no model or variant '{bare}'{nearest(bare, known)} among the results: there "
            f"are {', '.join(known)}."
        )
    whole = dict.fromkeys(f"{r['model']} {r.get('variant') or ''}".strip() for r in found)
    if len(whole) > 1:
        raise UserError(f"'{bare}' may be {' or '.join(whole)}: name one of them.")
    return found


def _runs(names: str, results: str | None) -> list[str]:
    """The runs that a side names: their folders with commas, or something of a result file."""
    if results is None:
        return [name for name in names.split(",") if name]
    try:
        found = json.loads(Path(results).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--results: {results} cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise UserError(f"--results: {results} is no JSON ({error}).") from error
    found = found if isinstance(found, list) else [found]
    if not all(isinstance(result, dict) and "run_dir" in result for result in found):
        raise UserError(f"--results: {results} is no result file of run_recbole_mm.py.")
    row = names.partition(":")[2]
    return [f"{r['run_dir']}:{row}" if row else r["run_dir"] for r in named(found, names)]


def _check_reach(run: str, metric: str) -> None:
    """Raises `UserError` where a run looked at shorter lists than the metric does."""
    folder = Path(run.partition(":")[0])
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    longest, k = max(result.get("config", {}).get("topk") or [0]), int(metric.partition("@")[2])
    if 0 < longest < k:
        raise UserError(f"{folder} looked at {longest} items a user: take no longer a metric.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the comparison. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m recbole_mm.report.places", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("first", help="RUN[:ROW], several with commas")
    parser.add_argument("second", help="the same")
    parser.add_argument("--results", help="a result file, whose models or variants are compared")
    parser.add_argument("--metric", default="ndcg@10", help="recall@k, hit@k, ndcg@k or mrr@k")
    args = parser.parse_args(arguments)
    try:
        one, other = (
            side(_runs(names, args.results), args.metric) for names in (args.first, args.second)
        )
        found = compare_sides(one, other)
    except UserError as error:
        print(told(error), file=sys.stderr)
        return 1
    print(
        f"{args.metric} of {found.users} users: {found.first:.4f} and {found.second:.4f}, "
        f"difference {found.first - found.second:+.4f} (95 %: {found.low:+.4f} to "
        f"{found.high:+.4f}){'' if found.differ else ', which may be chance'}"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

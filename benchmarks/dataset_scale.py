"""From many lines of reviews to atomic files: time and memory, beside plain pandas.

    python benchmarks/dataset_scale.py --lines 1000000,10000000 --work DIR

A file of reviews in the form of Amazon's release of 2014 is made, with users and items as skewed as
there and texts that nobody needs, and a file of products. Then it becomes a dataset twice, each in
a process of its own: by `python -m dataset_tools amazon2014`, and by pandas as one would write it
in a notebook (read_json, the same 5-core, to_csv; products as the source's page reads them). Peak
memory, seconds and lines a second of both go to benchmarks/results/dataset_scale.json, and whether
both kept the same histories and as many products. pandas keeps all texts in memory: above
--pandas_lines it is left out.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "dataset_scale.json"
DAY = 86_400
SUFFIXES = ("inter", "text", "urls")
TEXT = "It works as it should and came in time, the colour is not quite that of the picture. "
PANDAS = """
import ast
import gzip
import sys
import pandas as pd
source, products, out = sys.argv[1:]
rows = pd.read_json(source, lines=True, compression="gzip", dtype=False)
rows = rows[["reviewerID", "asin", "unixReviewTime", "overall"]]
while True:
    users, items = rows.reviewerID.value_counts(), rows.asin.value_counts()
    kept = rows.reviewerID.map(users).ge(5) & rows.asin.map(items).ge(5)
    if kept.all():
        break
    rows = rows[kept]
rows = rows.assign(first=rows.groupby("reviewerID", sort=False).ngroup())
rows = rows.sort_values(["first", "unixReviewTime"], kind="stable").drop(columns="first")
rows.to_csv(f"{out}.inter", sep="\\t", index=False)
with gzip.open(products, "rt") as file:
    frame = pd.DataFrame(ast.literal_eval(line) for line in file)
frame = frame[frame.asin.isin(rows.asin.unique())]
frame["categories"] = [" > ".join(paths[0]) for paths in frame.categories]
frame[["asin", "imUrl"]].to_csv(f"{out}.urls", sep="\\t", index=False)
frame.drop(columns="imUrl").to_csv(f"{out}.text", sep="\\t", index=False)
"""


def make_reviews(path: Path, lines: int, batch: int = 100_000) -> None:
    """Users with a dozen reviews on average, few with very many; items likewise."""
    rng = np.random.default_rng(0)
    users, items = max(10, lines // 12), max(10, lines // 25)
    with gzip.open(path, "wt", compresslevel=1, encoding="ascii") as file:
        for start in range(0, lines, batch):
            n = min(batch, lines - start)
            user = (users * rng.random(n) ** 1.5).astype(int)
            item = (items * rng.random(n) ** 2.5).astype(int)
            days, stars = rng.integers(12_000, 16_000, n), rng.integers(1, 6, n)
            texts = rng.integers(1, 8, n)
            file.writelines(
                f'{{"reviewerID": "A{u:013d}", "asin": "B{i:09d}", "helpful": [0, 0], '
                f'"reviewText": "{TEXT * int(t)}", "overall": {s}.0, "summary": "Good", '
                f'"unixReviewTime": {d * DAY}}}\n'
                for u, i, d, s, t in zip(
                    user.tolist(), item.tolist(), days.tolist(), stars.tolist(), texts.tolist(),
                    strict=True,
                )
            )  # fmt: skip


def make_products(path: Path, lines: int) -> None:
    """Two thirds of the items have a record, as Python writes it."""
    with gzip.open(path, "wt", compresslevel=1, encoding="ascii") as file:
        for item in range(max(10, lines // 25)):
            if item % 3:
                file.write(
                    f"{{'asin': 'B{item:09d}', 'title': 'A thing of number {item}', 'price': 9.99, "
                    f"'categories': [['Things', 'Odd']], 'description': '{TEXT * 4}', "
                    f"'imUrl': 'http://pictures.example/{item}.jpg'}}\n"
                )


def timed(command: list[str]) -> dict[str, float]:
    """Seconds and peak resident memory of a command in a process of its own."""
    started = time.perf_counter()
    child = subprocess.Popen(command, cwd=ROOT)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{command[:4]} ended with {child.returncode}")
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_mb": round(usage.ru_maxrss / 1024),
    }


def rated(cost: dict[str, float], lines: int) -> dict[str, float]:
    """With lines a second, by the clock and of one core's work: others may share the machine."""
    return {
        **cost,
        "lines_per_second": round(lines / cost["seconds"]),
        "lines_per_cpu_second": round(lines / cost["cpu_seconds"]),
    }


def count(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file) - 1


def histories(path: Path) -> dict[str, list[list[str]]]:
    """Items and times of each user, in order."""
    found: dict[str, list[list[str]]] = {}
    with path.open(encoding="ascii") as file:
        next(file)
        for line in file:
            user, *rest = line.split("\t")[:3]
            found.setdefault(user, []).append(rest)
    return found


def measure(lines: int, work: Path, pandas_lines: int) -> dict[str, Any]:
    """One size: the files are made where they are not there yet."""
    work.mkdir(parents=True, exist_ok=True)
    reviews, products = work / "reviews_Big_5.json.gz", work / "meta_Big.json.gz"
    if not reviews.is_file():
        make_products(products, lines)
        make_reviews(work / "draft.gz", lines)
        os.replace(work / "draft.gz", reviews)
    ours = timed([
        *(sys.executable, "-m", "dataset_tools", "amazon2014", "--category=Big", "--force"),
        *(f"--raw_dir={work}", f"--out={work}"),
    ])  # fmt: skip
    inter = work / "amazon-big" / "amazon-big.inter"
    made = {suffix: count(inter.with_suffix(f".{suffix}")) for suffix in SUFFIXES}
    result: dict[str, Any] = {
        "lines": lines,
        "packed_mb": round(reviews.stat().st_size / 2**20),
        "made": made,
        "ours": rated(ours, lines),
    }
    print(json.dumps(result), flush=True)
    if lines > pandas_lines:
        return {**result, "pandas": f"left out above {pandas_lines:,} lines: see its peak_mb there"}
    command = [sys.executable, "-c", PANDAS, str(reviews), str(products), str(work / "pandas")]
    other = timed(command)
    return {
        **result,
        "pandas": rated(other, lines),
        "same_counts": made == {suffix: count(work / f"pandas.{suffix}") for suffix in SUFFIXES},
        "same_histories": histories(inter) == histories(work / "pandas.inter"),
        "seconds_ratio": round(other["seconds"] / ours["seconds"], 2),
        "cpu_seconds_ratio": round(other["cpu_seconds"] / ours["cpu_seconds"], 2),
        "memory_ratio": round(other["peak_mb"] / ours["peak_mb"], 1),
    }


def main() -> None:
    """Parses flags, measures, writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lines", default="1000000", help="sizes, with commas between")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--pandas_lines", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    load = round(os.getloadavg()[0], 1)  # above 0, others share the machine
    sizes = [int(word) for word in args.lines.split(",")]
    runs = [measure(lines, args.work / str(lines), args.pandas_lines) for lines in sizes]
    machine = {"machine": platform.machine(), "python": platform.python_version()}
    text = json.dumps({**machine, "threads": 1, "load_before": load, "runs": runs}, indent=1)
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()

"""What preference optimisation of PRIME's retriever is worth, against controls of the same length.

    python benchmarks/prime_preference.py --dataset mm-demo --work DIR

A retriever and a ranker are trained once a seed. From them the stage `preference` runs with the
ranker's preferences at several weights `beta`, with a coin in the ranker's place, with the truth
alone, and with cross entropy alone (`none`): the same steps, learning rate and dropout each, and
the best validation decides, that of the start included, as ever. Where the start stays the best,
test results are all alike: so the validation after the last step is compared too, on all users.
Means over seeds, their standard errors and the differences to `none` of the same seed go to
benchmarks/results/, with a paired bootstrap over the test's users.

Results are kept in DIR, one a run: a killed benchmark goes on where it was. `--part 0/2` and
`--part 1/2` share the runs; start the second when the first has its retrievers and rankers.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from runs import ROOT, run, spread

sys.path.insert(0, str(ROOT))

from recbole_mm.report.places import compare_sides, side

RESULTS = ROOT / "benchmarks" / "results" / "prime_preference.json"
METRICS = ("recall@10", "ndcg@10")
SETTINGS = {  # enough for a tiny retriever to move
    "preference_epochs": "100",
    "preference_learning_rate": "5e-4",
    "preference_warmup_steps": "5",
    "preference_eval_every": "20",
    "preference_valid_users": "0",
}


def variants(betas: list[str], controls: list[str]) -> list[tuple[str, str]]:
    """(labeler, beta) of every run of a seed; `none` first, with which the others are compared."""
    asked = [("ranker", beta) for beta in betas]
    return [("none", "0"), *asked, *((name, b) for b in controls for name in ("random", "truth"))]


def summary(work: Path, seeds: list[str], runs: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """A row a variant over the seeds that are there: means, standard errors, differences."""
    rows = []
    for labeler, beta in runs:
        found = {s: read(work, s, labeler, beta) for s in seeds}
        pairs = {s: (one, read(work, s, "none", "0")) for s, one in found.items() if one}
        row: dict[str, Any] = {"labeler": labeler, "beta": float(beta), "seeds": list(pairs)}
        for part, metric in ((p, m) for p in ("test", "last_valid") for m in METRICS):
            values = [one[part][metric] for one, _ in pairs.values()]
            gaps = [one[part][metric] - none[part][metric] for one, none in pairs.values() if none]
            row[f"{part} {metric}"] = spread(values)
            row[f"{part} {metric} - none"] = spread(gaps)
        row |= {f"test {m} - none, 95 % of users": over_users(work, pairs, m) for m in METRICS}
        stages = [one["stages"]["preference"] for one, _ in pairs.values()]
        for key in ("ranker_calls", "best_step", "retrieval_rate"):
            row[key] = [stage[key] for stage in stages]
        rows.append(row)
    return rows


def over_users(work: Path, pairs: dict[str, Any], metric: str) -> list[float]:
    """From where to where the test's difference to `none` may lie: users drawn again."""
    both = [(one, none) for one, none in pairs.values() if none]
    if not both:
        return []
    of_runs = [
        side([str(work / r["run_dir"]) for r in runs], metric) for runs in zip(*both, strict=True)
    ]
    found = compare_sides(of_runs[0], of_runs[1])
    return [round(found.low, 6), round(found.high, 6)]


def read(work: Path, seed: str, labeler: str, beta: str) -> dict[str, Any] | None:
    """The result of a run with its last validation, or None where it has not ended."""
    path = work / f"{seed}-{labeler}-{beta}.json"
    if not path.is_file():
        return None
    log = path.with_suffix(".log").read_text(encoding="utf-8")
    at_end = re.findall(
        r"preference step \d+ evaluating.*?valid result.*?\n(.*?)\n", log, re.DOTALL
    )[-1]
    found = {name: float(value) for name, value in re.findall(r"(\S+@\d+) : ([\d.]+)", at_end)}
    return {**json.loads(path.read_text(encoding="utf-8")), "last_valid": found}


def main() -> None:
    """Parses flags, runs what is missing, writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="mm-demo")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", default="2020,2021,2022")
    parser.add_argument("--betas", default="0.01,0.1,0.2,1")
    parser.add_argument("--controls", default="0.2,1", help="betas of random and truth")
    parser.add_argument("--steps", default="60")
    parser.add_argument("--part", default="0/1")
    parser.add_argument("--flags", nargs="*", default=[], help="more keys for every run, key=value")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    betas, controls = (list(filter(None, text.split(","))) for text in (args.betas, args.controls))
    seeds, runs = args.seeds.split(","), variants(betas, controls)
    more = dict(flag.split("=", 1) for flag in args.flags)
    common = {"dataset": args.dataset, "show_progress": "False"}
    mine, parts = map(int, args.part.split("/"))
    jobs = [(seed, labeler, beta) for seed in seeds for labeler, beta in runs]
    for seed, labeler, beta in jobs[mine::parts]:
        flags = {**common, "seed": seed}
        base = run(args.work, f"{seed}-base", {**flags, **more, "stages": "retriever,ranker"})
        flags |= {**SETTINGS, "labeler": labeler, "beta": beta, "preference_max_steps": args.steps}
        flags |= more
        flags |= {"retriever_from": base["run_dir"], "ranker_from": base["run_dir"]}
        run(args.work, f"{seed}-{labeler}-{beta}", flags)
    result = {
        "dataset": args.dataset,
        "steps": int(args.steps),
        **SETTINGS,
        **{key: value for key, value in more.items() if not key.endswith("_from")},  # places
        "rows": summary(args.work, seeds, runs),
    }
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for row in result["rows"]:
        print(row["labeler"], row["beta"], row["last_valid ndcg@10 - none"])


if __name__ == "__main__":
    main()

"""Does MLLM-MSR learn from pictures? In `mm-demo` only they say what is bought.

    python benchmarks/mllmmsr_pictures.py --out DIR

Each seed trains the tiny backbone as `--model=MLLMMSR --dataset=mm-demo` does, through all stages:

- pictures: as it is.
- words alone: titles in descriptions and in questions, no pictures anywhere.
- pictures permuted: each item has the picture of another, so that they say nothing.

All rank the same lists of 21 for all users. Results over seeds go to
benchmarks/results/mllmmsr_pictures.json. What is in DIR is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from runs import ROOT, run, spread

RESULTS = ROOT / "benchmarks" / "results" / "mllmmsr_pictures.json"
METRICS = ("auc", "gauc", "recall@5", "mrr@5")
COMMON = {"data_path": "dataset", "show_progress": "False"}
VARIANTS = {
    "pictures": {"dataset": "mm-demo"},
    "words alone": {
        "dataset": "mm-demo",
        "use_candidate_image": "False",
        "item_text": "title",
    },
    "pictures permuted": {"dataset": "mm-demo-permuted"},
}


def measure(work: Path, variant: str, seed: int) -> dict[str, Any]:
    """The result of one variant with one seed."""
    name = f"{seed}-{variant.replace(' ', '-')}"
    return run(work, name, {**COMMON, **VARIANTS[variant], "seed": str(seed)}, "MLLMMSR")


def gap(found: dict[str, list[dict[str, Any]]], other: str) -> dict[str, Any]:
    """How much more AUC there is with pictures, seed by seed, and how many standard errors."""
    pairs = zip(found["pictures"], found[other], strict=True)
    about = spread([a["test"]["auc"] - b["test"]["auc"] for a, b in pairs])
    return {**about, "errors": round(about["mean"] / about["error"], 1) if about["error"] else None}


def main() -> None:
    """Parses flags, runs, writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", default="2020,2021,2022")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="the first is pictures")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # of the runs
    args.out.mkdir(parents=True, exist_ok=True)
    seeds = [int(seed) for seed in args.seeds.split(",")]
    names = args.variants.split(",")
    found = {name: [measure(args.out, name, seed) for seed in seeds] for name in names}
    result = {
        "seeds": args.seeds,
        "test_users": found["pictures"][0]["test_users"],
        "test": {
            name: {key: spread([r["test"][key] for r in results]) for key in METRICS}
            for name, results in found.items()
        },
        "auc of pictures less": {name: gap(found, name) for name in names[1:]},
    }
    args.results.parent.mkdir(exist_ok=True)
    args.results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result["auc of pictures less"], indent=1))


if __name__ == "__main__":
    main()

"""What I-LLMRec learns from pictures, in two generated shops.

    python benchmarks/illmrec_pictures.py --out DIR

Both end in novelties that were sold on trial before, each equally often whatever its look; looks
are in the pictures and nowhere else.

- demo: `mm-demo`, all items ranked. One look appeals to all, and the last purchase tells where the
  next one stands: the item's CF vector is in the prompt. With and without pictures among the
  feature types, by a tiny language model and by the control without one. Trained on, a state that
  knows the place learns that novelties were tried whatever their look, so that validation has to
  stop it early.
- look: the same among 100 others, retrieved by pictures and words, or by words: what the look is
  worth where no CF vector of a candidate tells its place.
- taste: each user has a favourite look, and only the history's pictures tell which; targets are
  ranked among 100 others, as in the paper. Items are pictures in the prompt, and retrieved by all
  feature types, by all but pictures, or by pictures alone; these with alignment (ILA) too, and with
  brands in the prompt, which tell nothing.

Means, standard errors and differences over seeds go to benchmarks/results/illmrec_pictures.json.
Results that are in DIR are not made again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import yaml
from runs import ROOT, spread

from recbole_mm.data.demo import Sizes, make_demo

# Nothing appeals to all, a favourite 30 times as much; so many staples that novelties are sold as
# often as they are.
TASTE = Sizes(users=448, aisles=8, staples=4, appeal=1.0, taste=30.0)
RESULTS = ROOT / "benchmarks" / "results" / "illmrec_pictures.json"
METRICS = ("ndcg@10", "recall@10")
COMMON: dict[str, Any] = {
    "model": "ILLMRec",
    "backbone": "tiny",
    "topk": [5, 10, 20],
    "columns": {"brand": "brand"},  # titles say nothing, and prompts without them are short
    "ila_weight": 0.0,
    "alignment_batch_size": 64,
    "alignment_learning_rate": 3e-3,
    "alignment_warmup_steps": 20,
    "show_progress": False,
}
NO_PICTURES = {"cf_from": "all", "ire_features": ["cf", "text"]}
ALONE = {"cf_from": "all", "ire_features": ["img"]}
DEMO: dict[str, Any] = {
    "dataset": "mm-demo",
    "cf_stopping_step": 40,  # for some epochs nothing is found that validates
    "cf_epochs": 40,
    "dropout_prob": 0.2,
    "attn_dropout_prob": 0.2,
    "item_repr": "cf",
    "max_history": 1,
    "n_neg": 64,
}
PARTS: dict[str, dict[str, Any]] = {
    "demo": {
        **DEMO,
        "alignment_max_steps": 120,
        "alignment_eval_every": 15,
        "alignment_stopping_step": 8,
        "variants": {
            "all": {},
            "without pictures": NO_PICTURES,
            "no language model": {"cf_from": "all", "use_llm": False},
            "neither": {**NO_PICTURES, "use_llm": False},
        },
        "pairs": [("all", "without pictures"), ("no language model", "neither")],
    },
    "look": {
        **DEMO,
        "eval_candidates": "cand100",
        "alignment_max_steps": 200,
        "alignment_eval_every": 20,
        "variants": {
            "pictures and words": {"ire_features": ["img", "text"]},
            "words": {"cf_from": "pictures and words", "ire_features": ["text"]},
        },
        "pairs": [("pictures and words", "words")],
    },
    "taste": {
        "dataset": "mm-taste",
        "cf_epochs": 20,
        "cf_stopping_step": 20,
        "dropout_prob": 0.2,
        "attn_dropout_prob": 0.2,
        "eval_candidates": "cand100",
        "item_repr": "image",
        "max_history": 1,  # novelties on trial come early: lengths would tell them
        "n_neg": 8,
        "alignment_max_steps": 200,
        "alignment_eval_every": 50,
        "alignment_valid_users": 300,
        "variants": {
            "all": {},
            "without pictures": NO_PICTURES,
            "pictures alone": ALONE,
            "with alignment": {**ALONE, "ila_weight": 1.0},
            "told by brands": {**ALONE, "item_repr": "attribute"},
        },
        "pairs": [
            ("all", "without pictures"),
            ("pictures alone", "told by brands"),
            ("with alignment", "pictures alone"),
        ],
    },
}


def results_of(work: Path, part: str, seeds: list[int]) -> list[dict[str, Any]]:
    """The runs of a part by one command, from the disk where they are there."""
    path = work / f"{part}.json"
    if not path.is_file():
        recipe = {**COMMON, **PARTS[part], "seed": seeds}
        del recipe["pairs"]
        (work / f"{part}.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
        command = [sys.executable, str(ROOT / "run_recbole_mm.py"), f"--config_files={part}.yaml"]
        with (work / f"{part}.log").open("w") as log:
            command += ["--data_path=dataset", "--resume", f"--result_file={path.name}"]
            subprocess.run(command, cwd=work, stdout=log, stderr=log, check=True)
    found = json.loads(path.read_text(encoding="utf-8"))
    return found if isinstance(found, list) else [found]


def values(results: list[dict[str, Any]], variant: str, metric: str) -> list[float]:
    """Of a variant, by seed."""
    of = {r["seed"]: r["test"][metric] for r in results if r["variant"] == variant}
    return [of[seed] for seed in sorted(of)]


def measure(work: Path, part: str, seeds: list[int]) -> dict[str, Any]:
    """Metrics of each variant, and differences of pairs by seed."""
    results, found = results_of(work, part, seeds), dict[str, Any]()
    for metric in METRICS:
        of = {name: values(results, name, metric) for name in PARTS[part]["variants"]}
        gaps = {
            f"{one} - {other}": spread([a - b for a, b in zip(of[one], of[other], strict=True)])
            for one, other in PARTS[part]["pairs"]
        }
        found[metric] = {name: spread(numbers) for name, numbers in of.items()} | gaps
    return found


def main() -> None:
    """Parses flags, makes the shops, measures, writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", default="2020,2021,2022")
    parser.add_argument("--parts", default="demo,look,taste")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    parts = args.parts.split(",")
    for name in {PARTS[part]["dataset"] for part in parts} - {"mm-demo"}:
        if not (args.out / "dataset" / name).is_dir():
            make_demo(args.out / "dataset" / name, sizes=TASTE)
    seeds = [int(seed) for seed in args.seeds.split(",")]
    result = {"seeds": args.seeds, **{part: measure(args.out, part, seeds) for part in parts}}
    args.results.parent.mkdir(exist_ok=True)
    args.results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

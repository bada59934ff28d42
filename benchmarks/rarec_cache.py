"""RA-Rec's training step and evaluation against computing anew what cannot have changed.

    python benchmarks/rarec_cache.py --data_path dataset                     # MiniLM, Amazon Beauty
    python benchmarks/rarec_cache.py --dataset mm-demo --backbone tiny       # the small form
    python benchmarks/rarec_cache.py --data_path dataset --device cuda --dtype bfloat16 \
        --batch 128 --users 2000 --few_users 64

Each part compares two ways that must agree, in turn, in one process; medians, quartiles and ratios
go to benchmarks/results/rarec_cache.json. On a CPU seconds are those that the process was given, of
all its threads, so that neighbours on the machine do not count. The ID model is untrained and so is
the alignment: neither changes what a step costs.

- step: an alignment step, forward and backward, with text-only states kept on disk, or computed in
  every step. They are kept in float16: losses and gradients agree as far as that goes. Again
  without the teacher, which the paper has none of (`distill`).
- evaluation: all test users of `--few_users` users, whose items are all that are ranked. Every item
  and user encoded once, or items anew for every `--users_at_once` users: what scoring pairs comes
  to, 4,096 of which are scored at once, so that one user at a time meets Beauty's 12,101 items.
  Nothing is extrapolated: both ways run in full.
- buckets: texts in groups of like length, or as they come, with as many padded tokens at once.
- equal: items of `--texts` samples (liked ones and drawn ones), encoded once each or as often as
  they occur, forward and backward.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from recbole_mm.backbone.batch import by_length
from recbole_mm.backbone.text_states import TOKENS_AT_ONCE, TextStates
from recbole_mm.config import MMConfig
from recbole_mm.machine import peak_memory_mb, reset_peak_memory
from recbole_mm.quick_start import build_model, prepare_data
from recbole_mm.trainer.run import Run
from recbole_mm.trainer.staged import StagedTrainer

Ints = NDArray[np.int64]
RESULTS = Path(__file__).resolve().parent / "results" / "rarec_cache.json"
USERS = 1024  # a batch of the evaluation, the default of eval_batch_size
GOALS = {"step": 1.4, "evaluation": 10.0}
TOLERANCE = {"float32": 2e-3, "bfloat16": 0.05, "float16": 0.02}  # of the largest value


@dataclass
class Shop:
    """A model that has taken its ID vectors, and what it is tuned and tested on."""

    model: Any
    stage: Any
    rows: Any  # of the test


def shop_of(args: argparse.Namespace, users: int, folder: Path, **more: Any) -> Shop:
    """A shop of a seeded sample of users, and the items these bought; `more` keys of the run."""
    keys = {
        "backbone": args.backbone,
        "dtype": args.dtype,
        "limit_users": users,
        "max_user_tokens": args.max_user_tokens,
        "score_tokens": args.tokens,
        "tune": "alignment",  # the tiny form trains all its weights otherwise
        "topk": [10],
        "alignment_epochs": 0,  # text states are computed when they are asked for
        "cache_dir": str(folder / "cache"),
        "gpu_id": "" if args.device == "cpu" else "0",
        "show_progress": False,
        "state": "ERROR",
        **more,
    }
    if args.data_path:
        keys["data_path"] = args.data_path
    config = MMConfig("RARec", args.dataset, overrides=keys)
    data = prepare_data(config)
    model = build_model(config, data)
    if model.device.type != args.device:
        raise SystemExit(f"--device is {args.device}, but this machine gives {model.device.type}")
    trainer = StagedTrainer(config, model, Run.start(folder / "saved", config))
    trainer.data_collect(data.train)
    trainer._open(data.train, data.valid, show_progress=False)
    stage = trainer.stages[-1]
    stage.prepare(trainer.context)
    model.enter("alignment")
    model.eval()
    return Shop(model, stage, data.test._dataset.inter_feat)


class LiveStates(TextStates):
    """Text states that are computed when they are asked for, in groups of like length."""

    def get(self, rows: Sequence[Ints]) -> Tensor:
        groups = list(by_length(list(map(len, rows)), TOKENS_AT_ONCE))
        model = self.model
        found = [model.layer_means(model.padded([rows[i] for i in group])) for group in groups]
        order = torch.tensor([row for group in groups for row in group])
        return torch.cat(found, dim=1)[:, order.argsort()]  # (N, B, H)


# --- what is compared -----------------------------------------------------------------------------

Way = Callable[[], Tensor]


def step(shop: Shop, args: argparse.Namespace, folder: Path) -> tuple[Way, Way]:
    """The loss and the gradient of one batch of the stage's plan."""
    batch = max(shop.stage.plan(0), key=lambda entry: len(entry.samples))
    batch = type(batch)(batch.samples[: args.batch], batch.seed)
    kept = shop.model.text_states
    live = LiveStates(kept.model, folder / "never", frozen=False)
    trained = [p for p in shop.stage.module.parameters() if p.requires_grad]

    def way(states: TextStates) -> Way:
        def go() -> Tensor:
            shop.model.text_states = states
            for parameter in trained:
                parameter.grad = None
            loss = shop.stage.loss(batch)
            loss.backward()
            parts = [loss.detach()[None], *(p.grad.flatten() for p in trained)]
            return torch.cat([part.float().cpu() for part in parts])

        return go

    return way(kept), way(live)


def evaluation(shop: Shop, users_at_once: int) -> tuple[Way, Way]:
    """Scores of all items for all test users."""
    model, rows = shop.model, shop.rows

    def score(users: int, anew: bool) -> Tensor:
        model.forget()
        found = []
        for part in torch.arange(len(rows)).split(users):
            if anew:
                model.forget()
            found.append(model.full_sort_predict(rows[part].to(model.device)).cpu())
        return torch.cat(found)

    return lambda: score(USERS, anew=False), lambda: score(users_at_once, anew=True)


def as_they_come(rows: Sequence[Ints], tokens: int) -> list[list[int]]:
    """Row numbers in their order, in groups of at most `tokens` padded tokens."""
    groups: list[list[int]] = [[]]
    for row in range(len(rows)):
        longest = max(len(rows[i]) for i in (*groups[-1], row))
        if groups[-1] and longest * (len(groups[-1]) + 1) > tokens:
            groups.append([])
        groups[-1].append(row)
    return groups


def encode(shop: Shop, side: str, texts: Sequence[Ints], vectors: Tensor, groups: Any) -> Tensor:
    """Vectors of texts with their prefixes, group by group. (B, D) -> (B, H)."""
    aligned, found = shop.model.aligned, []
    for group in groups:
        prefix = aligned.sides[side](vectors[group])
        batch = aligned.language_model.padded([texts[row] for row in group])
        found.append(aligned.language_model.vectors(batch, prefix=prefix))
    order = torch.tensor([row for group in groups for row in group], device=vectors.device)
    return torch.cat(found)[order.argsort()]


def buckets(
    shop: Shop, side: str, count: int, tokens: int
) -> tuple[tuple[Way, Way], dict[str, int]]:
    """The first `count` texts of a side, with how many tokens there are and how many each way
    reads, padding among them."""
    model = shop.model
    if side == "user":
        ids, ends = shop.rows[model.ITEM_SEQ].numpy(), shop.rows[model.ITEM_SEQ_LEN].numpy()
        histories = [row[:end] for row, end in zip(ids[:count], ends[:count], strict=True)]
        texts, vectors = [model.texts.history(h) for h in histories], model.ids.users(histories)
    else:
        items = range(1, min(count + 1, model.n_items))
        texts, vectors = [model.texts.item(i) for i in items], model.item_ids[list(items)]
    ways = [list(by_length(list(map(len, texts)), tokens)), as_they_come(texts, tokens)]

    def way(groups: list[list[int]]) -> Way:
        def go() -> Tensor:
            with torch.no_grad():
                return encode(shop, side, texts, vectors, groups).cpu()

        return go

    ours, theirs = (sum(len(g) * max(len(texts[i]) for i in g) for g in groups) for groups in ways)
    counts = {"tokens": sum(map(len, texts)), "padded": ours, "padded_as_they_come": theirs}
    return (way(ways[0]), way(ways[1])), counts


def equal(shop: Shop, batch: int) -> tuple[Way, Way, int]:
    """A batch's items, forward and backward, with how many of them are different."""
    model, rng = shop.model, np.random.default_rng(0)
    rows = rng.permutation(len(shop.stage.samples))[:batch]
    liked = shop.stage.sequences.items[shop.stage.samples.place[rows]]
    items = np.concatenate([liked, rng.integers(1, model.n_items, len(rows))])  # (2B,)
    known, at = np.unique(items, return_inverse=True)

    def way(ids: Ints, place: Ints) -> Way:
        def go() -> Tensor:
            texts = [model.texts.item(item) for item in ids.tolist()]
            vectors = model.item_ids[torch.from_numpy(ids).to(model.device)]
            found = model.aligned.items(texts, vectors)[torch.from_numpy(place).to(model.device)]
            found.square().mean().backward()
            return found.detach().cpu()

        return go

    return way(known, at), way(items, np.arange(len(items))), len(known)


# --- measuring ------------------------------------------------------------------------------------


def compare(
    name: str, ours: Way, other: Way, args: argparse.Namespace, **said: Any
) -> dict[str, Any]:
    """Checks that two ways agree, which warms both up, and times them in turn."""
    one, two = ours(), other()
    difference = float((one - two).abs().max() / two.abs().max())
    if not difference < TOLERANCE[args.dtype]:
        raise SystemExit(f"{name}: the two ways differ by {difference}, nothing is timed")
    clock = time.process_time if args.device == "cpu" else time.perf_counter
    times: dict[str, list[float]] = {"ours": [], "other": []}
    for _ in range(args.repeats):
        for key, way in (("ours", ours), ("other", other)):
            start = clock()
            way()  # ends on the CPU, so that a GPU has done its work
            times[key].append(clock() - start)
    quartiles = {
        key: dict(zip(("q1", "median", "q3"), np.quantile(t, (0.25, 0.5, 0.75)).round(4).tolist(),
                      strict=True))
        for key, t in times.items()
    }  # fmt: skip
    ratios = np.array(times["other"]) / np.array(times["ours"])  # each pair, one after the other
    q1, median, q3 = np.quantile(ratios, (0.25, 0.5, 0.75)).round(2).tolist()
    found = {
        "ratio": median,
        "ratio_quartiles": [q1, q3],
        "goal": GOALS.get(name),
        "seconds": quartiles,
        "largest_relative_difference": difference,
        **said,
    }
    print(f"{name:16s} {found}", flush=True)
    return found


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All parts; the result."""
    shop = shop_of(args, args.users, folder)
    reset_peak_memory(shop.model.device)
    size = min(args.batch, len(shop.stage.samples))
    parts = {"step": compare("step", *step(shop, args, folder), args, samples=size)}
    alone = shop_of(args, args.users, folder, distill=0.0)
    name = "step, no teacher"
    parts[name] = compare(name, *step(alone, args, folder), args, samples=size)
    for side in ("user", "item"):
        ways, counts = buckets(shop, side, args.texts, args.tokens)
        parts[f"buckets, {side}s"] = compare(f"buckets, {side}s", *ways, args, **counts)
    size = min(args.texts, len(shop.stage.samples))
    once, each, different = equal(shop, size)
    parts["equal"] = compare("equal", once, each, args, items=2 * size, different=different)
    few = shop_of(args, args.few_users, folder)
    sizes = {"users": len(few.rows), "items": few.model.n_items - 1}
    ways = evaluation(few, args.users_at_once)
    parts["evaluation"] = compare("evaluation", *ways, args, **sizes)
    return {
        "trained": sum(p.numel() for p in shop.stage.module.parameters() if p.requires_grad),
        "peak_memory_mb": peak_memory_mb(shop.model.device),
        "parts": parts,
    }


def main() -> None:
    """Parses flags, measures, writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="amazon-beauty")
    parser.add_argument("--data_path", help="the folder of datasets")
    parser.add_argument("--backbone", default="minilm")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=TOLERANCE, help="of frozen weights")
    parser.add_argument("--batch", type=int, default=16, help="samples a step")
    parser.add_argument("--users", type=int, default=300, help="that samples are taken of")
    parser.add_argument("--texts", type=int, default=64, help="of a side, for buckets and equal")
    parser.add_argument("--few_users", type=int, default=16, help="of the evaluation")
    parser.add_argument("--users_at_once", type=int, default=1)
    parser.add_argument("--max_user_tokens", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=2048, help="padded tokens of a pass")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        found = run(args, Path(folder))
    result = {
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        **{k: v for k, v in vars(args).items() if k not in ("out", "data_path")},
        "tolerance": TOLERANCE[args.dtype],
        **found,
    }
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()

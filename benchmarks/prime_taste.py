"""Teaches a tiny Qwen2-VL to see which candidate looks like the history: for shops of taste.

    python benchmarks/prime_taste.py --out DIR

In `mm-demo` one look appeals to everybody, which a tiny backbone learns from scratch in minutes. In
a shop where each user has a favourite look, the ranker must compare candidates with the history,
which it does not learn there. So it is taught on pictures made for the purpose: histories of one
look, candidates of which one has it, more and more candidates as it gets better. DIR/backbone is
then a folder of weights and tokenizer for `--backbone`, and PRIME ranks with it, without any
training of its ranker, in a shop of other products and users:

- retriever, and the same without the history, whose items are no candidates of the rankers: what
  item ids know.
- ranker, taught: the weights of DIR/backbone as they are.
- ranker, taught, pictures permuted: the same where they say nothing.
- ranker, from scratch: the same sizes trained on the shop, as `--backbone=tiny` does; one seed.

Results over seeds go to benchmarks/results/prime_taste.json. What is in DIR is not made again.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn.utils import clip_grad_norm_

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from runs import ROOT, run, spread

from recbole_mm.backbone.families.qwen import Qwen2VL
from recbole_mm.backbone.load import Backbone, BackboneSpec
from recbole_mm.backbone.prompt import PromptStyle, PromptWriter
from recbole_mm.backbone.ranker import LetterRanker
from recbole_mm.backbone.tiny import TinySizes, build, train_tokenizer
from recbole_mm.backbone.verbalizer import Verbalizer
from recbole_mm.backbone.vision import ItemImages
from recbole_mm.data.demo import Sizes, make_demo
from recbole_mm.data.demo_pictures import LOOKS, OUTLINES, draw_product

RESULTS = ROOT / "benchmarks" / "results" / "prime_taste.json"
STYLE = PromptStyle("Next?", ("image",), 8)  # as `tiny` writes prompts
K, HISTORY, PIXELS = 10, 3, 56 * 56
LESSONS = (2, 4, 6, 8, K)  # candidates; the next when the last was learnt
LEARNT = 0.8  # share of right answers in the last `WINDOW` steps
WINDOW = 20
BATCH = 32
TASTE = Sizes(appeal=1.0, taste=30.0)  # nothing appeals to all, a favourite 30 times as much


# --- teaching -------------------------------------------------------------------------------------


class Pictures:
    """Products of every look, drawn for teaching alone.

    Args:
        of_each: how many of each look.
        seed: of the drawing.
    """

    def __init__(self, of_each: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.looks = np.repeat(np.arange(len(LOOKS)), of_each)
        self.files = [draw_product(int(k), int(rng.integers(OUTLINES)), rng) for k in self.looks]

    def open(self, item: int) -> Image.Image:
        return Image.open(io.BytesIO(self.files[item]))

    def of_look(self, look: int, n: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """`n` different products that have it."""
        return rng.choice(np.flatnonzero(self.looks == look), n, replace=False)

    def not_of_look(self, look: int, n: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """`n` different products that do not have it."""
        return rng.choice(np.flatnonzero(self.looks != look), n, replace=False)


def new_ranker(pictures: Pictures, seed: int) -> LetterRanker:
    """A tiny Qwen2-VL with random weights that answers prompts about the pictures."""
    sizes = TinySizes()
    chat = Qwen2VL.chat_head + Qwen2VL.chat_tail
    tokenizer = train_tokenizer(Qwen2VL, [], [chat, *STYLE.fixed_text()], sizes.vocab_size)
    spec = BackboneSpec(
        "looks", "qwen2_vl", "", PIXELS, PIXELS, dtype="float32", lora_r=0, is_tiny=True
    )
    backbone = Backbone(spec, build(Qwen2VL, sizes, tokenizer, seed, "sdpa"), tokenizer)
    images = ItemImages(backbone.family, pictures.open, lambda item: None, frozen=False)
    verbalizer = Verbalizer(backbone.encoder, K, backbone.family.answer_end)
    writer = PromptWriter(
        backbone.encoder, backbone.family, STYLE, lambda *_: None, images.piece, verbalizer.letters
    )
    return LetterRanker(backbone, images, writer, verbalizer)


def lesson(
    pictures: Pictures, candidates: int, rng: np.random.Generator
) -> tuple[list[NDArray[np.int64]], NDArray[np.int64], NDArray[np.int64]]:
    """Histories of one look each, candidates of which one has it, and its place."""
    histories, rows = [], []
    places = rng.integers(candidates, size=BATCH)
    for place in places:
        look = int(rng.integers(len(LOOKS)))
        seen = pictures.of_look(look, int(rng.integers(1, HISTORY + 1)) + 1, rng)
        row = pictures.not_of_look(look, candidates, rng)
        row[place] = seen[0]
        histories.append(seen[1:])
        rows.append(row)
    return histories, np.stack(rows), places


def teach(ranker: LetterRanker, pictures: Pictures, steps: int, seed: int) -> Iterator[str]:
    """Trains all weights; yields what there is to say."""
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(ranker.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 50, 5 * (1 - step / steps))
    )
    level, right, started = 0, list[float](), time.perf_counter()
    for step in range(1, steps + 1):
        histories, rows, places = lesson(pictures, LESSONS[level], rng)
        logits = ranker._letters(ranker._write(histories, rows), rows.shape[1])  # (B, K)
        target = torch.from_numpy(places)
        loss = torch.nn.functional.cross_entropy(logits, target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        clip_grad_norm_(ranker.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        right.append(float((logits.argmax(1) == target).float().mean()))
        share = float(np.mean(right[-WINDOW:]))
        if step % WINDOW == 0:
            seconds = time.perf_counter() - started
            yield f"step {step}, {LESSONS[level]} candidates, right {share:.2f}, {seconds:.0f} s"
        if share >= LEARNT and len(right) >= WINDOW and level < len(LESSONS) - 1:
            level, right = level + 1, []


# --- what it is worth in a shop -------------------------------------------------------------------

COMMON = {
    "data_path": "dataset",
    "stages": "retriever,ranker",
    "attributes": "[image]",
    "max_history_items": str(HISTORY),
    "candidate_mask_history": "True",  # nobody buys twice, and what was bought has the right look
    "dropout_prob": "0.2",
    "attn_dropout_prob": "0.2",
    "show_progress": "False",
}
TAUGHT = {
    "backbone": "backbone",
    "instruction": STYLE.instruction,
    "n_candidates": str(K),
    "min_pixels": str(PIXELS),
    "max_pixels": str(PIXELS),
    "lora_r": "0",
    "ranker_epochs": "0",  # nothing is trained
}
SCRATCH = {"backbone": "tiny", "neg_source": "uniform", "ranker_stopping_step": "8"}


def measure(work: Path, seed: int) -> dict[str, float]:
    """ndcg@10 over all test users by the retriever and by the taught ranker."""
    flags = {**COMMON, **TAUGHT, "seed": str(seed)}
    taught = run(work, f"{seed}-taught", {**flags, "dataset": "mm-taste"})
    permuted = run(work, f"{seed}-permuted", {**flags, "dataset": "mm-taste-permuted"})
    rows = {row["name"]: row["test"]["ndcg@10"] for row in taught["rows"]}
    names = ("retriever", "retriever masked")
    ndcg = {"taught": taught["test"]["ndcg@10"], "permuted": permuted["test"]["ndcg@10"]}
    return {**{name: rows[name] for name in names}, **ndcg}


def from_scratch(work: Path, seed: int) -> float:
    """The same of a ranker that is trained on the shop."""
    flags = {**COMMON, **SCRATCH, "seed": str(seed), "dataset": "mm-taste"}
    return float(run(work, f"{seed}-scratch", flags)["test"]["ndcg@10"])


def main() -> None:
    """Parses flags, teaches, measures, writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seeds", default="2020,2021,2022")
    parser.add_argument("--without-scratch", action="store_true", help="ten minutes less")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    backbone, lessons = args.out / "backbone", args.out / "lessons.json"
    if not lessons.is_file():
        pictures, said = Pictures(200, 0), []
        ranker = new_ranker(pictures, 0)
        for line in teach(ranker, pictures, args.steps, 0):
            print(line, flush=True)
            said.append(line)
        ranker.backbone.model.save_pretrained(backbone)
        ranker.backbone.tokenizer.save_pretrained(backbone)
        lessons.write_text(json.dumps(said))
    for name, permuted in (("mm-taste", False), ("mm-taste-permuted", True)):
        if not (args.out / "dataset" / name).is_dir():
            make_demo(args.out / "dataset" / name, permuted, sizes=TASTE)
    seeds = [int(seed) for seed in args.seeds.split(",")]
    found = [measure(args.out, seed) for seed in seeds]
    if not args.without_scratch:
        found[0]["from scratch"] = from_scratch(args.out, seeds[0])
    names = list(found[0])
    gaps = {
        f"taught - {name}": spread([round(f["taught"] - f[name], 6) for f in found if name in f])
        for name in names
        if name != "taught"
    }
    result = {
        "steps": args.steps,
        "last_lesson": json.loads(lessons.read_text())[-1],
        "seeds": args.seeds,
        "ndcg@10": {name: spread([f[name] for f in found if name in f]) for name in names},
        "differences": gaps,
    }
    args.results.parent.mkdir(exist_ok=True)
    args.results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result["ndcg@10"], indent=1))


if __name__ == "__main__":
    main()

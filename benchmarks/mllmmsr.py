r"""What MLLM-MSR's ways to compute save, each against the plain way in one process.

    python benchmarks/mllmmsr.py                       # a LLaVA scaled down, minutes on a CPU
    python benchmarks/mllmmsr.py --sizes real --device cuda --dtype bfloat16 --nf4 \
        --users 12 --items 56 --tokens 32768 --prompts 64

The model is a LLaVA-1.6 on Mistral with random weights that never ends an answer by itself. Each
part compares two ways that must agree, in turn; medians, quartiles and ratios go to
benchmarks/results/mllmmsr.json. On a CPU seconds are those that the process was given, of all its
threads, so that neighbours on the machine do not count.

- shared beginning: 21 candidates of a user, in words alone, whose preference is read once, against
  whole questions; by the length of the preference.
- pictures: candidates with pictures that are encoded already, in both orders: what a user's
  candidates, or an item's users, share is read once, against whole questions.
- one forward: the answer read at the last position, against 30 decoded tokens (official code).
- batched generation, against one prompt at a time: with 64-token prompts, and where decoding
  dominates.
- with `--nf4`: candidates a second and memory with 4-bit weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from recbole_mm import machine
from recbole_mm.backbone.batch import collate
from recbole_mm.backbone.families.llava_next import LlavaNext
from recbole_mm.backbone.generate import Decoding, Quoted, decode, end_ids, write_prompt
from recbole_mm.backbone.load import Backbone, BackboneSpec, load_backbone
from recbole_mm.backbone.prompt import Fork, Prompt
from recbole_mm.backbone.questions import Questions
from recbole_mm.backbone.tiny import TinySizes, build, train_tokenizer
from recbole_mm.backbone.vision import ItemImages
from recbole_mm.backbone.wording import Budgets, Wording, fixed_text, user_part
from recbole_mm.backbone.yesno import YesNoScorer, find_answers

RESULTS = Path(__file__).resolve().parent / "results" / "mllmmsr.json"
SIZES = {
    "tiny": TinySizes(patch_size=28),  # to try flags out
    "scaled": TinySizes(2048, 384, 1152, 4, 6, 6, 4, 128, 4, 4, 168, 14),
    "real": TinySizes(32_064, 4096, 14_336, 32, 32, 8, 24, 1024, 16, 4, 336, 14),
}
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.5, "float16": 0.1}  # of log-odds
GOALS = {"64-token prompts": 3.0, "decoding dominates": 8.0}
CANDIDATES, DECODED, PREFERENCE = 21, 30, 128
ANSWERS = ["Yes", "No"]
LETTERS = list("abcdefghijklmnopqrstuvwxyz")


# --- a shop and its model -------------------------------------------------------------------------


def sentence(rng: np.random.Generator, words: int) -> str:
    """Words of one letter: a token each."""
    return " ".join(rng.choice(LETTERS, words))


def random_model(args: argparse.Namespace, nf4: bool = False) -> Backbone:
    """A LLaVA-1.6 with random weights; in 4 bits it is loaded from a folder, as a user's is."""
    sizes = SIZES[args.sizes]
    texts = [sentence(np.random.default_rng(0), 2000)]
    fixed = fixed_text(Wording(), ANSWERS)
    tokenizer = train_tokenizer(LlavaNext, texts, fixed, sizes.vocab_size)
    model = build(LlavaNext, sizes, tokenizer, 0, "sdpa")
    if sizes.vocab_size > len(tokenizer):
        model.resize_token_embeddings(sizes.vocab_size, mean_resizing=False)
    model.to(dtype=getattr(torch, args.dtype)).requires_grad_(False)
    pixels = sizes.image_size**2
    spec = BackboneSpec(
        args.sizes, "llava_next", "random", pixels, pixels, dtype=args.dtype, is_tiny=True
    )
    backbone = Backbone(spec, model, tokenizer)
    with torch.no_grad():  # an answer that ended early would be no measure
        backbone.head.weight[list(end_ids(backbone))] = 0.0  # type: ignore[index,operator]
    if not nf4:
        return backbone.to(args.device).eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        spec = replace(spec, model=folder, is_tiny=False, quantize="nf4")
        return load_backbone(spec, [], fixed, 0, adapt=False).to(args.device).eval()


def noise(side: int) -> Callable[[int], Image.Image]:
    """Pictures of items that have that many pixels a side."""

    def picture(item: int) -> Image.Image:
        rng = np.random.default_rng(item)
        return Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))

    return picture


@dataclass
class Shop:
    """A scorer and questions about users who are asked about 21 items each."""

    scorer: YesNoScorer
    questions: Questions
    pairs: list[tuple[Any, int]]

    @classmethod
    def of(cls, backbone: Backbone, args: argparse.Namespace, words: int, has_image: bool) -> Shop:
        """Preferences of `words` tokens."""
        rng, items = np.random.default_rng(1), args.items
        titles = ["", *(sentence(rng, 6) for _ in range(items))]
        budgets, wording = Budgets(16, 16, words), Wording()
        picture = noise(SIZES[args.sizes].image_size)
        images = ItemImages(backbone.family, picture, lambda item: None, frozen=True)
        asked = Questions(backbone, images, titles, wording, ANSWERS, budgets, has_image)
        users = [user_part(wording, sentence(rng, words), budgets) for _ in range(args.users)]
        pairs = [
            (user, int(item) + 1)
            for user in users
            for item in rng.choice(items, CANDIDATES, replace=False)
        ]
        answers = find_answers(backbone, ANSWERS)
        scorer = YesNoScorer(backbone, images, answers, "answer", args.tokens).eval()
        if has_image:
            scorer.encode_pictures(range(1, items + 1))
        return cls(scorer, asked, pairs)

    def groups(self, order: str) -> dict[Any, list[int]]:
        """Places of the pairs that begin alike."""
        found: dict[Any, list[int]] = {}
        for place, (user, item) in enumerate(self.pairs):
            found.setdefault(user if order == "pref_first" else item, []).append(place)
        return found

    def ways(self, order: str) -> tuple[Way, Way, list[Fork]]:
        """Log-odds of all pairs: shared beginnings read once, or whole questions."""
        groups = self.groups(order)
        forks = [
            self.questions.fork([self.pairs[place] for place in places], order)
            for places in groups.values()
        ]
        back = torch.tensor([place for places in groups.values() for place in places]).argsort()

        def way(worth: float) -> Way:
            def score() -> torch.Tensor:
                self.scorer.worth_sharing = worth
                return torch.cat(self.scorer.log_odds(forks))[back]

            return score

        return way(0.0), way(float("inf")), forks


# --- measuring ------------------------------------------------------------------------------------

Way = Callable[[], Any]


def clock(device: str) -> float:
    """Seconds of this process on a CPU, of the wall on a GPU once it has done its work."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def quartiles(values: Sequence[float], digits: int) -> dict[str, float]:
    found = np.quantile(values, (0.25, 0.5, 0.75)).round(digits).tolist()
    return dict(zip(("q1", "median", "q3"), found, strict=True))


def compare(
    name: str, ours: Way, plain: Way, args: argparse.Namespace, **said: Any
) -> dict[str, Any]:
    """Checks that two ways agree, which warms both up, and times them in turn."""
    agreed = agreement(name, ours(), plain(), args.dtype)
    times: dict[str, list[float]] = {"ours": [], "plain": []}
    for _ in range(args.repeats):
        for key, way in (("ours", ours), ("plain", plain)):
            start = clock(args.device)
            way()
            times[key].append(clock(args.device) - start)
    ratios = quartiles(np.array(times["plain"]) / np.array(times["ours"]), 2)  # pair by pair
    found = {
        "ratio": ratios["median"],
        "ratio_quartiles": [ratios["q1"], ratios["q3"]],
        "seconds": {key: quartiles(values, 4) for key, values in times.items()},
        **agreed,
        **said,
    }
    print(f"{name:44s} {found}", flush=True)
    return found


def agreement(name: str, ours: Any, plain: Any, dtype: str) -> dict[str, Any]:
    """How far two ways agree: log-odds to the tolerance, texts exactly in float32."""
    if isinstance(ours, torch.Tensor):
        difference = float((ours - plain).abs().max())
        if not difference < TOLERANCE[dtype]:
            raise SystemExit(f"{name}: the two ways differ by {difference}, nothing is timed")
        return {"largest_difference": difference}
    same = statistics.mean(a == b for a, b in zip(ours, plain, strict=True))
    if dtype == "float32" and same < 1:
        raise SystemExit(f"{name}: {1 - same:.0%} of the answers differ, nothing is timed")
    return {"same_answers": same}


# --- what is compared -----------------------------------------------------------------------------


def shared(
    name: str, shop: Shop, order: str, args: argparse.Namespace, **said: Any
) -> dict[str, Any]:
    """Shared beginnings against whole questions, with candidates a second."""
    ours, plain, forks = shop.ways(order)
    machine.reset_peak_memory(torch.device(args.device))
    found = compare(name, ours, plain, args, **said)
    branches = [len(branch) for fork in forks for branch in fork.branches]
    rates = {
        key: round(len(shop.pairs) / found["seconds"][key]["median"], 2)
        for key in ("ours", "plain")
    }
    return {
        **found,
        "candidates_per_second": rates,
        "trunk_tokens": round(statistics.mean(len(fork.trunk) for fork in forks), 1),
        "branch_tokens": round(statistics.mean(branches), 1),
        "branches": round(len(branches) / len(forks), 1),
        "peak_memory_mb": machine.peak_memory_mb(torch.device(args.device)),
    }


def no_images(backbone: Backbone) -> ItemImages:
    return ItemImages(backbone.family, lambda item: None, lambda item: None, frozen=True)


def prompts_of(backbone: Backbone, count: int, tokens: int) -> list[Prompt]:
    """Prompts of so many tokens, the words around them included."""
    rng, images = np.random.default_rng(2), no_images(backbone)
    around = len(write_prompt(backbone, images, ("Describe",)))
    words = max(tokens - around, 1)
    asked = [("Describe", Quoted(sentence(rng, words), words)) for _ in range(count)]
    return [write_prompt(backbone, images, request) for request in asked]


def decoded(backbone: Backbone, groups: Sequence[Sequence[Prompt]], new: int) -> list[list[int]]:
    """Answers of `new` tokens, the prompts of each group together."""
    images, found = no_images(backbone), list[list[int]]()
    for group in groups:
        answers = dict(decode(backbone, images, group, Decoding(new), [0] * len(group)))
        found += [answers[row] for row in range(len(group))]
    return found


def one_forward(backbone: Backbone, args: argparse.Namespace) -> dict[str, Any]:
    """Eight prompts; the first decoded token is the one that the forward pass says."""
    prompts, images = prompts_of(backbone, 8, PREFERENCE), no_images(backbone)

    @torch.no_grad()
    def read() -> list[int]:
        batch = collate(prompts, backbone.pad_id)
        found: list[int] = backbone.head(backbone.hidden(batch, images)[:, 0]).argmax(1).tolist()
        return found

    def official() -> list[int]:
        return [said[0] for said in decoded(backbone, [prompts], DECODED)]

    return compare("one forward", read, official, args, decoded_tokens=DECODED, prompts=8)


def batched(backbone: Backbone, kind: str, args: argparse.Namespace) -> dict[str, Any]:
    """The same texts together and one at a time."""
    tokens, new = (64, 32) if kind == "64-token prompts" else (12, 64)
    prompts = prompts_of(backbone, args.prompts, tokens)
    return compare(
        f"batched generation, {kind}",
        lambda: decoded(backbone, [prompts], new),
        lambda: decoded(backbone, [[prompt] for prompt in prompts], new),
        args,
        goal=GOALS[kind],
        prompts=args.prompts,
        prompt_tokens=len(prompts[0]),
        new_tokens=new,
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All parts; the result."""
    backbone = random_model(args)
    parts = {}
    for tokens in (32, 128, 512):
        name = f"shared beginning, preference of {tokens} tokens"
        parts[name] = shared(name, Shop.of(backbone, args, tokens, False), "pref_first", args)
    shop = Shop.of(backbone, args, PREFERENCE, True)
    for order in ("pref_first", "item_first"):
        parts[f"pictures, {order}"] = shared(f"pictures, {order}", shop, order, args)
    parts["one forward against decoding"] = one_forward(backbone, args)
    for kind in GOALS:
        parts[f"batched generation, {kind}"] = batched(backbone, kind, args)
    result = {"parameters": sum(p.numel() for p in backbone.parameters()), "parts": parts}
    if args.nf4:
        del backbone, shop
        shop = Shop.of(random_model(args, nf4=True), args, PREFERENCE, True)
        result["nf4"] = {
            order: shared(f"NF4, pictures, {order}", shop, order, args)
            for order in ("pref_first", "item_first")
        }
    return result


def main() -> None:
    """Parses flags, measures, writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", choices=SIZES, default="scaled")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=TOLERANCE, default="float32")
    parser.add_argument("--nf4", action="store_true", help="with 4-bit weights too")
    parser.add_argument("--users", type=int, default=4)
    parser.add_argument("--items", type=int, default=24, help="21 of them asked about for each")
    parser.add_argument("--prompts", type=int, default=32, help="of generation")
    parser.add_argument("--tokens", type=int, default=4096, help="padded tokens of a batch")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = {
        "device": machine.device_name(torch.device(args.device)),
        "versions": machine.versions(),
        **{k: v for k, v in vars(args).items() if k not in ("out", "device")},
        "tolerance": TOLERANCE[args.dtype],
        **run(args),
    }
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()

"""What MLLM-MSR's ways to compute save, each against the plain way in one run, with its tolerance.

    python benchmarks/mllmmsr.py [--threads 1] [--repeats 5]

- shared beginning: 21 candidates of a user, whose preference is read once, against 21 whole
  questions; by the length of the preference.
- one forward: the answer read at the last position, against 30 decoded tokens (official code).
- batched generation, against one prompt at a time: with 64-token prompts, and where decoding
  dominates.

A random Llama of medium size; ratios are medians over interleaved repeats. The result goes to
benchmarks/results/mllmmsr.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from recbole_mm import machine
from recbole_mm.backbone.batch import collate
from recbole_mm.backbone.generate import Decoding, Quoted, decode, end_ids, write_prompt
from recbole_mm.backbone.load import Backbone, BackboneSpec, load_backbone
from recbole_mm.backbone.questions import Questions
from recbole_mm.backbone.vision import ItemImages
from recbole_mm.backbone.wording import Budgets, Wording, fixed_text, user_part
from recbole_mm.backbone.yesno import YesNoScorer, find_answers

RESULTS = Path(__file__).resolve().parent / "results" / "mllmmsr.json"
CANDIDATES, ITEMS, DECODED = 21, 60, 30
WORDS = [
    "amber",
    "birch",
    "cedar",
    "delta",
    "ember",
    "fjord",
    "grove",
    "heath",
    "inlet",
    "jetty",
    "knoll",
    "lagoon",
]


def sentence(rng: np.random.Generator, words: int) -> str:
    return " ".join(rng.choice(WORDS, words))


def model_of(hidden: int, layers: int) -> Backbone:
    """A random Llama that never ends an answer by itself."""
    sizes = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "layers": layers, "heads": 8}
    spec = BackboneSpec.from_mapping(
        {"name": "medium", "family": "causal_lm", "model": "", "is_tiny": True, "tiny": sizes}
    )
    rng = np.random.default_rng(0)
    texts = [sentence(rng, 12) for _ in range(200)]
    return load_backbone(spec, texts, fixed_text(Wording(), ["Yes", "No"]), 0, adapt=False).eval()


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    found = call()
    return time.perf_counter() - started, found


def ratio(
    plain: Callable[[], Any], ours: Callable[[], Any], repeats: int
) -> tuple[dict[str, Any], Any, Any]:
    """Seconds of both, interleaved, and how many times quicker ours is."""
    slow, fast = [], []
    for _ in range(repeats):
        seconds, expected = timed(plain)
        slow.append(seconds)
        seconds, found = timed(ours)
        fast.append(seconds)
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    about = {
        "plain_s": round(statistics.median(slow), 4),
        "ours_s": round(statistics.median(fast), 4),
        "ratio": round(statistics.median(ratios), 2),
        "ratio_spread": [round(min(ratios), 2), round(max(ratios), 2)],
    }
    return about, expected, found


def no_images(backbone: Backbone) -> ItemImages:
    return ItemImages(backbone.family, lambda item: None, lambda item: None, frozen=True)


def shared_beginning(backbone: Backbone, tokens: int, repeats: int) -> dict[str, Any]:
    """Four users of 21 candidates each."""
    rng = np.random.default_rng(1)
    titles = ["", *(sentence(rng, 6) for _ in range(ITEMS))]
    budgets, words = Budgets(16, 16, tokens), Wording()
    images = no_images(backbone)
    answers = ["Yes", "No"]
    asked = Questions(backbone, images, titles, words, answers, budgets, has_image=False)
    users = [user_part(words, sentence(rng, tokens), budgets) for _ in range(4)]
    pairs = [[(user, int(i)) for i in rng.choice(ITEMS, CANDIDATES, False) + 1] for user in users]
    forks = [asked.fork(row, "pref_first") for row in pairs]
    scorer = YesNoScorer(backbone, images, find_answers(backbone, answers))

    def scored(worth: float) -> torch.Tensor:
        scorer.worth_sharing = worth
        return torch.cat(scorer.log_odds(forks))

    about, expected, found = ratio(lambda: scored(1e9), lambda: scored(0.0), repeats)
    shared = len(forks[0].trunk)
    own = statistics.mean(len(branch) for fork in forks for branch in fork.branches)
    about |= {"shared_tokens": shared, "own_tokens": round(own, 1)}
    return {**about, "largest_difference": float((expected - found).abs().max())}


def prompts_of(backbone: Backbone, count: int, words: int) -> list[Any]:
    rng = np.random.default_rng(2)
    images = no_images(backbone)
    asked = [("Describe", Quoted(sentence(rng, words), words)) for _ in range(count)]
    return [write_prompt(backbone, images, request) for request in asked]


def one_forward(backbone: Backbone, repeats: int) -> dict[str, Any]:
    """The two answers' logits of eight prompts; the first decoded token has the same ones."""
    prompts, images = prompts_of(backbone, 8, 120), no_images(backbone)

    @torch.no_grad()
    def read() -> Any:
        batch = collate(prompts, backbone.pad_id)
        return backbone.head(backbone.hidden(batch, images)[:, 0]).argmax(dim=1).tolist()

    def decoded() -> Any:
        found = dict(decode(backbone, images, prompts, Decoding(DECODED), [0] * len(prompts)))
        return [found[row][0] for row in range(len(prompts))]

    about, expected, found = ratio(decoded, read, repeats)
    return {**about, "decoded_tokens": DECODED, "same_first_token": expected == found}


def batched(backbone: Backbone, count: int, words: int, new: int, repeats: int) -> dict[str, Any]:
    """The same texts together and one at a time."""
    prompts, images = prompts_of(backbone, count, words), no_images(backbone)

    def written(groups: Sequence[Sequence[Any]]) -> list[list[int]]:
        texts: list[list[int]] = []
        for group in groups:
            found = dict(decode(backbone, images, group, Decoding(new), [0] * len(group)))
            texts += [found[row] for row in range(len(group))]
        return texts

    alone = [[prompt] for prompt in prompts]
    about, expected, found = ratio(lambda: written(alone), lambda: written([prompts]), repeats)
    lengths = statistics.mean(map(len, prompts))
    about |= {"prompts": count, "prompt_tokens": round(lengths, 1), "new_tokens": new}
    return {**about, "same_texts": expected == found}


def main() -> None:
    """Parses flags, measures, writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    backbone = model_of(args.hidden, args.layers)
    ends = end_ids(backbone)
    with torch.no_grad():  # an answer that ended early would be no measure
        backbone.head.weight[list(ends)] = 0.0  # type: ignore[index,operator]
    result: dict[str, Any] = {
        "hidden_size": args.hidden,
        "layers": args.layers,
        "parameters": sum(p.numel() for p in backbone.parameters()),
        "threads": args.threads,
        "repeats": args.repeats,
        "device": machine.device_name(torch.device("cpu")),
        "versions": machine.versions(),
    }
    for tokens in (32, 128, 512):
        key = f"shared beginning, preference of {tokens} tokens"
        result[key] = shared_beginning(backbone, tokens, args.repeats)
        print(key, result[key], flush=True)
    result["one forward against decoding"] = one_forward(backbone, args.repeats)
    print(result["one forward against decoding"], flush=True)
    for name, words, new in (("64-token prompts", 44, 32), ("decoding dominates", 4, 64)):
        key = f"batched generation, {name}"
        result[key] = batched(backbone, args.prompts, words, new, args.repeats)
        print(key, result[key], flush=True)
    args.results.parent.mkdir(exist_ok=True)
    args.results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

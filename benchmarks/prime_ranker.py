r"""PRIME's ranker against the usual ways to compute it, and against generating its answer.

    python benchmarks/prime_ranker.py                  # a scaled-down Qwen2-VL, minutes on a CPU
    python benchmarks/prime_ranker.py --sizes real --device cuda --dtype bfloat16 \
        --tokens 16384 --nf4

The model is a Qwen2-VL with random weights. `--sizes scaled` keeps the real one's proportions: both
towers have 1/6 of its width and 1/4 of its layers, the vocabulary is as large a share. Each part
compares two ways that must agree in their scores, in turn, in one process; medians, quartiles and
ratios go to benchmarks/results/prime_ranker.json.

- tower: small pictures through our vision tower, or through that of `transformers` as it is.
- pictures: features of the frozen tower read from the cache, or every picture encoded anew.
- head: the K letters' rows of the head at the answer, or the whole vocabulary at every token.
- batches: prompts of like length together, or as they come; four times as many, eight a batch.
- at once: four times as many prompts in passes of `--few_tokens` padded tokens, or `--most_tokens`.
- forks: two candidate sets behind one history, or a prompt for each, over the history's length.
- rates: prompts a second, against the floor of a matrix product and, with `--nf4`, in 4 bits.
- generation (the paper's figure 7): one forward pass and K letters, or a list of the K candidates
  generated token by token, as ids or as titles.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from recbole_mm.backbone import ranker as ranker_module
from recbole_mm.backbone.batch import collate
from recbole_mm.backbone.families.qwen import Qwen2VL
from recbole_mm.backbone.load import Backbone, BackboneSpec, load_backbone
from recbole_mm.backbone.prompt import PromptStyle, PromptWriter
from recbole_mm.backbone.ranker import LetterRanker
from recbole_mm.backbone.tiny import TinySizes, build, train_tokenizer
from recbole_mm.backbone.verbalizer import Verbalizer
from recbole_mm.backbone.vision import ItemImages
from recbole_mm.machine import device_name, peak_memory_mb, reset_peak_memory

RESULTS = Path(__file__).resolve().parent / "results" / "prime_ranker.json"
SIZES = {
    "scaled": TinySizes(6300, 256, 1536, 7, 4, 2, 8, 192, 4, 4),
    "real": TinySizes(151_936, 1536, 8960, 28, 12, 2, 32, 1280, 16, 4),
}
K, HISTORY, SHARED = 25, 10, (5, 10, 25)
WORDS = 2000
STYLE = PromptStyle(
    "Below are a user's browsing history, oldest first, and candidate items, one a line in JSON. "
    "Which candidate will the user choose next? Answer with the letter of one candidate.",
    ("image", "title", "price", "brand", "categories"),
    32,
)


# --- a shop and its ranker ------------------------------------------------------------------------


class Shop:
    """Items with random words and noise for pictures, 168 x 168: 36 tokens each.

    Args:
        items: how many.
        title_words: words of a title, about as many tokens.
    """

    def __init__(self, items: int, title_words: int) -> None:
        rng = np.random.default_rng(0)
        letters = list("abcdefghijklmnopqrstuvwxyz")
        words = ["".join(rng.choice(letters, rng.integers(3, 8))) for _ in range(WORDS)]
        self.lines: dict[int, dict[str, str]] = {}
        for item in range(1, items + 1):
            said = [" ".join(rng.choice(words, n)) for n in (title_words, 1, 6)]
            price = f"{rng.uniform(1, 99):.2f}"
            self.lines[item] = dict(
                zip(("title", "brand", "categories"), said, strict=True), price=price
            )
        self.words = words

    def text(self, item: int, name: str) -> str | None:
        return self.lines[item].get(name)

    def picture(self, item: int) -> Image.Image:
        rng = np.random.default_rng(item)
        return Image.fromarray(rng.integers(0, 256, (168, 168, 3), dtype=np.uint8))


def random_model(shop: Shop, args: argparse.Namespace) -> tuple[BackboneSpec, Any, Any]:
    """A model with random weights, how it is described, and its tokenizer."""
    sizes = SIZES[args.sizes]
    texts = [value for line in shop.lines.values() for value in line.values()]
    tokenizer = train_tokenizer(
        Qwen2VL, [*texts, " ".join(shop.words)], STYLE.fixed_text(), sizes.vocab_size
    )
    model = build(Qwen2VL, sizes, tokenizer, 0, "sdpa")
    if sizes.vocab_size > len(tokenizer):
        model.resize_token_embeddings(sizes.vocab_size, mean_resizing=False)
    model.to(dtype=getattr(torch, args.dtype)).requires_grad_(False)
    spec = BackboneSpec(
        args.sizes, "qwen2_vl", "random", 56 * 56, 168 * 168, dtype=args.dtype, is_tiny=True
    )
    return spec, model, tokenizer


def ranker_of(shop: Shop, args: argparse.Namespace, frozen: bool = True) -> LetterRanker:
    """A ranker with random weights; `frozen` keeps the features of pictures."""
    spec, model, tokenizer = random_model(shop, args)
    return _ranker(shop, args, Backbone(spec, model.to(args.device).eval(), tokenizer), frozen)


def quantised(shop: Shop, args: argparse.Namespace) -> LetterRanker:
    """The same weights in NF4 with adapters, loaded from a folder as a user's are."""
    spec, model, tokenizer = random_model(shop, args)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        spec = replace(spec, model=folder, is_tiny=False, quantize="nf4")
        backbone = load_backbone(spec, [], STYLE.fixed_text(), 0).to(args.device)
    return _ranker(shop, args, backbone.eval(), frozen=True)


def _ranker(shop: Shop, args: argparse.Namespace, backbone: Backbone, frozen: bool) -> LetterRanker:
    images = ItemImages(backbone.family, shop.picture, lambda item: None, frozen)
    verbalizer = Verbalizer(backbone.encoder, K, backbone.family.answer_end)
    writer = PromptWriter(
        backbone.encoder, backbone.family, STYLE, shop.text, images.piece, verbalizer.letters
    )
    return LetterRanker(backbone, images, writer, verbalizer, "letter", args.tokens).eval()


class Questions:
    """Random users: histories of `least` to `most` items, two candidate sets each."""

    def __init__(self, count: int, items: int, least: int = 1, most: int = 2 * HISTORY) -> None:
        rng = np.random.default_rng(1)
        lengths = rng.integers(least, most + 1, count)
        self.histories = [rng.choice(items, n, replace=False) + 1 for n in lengths]
        self.sets = np.stack([rng.choice(items, (2, K), replace=False) + 1 for _ in lengths])
        self.candidates = np.ascontiguousarray(self.sets[:, 0])


# --- what is compared -----------------------------------------------------------------------------

Way = Callable[[], Any]


def pictures(ranker: LetterRanker, live: LetterRanker, q: Questions) -> tuple[Way, Way]:
    """The live one forgets its features before each batch of prompts, as a processor call does."""

    def anew() -> torch.Tensor:
        out = []
        for history, row in zip(q.histories, q.candidates, strict=True):
            live.images._rows.clear()
            out.append(live.log_probs([history], row[None]))
        return torch.cat(out)

    def cached() -> torch.Tensor:
        each = zip(q.histories, q.candidates, strict=True)
        return torch.cat([ranker.log_probs([history], row[None]) for history, row in each])

    return cached, anew


def tower(ranker: LetterRanker, live: LetterRanker, count: int) -> tuple[Way, Way]:
    """`count` pictures of 56 x 56 with gradients; the live one's tower is put back as it came."""
    for one in (ranker, live):
        one.backbone.family.vision_tower(one.backbone.model).requires_grad_(True)
    stock = live.backbone.family.vision_tower(live.backbone.model)
    stock.config._attn_implementation = "sdpa"
    stock.patch_embed.proj.__class__ = torch.nn.Conv3d
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (count, 56, 56, 3), dtype=np.uint8)

    def way(one: LetterRanker) -> Way:
        pixels = [one.backbone.family.pixels(Image.fromarray(picture)) for picture in noise]

        def encode() -> torch.Tensor:
            rows = torch.cat(one.backbone.family.encode(one.backbone.model, pixels))
            rows.square().mean().backward()
            return rows.detach()

        return encode

    return way(ranker), way(live)


@torch.no_grad()
def whole_head(ranker: LetterRanker, q: Questions) -> torch.Tensor:
    """Logits of the whole vocabulary at every token, then the letters' at the last."""
    backbone, out = ranker.backbone, []
    language_model = backbone.family.language_model(backbone.model)
    for history, row in zip(q.histories, q.candidates, strict=True):
        batch = collate([ranker.writer.write(history.tolist(), row.tolist())], backbone.pad_id)
        batch = batch.to(backbone.device)
        states = language_model(
            inputs_embeds=backbone._embed(batch, ranker.images),
            position_ids=batch.positions,
            use_cache=False,
        ).last_hidden_state
        logits = backbone.head(states).float()  # (1, T, vocabulary)
        out.append(logits[:, -1, ranker.verbalizer.ids].log_softmax(1).cpu())
    return torch.cat(out)


@torch.no_grad()
def as_they_come(ranker: LetterRanker, q: Questions, rows: int) -> torch.Tensor:
    """Batches of `rows` prompts in their order, padded to the longest of each."""
    prompts = ranker._write(q.histories, q.candidates)
    parts = [prompts[i : i + rows] for i in range(0, len(prompts), rows)]
    return torch.cat([ranker._letters(part, K).log_softmax(1).cpu() for part in parts])


def in_passes(ranker: LetterRanker, q: Questions, tokens: int) -> torch.Tensor:
    """Scores in passes of so many padded tokens."""
    usual, ranker.max_tokens = ranker.max_tokens, tokens
    scores = ranker.log_probs(q.histories, q.candidates)
    ranker.max_tokens = usual
    return scores


def shared(ranker: LetterRanker, q: Questions) -> torch.Tensor:
    """However short histories are, they are read once."""
    usual, ranker_module._WORTH_SHARING = ranker_module._WORTH_SHARING, 0.0
    scores = ranker.set_log_probs(q.histories, q.sets)
    ranker_module._WORTH_SHARING = usual
    return scores


def share(ranker: LetterRanker, q: Questions) -> float:
    """Tokens of the histories for one of a candidate set, of which the default is a function."""
    asked = zip(q.histories, q.sets, strict=True)
    forks = [ranker.writer.write_fork(h.tolist(), s.tolist()) for h, s in asked]
    history = sum(len(fork.trunk) for fork in forks)
    return round(history / sum(len(fork.branches[0]) for fork in forks), 2)


def apart(ranker: LetterRanker, q: Questions) -> torch.Tensor:
    both = [ranker.log_probs(q.histories, q.sets[:, column]) for column in range(2)]
    return torch.stack(both, 1)


@torch.no_grad()
def generated(ranker: LetterRanker, q: Questions, tokens: int) -> torch.Tensor:
    """`tokens` tokens generated greedily after each prompt, with a cache of keys and values."""
    backbone = ranker.backbone
    model: Any = backbone.model
    language_model = backbone.family.language_model(model)
    for history, row in zip(q.histories, q.candidates, strict=True):
        batch = collate([ranker.writer.write(history.tolist(), row.tolist())], backbone.pad_id)
        batch = batch.to(backbone.device)
        embeds, positions, cache = backbone._embed(batch, ranker.images), batch.positions, None
        for _ in range(tokens):
            out = language_model(
                inputs_embeds=embeds, position_ids=positions, past_key_values=cache, use_cache=True
            )
            cache = out.past_key_values
            token = backbone.head(out.last_hidden_state[:, -1:]).argmax(-1)  # (1, 1)
            embeds, positions = model.get_input_embeddings()(token), positions[:, :, -1:] + 1
    return token


# --- measuring ------------------------------------------------------------------------------------


def measure(ways: dict[str, Way], repeats: int, device: str) -> dict[str, dict[str, float]]:
    """Seconds of each way, taken in turn after one warm-up: median and quartiles."""
    for way in ways.values():
        way()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            wait(device)  # for what the way before has left to do
            start = time.perf_counter()
            way()
            wait(device)
            times[name].append(time.perf_counter() - start)
    return {
        name: dict(zip(("q1", "median", "q3"), np.quantile(t, (0.25, 0.5, 0.75)).round(4).tolist(),
                       strict=True))
        for name, t in times.items()
    }  # fmt: skip


def wait(device: str) -> None:
    """Until a GPU has done what it was given."""
    if device != "cpu":
        torch.cuda.synchronize()


def compare(name: str, ours: Way, other: Way, args: argparse.Namespace) -> dict[str, Any]:
    """Checks that two ways agree, and times them."""
    difference = float((ours() - other()).abs().max())
    allowed = 1e-3 if args.dtype == "float32" else 0.5
    if not difference < allowed:
        raise SystemExit(f"{name}: the two ways differ by {difference}, nothing is timed")
    seconds = measure({"ours": ours, "other": other}, args.repeats, args.device)
    ratio = seconds["other"]["median"] / seconds["ours"]["median"]
    print(f"{name:32s} {ratio:6.2f} x   {seconds}", flush=True)
    return {"ratio": round(ratio, 2), "seconds": seconds, "largest_difference": difference}


def flops(ranker: LetterRanker, q: Questions) -> float:
    """The floor of scoring the questions: two a weight of the language model and token."""
    sizes = SIZES[ranker.backbone.spec.name]  # quantised weights do not tell their number
    heads = sizes.hidden_size * (1 + sizes.kv_heads / sizes.heads)  # of queries and output; k, v
    layer = 2 * sizes.hidden_size * heads + 3 * sizes.hidden_size * sizes.intermediate_size
    weights = sizes.layers * layer
    tokens = sum(len(prompt) for prompt in ranker._write(q.histories, q.candidates))
    return 2.0 * weights * tokens


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """What the machine does in one large product, in FLOP a second."""
    n = 2048 if device == "cpu" else 8192
    a = torch.randn(n, n, device=device, dtype=dtype)
    seconds = measure({"product": lambda: (a @ a).sum().item()}, 5, device)["product"]["q1"]
    return 2.0 * n**3 / seconds


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All parts; the result."""
    shop = Shop(args.items, 8)
    q, ranker = Questions(args.prompts, args.items), ranker_of(shop, args)
    parts = compared(shop, ranker, q, args)
    rates = {"plain": rate(ranker, q, args)}
    del ranker  # memory is measured of one model at a time
    if args.nf4:
        rates["nf4"] = rate(quantised(shop, args), q, args)
    return {"parts": parts, "rates": rates, "generation": figure_7(args)}


def compared(
    shop: Shop, ranker: LetterRanker, q: Questions, args: argparse.Namespace
) -> dict[str, Any]:
    """The parts that set two ways against each other."""
    live = _ranker(shop, args, ranker.backbone, frozen=True)
    many = Questions(4 * args.prompts, args.items)
    cached, anew = pictures(ranker, live, q)
    copies = (_ranker(shop, args, deepcopy(ranker.backbone), frozen=True) for _ in range(2))
    ours, stock = tower(*copies, 256)
    return {
        "tower": compare("tower, 256 small pictures", ours, stock, args),
        "pictures": compare("pictures cached", cached, anew, args),
        "head": compare("letters' rows of the head", cached, lambda: whole_head(ranker, q), args),
        "batches": compare(
            "prompts of like length",
            lambda: ranker.log_probs(many.histories, many.candidates),
            lambda: as_they_come(ranker, many, 8),
            args,
        ),
        "at once": compare(
            f"{args.few_tokens} tokens at once",
            lambda: in_passes(ranker, many, args.few_tokens),
            lambda: in_passes(ranker, many, args.most_tokens),
            args,
        ),
        **{f"forks, {n} items": forks(ranker, n, args) for n in SHARED},
    }


def forks(ranker: LetterRanker, items: int, args: argparse.Namespace) -> dict[str, Any]:
    """Two candidate sets behind histories of so many items."""
    q = Questions(args.prompts, args.items, items, items)
    name = f"two sets behind {items} items"
    found = compare(name, lambda: shared(ranker, q), lambda: apart(ranker, q), args)
    return {**found, "history_tokens_for_one_of_a_set": share(ranker, q)}


def rate(ranker: LetterRanker, q: Questions, args: argparse.Namespace) -> dict[str, float]:
    """Prompts a second with pictures encoded before, the share of the floor, and memory."""
    device = torch.device(args.device)
    reset_peak_memory(device)
    score = {"all": lambda: ranker.log_probs(q.histories, q.candidates)}
    seconds = measure(score, 3, args.device)["all"]["median"]
    peak = peak_memory_mb(device)
    done = flops(ranker, q) / seconds
    found = {
        "prompts_per_second": round(args.prompts / seconds, 2),
        "gflop_per_second": round(done / 1e9, 2),
        "share_of_the_matmul_rate": round(
            done / matmul_rate(args.device, getattr(torch, args.dtype)), 3
        ),
        "peak_memory_mb": peak,
    }
    print(found, flush=True)
    return found


def figure_7(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Verbalizer against generation, over the length of titles; a few prompts are enough."""
    rows = []
    for words in (4, 8, 16):
        shop = Shop(200, words)
        ranker, q = ranker_of(shop, args), Questions(2, 200)
        title = np.mean(
            [len(ranker.backbone.encoder.plain(shop.lines[i]["title"])) for i in shop.lines]
        )
        ways = {
            "verbalizer": lambda r=ranker, q=q: r.log_probs(q.histories, q.candidates),
            "ids": lambda r=ranker, q=q: generated(r, q, 4 * K),
            "titles": lambda r=ranker, q=q, n=title: generated(r, q, int(n + 1) * K),
        }
        seconds = measure(ways, 2, args.device)
        base = seconds["verbalizer"]["median"]
        ratios = {name: round(seconds[name]["median"] / base, 1) for name in ("ids", "titles")}
        print(f"title of {title:.1f} tokens: {ratios}", flush=True)
        rows.append({"title_tokens": round(float(title), 1), "ratios": ratios, "seconds": seconds})
    return rows


def main() -> None:
    """Parses flags, measures, writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", choices=SIZES, default="scaled")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--items", type=int, default=400)
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=4096, help="padded tokens of a batch")
    parser.add_argument("--few_tokens", type=int, default=6000, help="of a small batch")
    parser.add_argument("--most_tokens", type=int, default=16_384, help="of a large one")
    parser.add_argument("--nf4", action="store_true", help="rates with 4-bit weights too")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = {
        "machine": platform.processor() or platform.machine(),
        "runs_on": device_name(torch.device(args.device)),
        "torch": torch.__version__,
        **{k: v for k, v in vars(args).items() if k != "out"},
        **run(args),
    }
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()

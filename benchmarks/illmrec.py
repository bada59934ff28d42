r"""I-LLMRec's two ways to save: forward passes, and tokens of items.

    python benchmarks/illmrec.py                  # a small Llama, some minutes on a CPU
    python benchmarks/illmrec.py --sizes tiny     # to try it out: overheads and no ratios
    python benchmarks/illmrec.py --sizes real --device cuda --dtype bfloat16 --users 32 \
        --eval_users 64 --peak_tflops 989         # of Sheared-LLaMA-2.7B; the peak is an H100's

Language models have random weights; heads, adaptor and features are those of the paper in size.
Ways that are compared must agree in their numbers, and take turns in one process; medians,
quartiles and ratios go to benchmarks/results/illmrec.json. On a CPU seconds are those that the
process was given, of all its threads, so that neighbours on the machine do not count.

- packed: a training step, forward and backward, with alignment and retrieval behind one history, or
  in two passes.
- evaluation: users in batches and items projected once, or one user at a time with items projected
  for each: `all`, every item is ranked; `101`, as many candidates a user as the paper ranks.
- representations (the paper's figures 1 and 4): tokens and seconds a user by what stands for an
  item, over the length of the history.
- contexts (figure 5): how many of 20 items fit, by the tokens of a prompt.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from recbole_mm import machine
from recbole_mm.backbone.load import Backbone, BackboneSpec, load_backbone
from recbole_mm.backbone.slots import collate_packed
from recbole_mm.data.content import ItemContent
from recbole_mm.model.layers.image_prompts import (
    REPRESENTATIONS,
    ImagePrompts,
    PromptSettings,
    Properties,
)
from recbole_mm.model.layers.image_reader import ImageReader
from recbole_mm.model.layers.questions import PROPERTIES

RESULTS = Path(__file__).resolve().parent / "results" / "illmrec.json"
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"vocab_size": 1024, "hidden_size": 32, "intermediate_size": 64, "layers": 2,
             "heads": 2, "kv_heads": 2},
    "small": {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 688, "layers": 4,
              "heads": 4, "kv_heads": 4},
    "real": {"vocab_size": 32_000, "hidden_size": 2560, "intermediate_size": 6912, "layers": 32,
             "heads": 20, "kv_heads": 20},
}  # fmt: skip
WIDTHS = {"img": 1152, "cf": 50, "text": 768}
GOALS = {"packed": 1.5, "evaluation, all": 10.0}
HEADS = {"train_llm": "frozen", "train_token_emb": False, "adaptor_hidden": 512,
         "adaptor_act": "gelu", "adaptor_norm": True, "head_hidden": 1024, "d_s": 512}  # fmt: skip
HISTORY, CANDIDATES = 10, 101
LENGTHS, CONTEXTS = (5, 10, 20), (4096, 2048, 1024, 512, 256)
WORDS = {"title": 12, "brand": 1, "category": 2, "description": 120}
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05, "float16": 0.02}  # of the largest value

Way = Callable[[], Tensor]


class World:
    """Items with random words and features, and a language model that reads them.

    Args:
        args: of the command.
        folder: for the items' texts.
    """

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.rng = args, np.random.default_rng(0)
        self._prompts: dict[str, ImagePrompts] = {}
        content = _content(folder, args.items, self.rng)
        self.properties = Properties(content, {name: name for name in PROPERTIES})
        spec = BackboneSpec(
            args.sizes, "causal_lm", "random", dtype=args.dtype, attention="sdpa", is_tiny=True,
            tiny=SIZES[args.sizes],
        )  # fmt: skip
        how = self.settings("image+description")
        texts = [self.properties.everything(item) or "" for item in range(1, 400)]
        fixed = how.fixed_text(how.style(self.properties))
        self.backbone: Backbone = load_backbone(spec, texts, fixed, 0)
        self.backbone.model.to(args.device, getattr(torch, args.dtype))
        torch.manual_seed(0)
        self.tables = {t: torch.randn(args.items + 1, n) for t, n in WIDTHS.items()}
        self.tables = {t: table.to(args.device) for t, table in self.tables.items()}
        self.reader = ImageReader(self.backbone.model, WIDTHS, WIDTHS["img"], HEADS)
        self.reader.to(args.device).train()

    @property
    def weights(self) -> int:
        """Of the language model's layers, each of which multiplies every token once."""
        base = self.backbone.model.base_model
        return sum(p.numel() for p in base.parameters()) - base.embed_tokens.weight.numel()

    def settings(self, item_repr: str, context: int = 4096) -> PromptSettings:
        """As ILLMRec's YAML has them."""
        return PromptSettings(
            item_repr,
            "Recommend a next item to a user. The user has taken these items, oldest first:",
            "Generate a recommendation token for the next item to be consumed:",
            PROPERTIES, False, 32, 160, context,
        )  # fmt: skip

    def prompts(self, item_repr: str = "image") -> ImagePrompts:
        """Of one representation; every item's line is written once."""
        if item_repr not in self._prompts:
            how = self.settings(item_repr)
            made = ImagePrompts(how, self.properties, self.backbone, lambda item: True)
            self._prompts[item_repr] = made
        return self._prompts[item_repr]

    def histories(self, users: int, length: int) -> list[Any]:
        """Random items."""
        return list(self.rng.integers(1, self.args.items + 1, (users, length)))

    def read(self, rows: list[Any]) -> tuple[Tensor, Tensor]:
        """States and the loss of answers of packed rows."""
        batch = collate_packed(rows, self.backbone.pad_id).to(torch.device(self.args.device))
        return self.reader(batch, self.tables["img"][batch.keys], True)

    def users(self, prompts: ImagePrompts, histories: list[Any]) -> Tensor:
        """Users in all spaces. Shape: (B, types * d_s)."""
        [rows] = prompts.passes(histories, None, True, True)
        return self.reader.heads.users(self.read(rows)[0]).flatten(1)

    def project(self, items: Tensor) -> Tensor:
        """Items in all spaces. (n,) -> (n, types * d_s)."""
        rows = {t: table[items] for t, table in self.tables.items()}
        return self.reader.heads.items(rows).flatten(1)


def _content(folder: Path, items: int, rng: np.random.Generator) -> ItemContent:
    letters = list("abcdefghijklmnopqrstuvwxyz")
    words = ["".join(rng.choice(letters, rng.integers(3, 8))) for _ in range(1500)]
    lines = ["item_id:token\t" + "\t".join(f"{name}:text" for name in PROPERTIES)]
    for item in range(1, items + 1):
        values = [" ".join(rng.choice(words, WORDS[name])) for name in PROPERTIES]
        lines.append("\t".join([str(item), *values]))
    (folder / "shop.text").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return ItemContent(folder, "shop", ["[PAD]", *map(str, range(1, items + 1))])


# --- measuring ------------------------------------------------------------------------------------


def timed(ways: Sequence[Way], args: argparse.Namespace) -> list[list[float]]:
    """Seconds of each way in turn. Lengths: ways, repeats."""
    clock = time.process_time if args.device == "cpu" else time.perf_counter
    times: list[list[float]] = [[] for _ in ways]
    for _ in range(args.repeats):
        for took, way in zip(times, ways, strict=True):
            start = clock()
            way()  # ends on the CPU, so that a GPU has done its work
            took.append(clock() - start)
    return times


def quartiles(values: Any) -> dict[str, float]:
    """Of some numbers."""
    found = np.quantile(values, (0.25, 0.5, 0.75)).round(4).tolist()
    return dict(zip(("q1", "median", "q3"), found, strict=True))


def compare(name: str, ours: Way, other: Way, args: argparse.Namespace) -> dict[str, Any]:
    """Checks that two ways agree, which warms both up, and times them in turn."""
    one, two = ours(), other()
    difference = float((one - two).abs().max() / two.abs().max())
    if not difference < TOLERANCE[args.dtype]:
        raise SystemExit(f"{name}: the two ways differ by {difference}, nothing is timed")
    times = timed((ours, other), args)
    found = {
        "ratio": quartiles(np.array(times[1]) / np.array(times[0])),  # each pair of neighbours
        "goal": GOALS.get(name),
        "seconds": {"ours": quartiles(times[0]), "other": quartiles(times[1])},
        "largest_relative_difference": difference,
    }
    print(f"{name:16s} {found}", flush=True)
    return found


def share_of_peak(world: World, tokens: int, passes: int, seconds: float) -> float | None:
    """Of the device's arithmetic: two operations a weight, token and pass; attention, heads and
    vocabulary are left out."""
    if not world.args.peak_tflops:
        return None
    return round(2 * world.weights * tokens * passes / seconds / world.args.peak_tflops / 1e12, 4)


# --- what is compared -----------------------------------------------------------------------------


def packed(world: World) -> dict[str, Any]:
    """A training step, both ways."""
    prompts, users = world.prompts(), world.args.users
    histories, rng = world.histories(users, HISTORY), np.random.default_rng(1)
    targets = world.rng.integers(1, world.args.items, users)
    asked = [prompts.question(int(item), rng) for item in targets]
    trained = [p for p in world.reader.parameters() if p.requires_grad]
    tokens = {}

    def way(together: bool) -> Way:
        passes = prompts.passes(histories, asked, True, together)
        tokens["ours" if together else "other"] = sum(len(row) for rows in passes for row in rows)

        def go() -> Tensor:
            world.reader.zero_grad(set_to_none=True)
            loss = torch.zeros((), device=world.args.device)
            for rows in passes:
                states, told = world.read(rows)
                loss = loss + told
                if len(states):
                    loss = loss + world.reader.heads.users(states).square().mean()
            loss.backward()
            grads = [p.grad.flatten() for p in trained if p.grad is not None]
            return torch.cat([loss.detach()[None], *grads]).float().cpu()

        return go

    found = compare("packed", way(True), way(False), world.args)
    seconds = found["seconds"]["ours"]["median"]
    share = share_of_peak(world, tokens["ours"], 2, seconds)  # forward, and back to the adaptor
    return {**found, "users": users, "tokens": tokens, "share_of_peak": share}


@torch.no_grad()
def evaluation(world: World, every: bool) -> dict[str, Any]:
    """Scores of users, both ways: of all items, or of 101 each."""
    prompts, args = world.prompts(), world.args
    users = args.eval_users
    histories = world.histories(users, HISTORY)
    lists = torch.arange(1, args.items + 1).expand(users, -1)
    if not every:
        lists = torch.from_numpy(world.rng.integers(1, args.items + 1, (users, CANDIDATES)))
    lists = lists.to(args.device)

    def batched() -> Tensor:
        items = world.project(torch.arange(args.items + 1, device=lists.device))
        return (world.users(prompts, histories) @ items.T).gather(1, lists).cpu()

    def one_by_one() -> Tensor:
        pairs = zip(histories, lists, strict=True)
        scores = [world.users(prompts, [h]) @ world.project(items).T for h, items in pairs]
        return torch.cat(scores).cpu()

    name = f"evaluation, {'all' if every else CANDIDATES}"
    found = compare(name, batched, one_by_one, args)
    per_second = round(users / found["seconds"]["ours"]["median"], 2)
    return {**found, "users": users, "items": args.items, "users_per_second": per_second}


@torch.no_grad()
def representations(world: World) -> list[dict[str, Any]]:
    """Tokens and seconds of users by what stands for an item; all in turn for one length."""
    found = []
    names = [name for name in REPRESENTATIONS if name != "cf"]
    every = {name: world.prompts(name) for name in names}
    for length in LENGTHS:
        histories = world.histories(world.args.few_users, length)
        rows = {name: prompts.passes(histories, None, True, True)[0]
                for name, prompts in every.items()}  # fmt: skip
        ways = [lambda part=rows[name]: world.read(part)[0].cpu() for name in names]
        for way in ways:
            way()
        for name, took in zip(names, timed(ways, world.args), strict=True):
            tokens, seconds = sum(map(len, rows[name])), quartiles(took)
            row = {"items": name, "history": length, "tokens": round(tokens / len(histories))}
            share = share_of_peak(world, tokens, 1, seconds["median"])
            row |= {"seconds": seconds, "share_of_peak": share}
            row["seconds_a_user"] = round(seconds["median"] / len(histories), 4)
            found.append(row)
            print(row, flush=True)
    return found


def contexts(world: World) -> list[dict[str, Any]]:
    """How many of 20 items fit into a prompt, on average, with what is read behind them."""
    found, histories = [], world.histories(100, LENGTHS[-1])
    for name in (name for name in REPRESENTATIONS if name != "cf"):
        writer = world.prompts(name).writer
        for context in CONTEXTS:
            room = context - len(writer.asking)
            trunks = [writer.trunk(history.tolist(), room) for history in histories]
            lines = [[len(writer.line(item)) for item in h[::-1]] for h in histories]
            fits = [int((np.cumsum(of) <= room - writer.opening_tokens).sum()) for of in lines]
            tokens = round(float(np.mean([len(trunk) for trunk in trunks])))
            shown = round(float(np.mean(fits)), 1)
            found.append({"items": name, "context": context, "shown": shown, "tokens": tokens})
    return found


def main() -> None:
    """Parses flags, measures, writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", choices=SIZES, default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=TOLERANCE)
    parser.add_argument("--users", type=int, default=16, help="of a step")
    parser.add_argument("--eval_users", type=int, default=20, help="of an evaluation")
    parser.add_argument("--few_users", type=int, default=4, help="of a representation")
    parser.add_argument("--items", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peak_tflops", type=float, default=0.0, help="the device's, if known")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        world = World(args, Path(folder))
        machine.reset_peak_memory(device)
        found: dict[str, Any] = {
            "packed": packed(world),
            "evaluation, all": evaluation(world, every=True),
            f"evaluation, {CANDIDATES}": evaluation(world, every=False),
            "representations": representations(world),
            "contexts": contexts(world),
        }
    result = {
        **{key: value for key, value in vars(args).items() if key != "out"},
        "layer_weights": world.weights,
        "peak_memory_mb": machine.peak_memory_mb(device),
        "machine": machine.device_name(device),
        "versions": machine.versions(),
        **found,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()

"""One LRURec training step and one evaluation batch, against the usual ways to compute them.

    python benchmarks/lrurec_step.py --threads 1
    python benchmarks/lrurec_step.py --inter dataset/amazon-beauty/amazon-beauty.inter

The naive form is written here, as the official code computes: rows left-padded to a power of two,
complex linear layers, a scan in log2(L) levels, logits at every position and `ignore_index`. The
prefix form is what a RecBole model does: a row for every target, its loss at the last position. All
forms hold the same weights and must give the same loss, or nothing is timed. They run in turn on
the same batches; medians, quartiles and ratios go to benchmarks/results/lrurec_step.json. On a CPU
it is processor time that is counted, which other programs on the machine disturb least.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from recbole_mm.data.sequences import STARTS, TARGETS, collate, group_by_user, whole_windows
from recbole_mm.model.layers.lru import LRULayer, real_cells
from recbole_mm.model.lrurec import LRUEncoder

RESULTS = Path(__file__).resolve().parent / "results" / "lrurec_step.json"
WIDTH, D = 50, 64
# A step of the official code itself on other machines of this kind: batch 64, one thread.
OFFICIAL_MS = (819, 970)
GOALS = {"naive": 6.0, "prefix, naive layers": 8.0, "evaluation": 10.0}


# --- the naive form -------------------------------------------------------------------------------


class NaiveLayer(nn.Module):
    """A recurrent layer in complex arithmetic on left-padded rows, with the weights of `layer`."""

    def __init__(self, layer: LRULayer) -> None:
        super().__init__()
        w, b, out = layer.in_proj.weight, layer.in_proj.bias, layer.out_proj.weight
        states, size = w.shape[0] // 2, w.shape[1]
        self.params_log = nn.Parameter(layer.params_log.detach().clone())
        self.in_proj = nn.Linear(size, states, dtype=torch.cfloat)
        self.out_proj = nn.Linear(states, size, dtype=torch.cfloat)
        with torch.no_grad():
            self.in_proj.weight.copy_(torch.complex(w[0::2], w[1::2]))
            self.in_proj.bias.copy_(torch.complex(b[0::2], b[1::2]))
            self.out_proj.weight.copy_(torch.complex(out[:, 0::2], -out[:, 1::2]))
            self.out_proj.bias.copy_(layer.out_proj.bias.to(torch.cfloat))
        self.dropout, self.layer_norm = nn.Dropout(layer.dropout.p), nn.LayerNorm(size)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, L', D), (B, L') -> (B, L', D)."""
        nu, theta, gamma = self.params_log.exp()
        lam = torch.exp(torch.complex(-nu, theta))
        h = naive_scan(gamma * self.in_proj(x.to(torch.cfloat)), lam, mask)  # (B, L', H)
        return self.layer_norm(self.dropout(self.out_proj(h).real) + x)


def naive_scan(h: Tensor, lam: Tensor, mask: Tensor) -> Tensor:
    """Merges neighbouring blocks of 1, 2, 4, ... cells; a pad passes no state on. (B, L', H)."""
    rows, width, states = h.shape
    powers = lam[None]  # (half, H)
    half = 1
    while half < width:
        blocks = h.view(-1, 2 * half, states)  # (B * L' / 2 half, 2 half, H)
        left, right = blocks[:, :half], blocks[:, half:]
        passes = mask.view(-1, 2 * half)[:, half - 1, None, None]
        right = right + powers * left[:, -1:] * passes
        h = torch.cat([left, right], 1).view(rows, width, states)
        powers, half = torch.cat([powers, powers * powers[-1]]), 2 * half
    return h


class NaiveEncoder(nn.Module):
    """The whole network on left-padded rows, with the weights of `encoder`."""

    def __init__(self, encoder: LRUEncoder) -> None:
        super().__init__()
        table = encoder.item_embedding.weight.detach().clone()
        self.item_embedding = nn.Embedding.from_pretrained(table, freeze=False)
        self.output_bias = nn.Parameter(encoder.output_bias.detach().clone())
        self.dropout, self.layer_norm = nn.Dropout(encoder.dropout.p), nn.LayerNorm(table.shape[1])
        self.layers = nn.ModuleList(NaiveLayer(block.lru) for block in encoder.blocks)
        self.feed_forwards = nn.ModuleList(block.feed_forward for block in encoder.blocks)
        self.feed_forwards.load_state_dict(
            {k: v.detach().clone() for k, v in self.feed_forwards.state_dict().items()}
        )

    def forward(self, items: Tensor) -> Tensor:
        """States of left-padded rows. (B, L) -> (B, L, D)."""
        width = items.shape[1]
        items = F.pad(items, (2 ** (width - 1).bit_length() - width, 0))  # (B, L')
        x, mask = self.layer_norm(self.dropout(self.item_embedding(items))), items > 0
        for layer, feed_forward in zip(self.layers, self.feed_forwards, strict=True):
            x = feed_forward(layer(x, mask))
        return x[:, -width:]

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""
        return F.linear(hidden, self.item_embedding.weight, self.output_bias)


# --- batches --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """The same users in the three layouts.

    Attributes:
        whole: inputs, lengths, targets, starts; right-padded and trimmed.
        left: inputs and labels, left-padded to `WIDTH`; a label more than inputs.
        prefix: histories (P, `WIDTH`) and (P,), targets (P,): RecBole's rows.
    """

    whole: tuple[Tensor, Tensor, Tensor, Tensor]
    left: tuple[Tensor, Tensor]
    prefix: tuple[Tensor, Tensor, Tensor]


def row_lengths(path: Path | None, users: int, rng: np.random.Generator) -> np.ndarray:
    """Training interactions of each user: of an atomic file, or drawn like Amazon Beauty's.

    Of Beauty's 22,363 users the mean is 6.9, the median 4, the 90th percentile 12.
    """
    if path is None:
        drawn = 3 + np.exp(rng.normal(0.6, 1.3, users)).astype(np.int64)
    else:
        lines = path.read_text(encoding="utf-8").splitlines()
        column = lines[0].split("\t").index("user_id:token")
        counts = Counter(line.split("\t")[column] for line in lines[1:])
        drawn = np.array(list(counts.values())) - 2
    # The forms treat the 0.6 % of users beyond the limit differently: all take their last items.
    return np.minimum(drawn[drawn >= 2], WIDTH)


def make_batches(args: argparse.Namespace) -> Iterator[Batch]:
    """Batches of random users; their items are uniform, which changes no time."""
    rng = np.random.default_rng(args.seed)
    lengths = row_lengths(args.inter, 20_000, rng)
    for _ in range(args.batches):
        chosen = rng.choice(lengths, args.rows)
        items = [rng.integers(1, args.items, n) for n in chosen]
        yield Batch(*(to(t, args.device) for t in (whole(items), left(items), prefix(items))))


def to(tensors: tuple[Tensor, ...], device: str) -> tuple[Tensor, ...]:
    return tuple(t.to(device) for t in tensors)


def whole(items: list[np.ndarray]) -> tuple[Tensor, ...]:
    users = np.repeat(np.arange(1, len(items) + 1), [len(row) for row in items])
    rows = whole_windows(group_by_user(users, np.concatenate(items)), WIDTH)
    batch = collate(rows, np.arange(len(rows)))
    return batch["item_id_list"], batch["item_length"], batch[TARGETS], batch[STARTS]


def left(items: list[np.ndarray]) -> tuple[Tensor, ...]:
    inputs, labels = torch.zeros(2, len(items), WIDTH, dtype=torch.int64)
    for row, user in enumerate(items):
        inputs[row, WIDTH - len(user) + 1 :] = torch.from_numpy(user[:-1])
        labels[row, WIDTH - len(user) :] = torch.from_numpy(user)
    return inputs, labels


def prefix(items: list[np.ndarray]) -> tuple[Tensor, ...]:
    pairs = [(user[:t], user[t]) for user in items for t in range(1, len(user))]
    grid = torch.zeros(len(pairs), WIDTH, dtype=torch.int64)
    for row, (history, _) in enumerate(pairs):
        grid[row, : len(history)] = torch.from_numpy(history)
    lengths = torch.tensor([len(history) for history, _ in pairs])
    return grid, lengths, torch.tensor([int(target) for _, target in pairs])


# --- the forms ------------------------------------------------------------------------------------


def naive_loss(net: NaiveEncoder, batch: Batch) -> Tensor:
    inputs, labels = batch.left
    logits = net.logits(net(inputs))  # (B, L, V)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=0)


def naive_targets_loss(net: NaiveEncoder, batch: Batch) -> Tensor:
    inputs, labels = batch.left
    return F.cross_entropy(net.logits(net(inputs)[labels > 0]), labels[labels > 0])


def padded_loss(net: LRUEncoder, batch: Batch, width: int | None) -> Tensor:
    """Our layers on right-padded rows, pads computed too; plain cross entropy at targets."""
    items, _, targets, starts = batch.whole
    extra = (width or items.shape[1]) - items.shape[1]
    items, targets = F.pad(items, (0, extra)), F.pad(targets, (0, extra))
    cells = real_cells(torch.full_like(items[:, 0], items.shape[1]), items.shape[1])
    hidden = net.encode(items.flatten()[cells.index], cells)
    wanted = targets.flatten()[cells.index]
    firsts = items[starts, 0]
    pads = net.encode(torch.zeros_like(firsts), real_cells(torch.ones_like(firsts), 1))
    return plain_loss(net, torch.cat([hidden, pads]), torch.cat([wanted, firsts]))


def cells_loss(net: LRUEncoder, batch: Batch) -> Tensor:
    """Our layers on real cells; plain cross entropy at targets."""
    items, lengths, targets, starts = batch.whole
    cells = real_cells(lengths, items.shape[1])
    hidden = net.encode(items.flatten()[cells.index], cells)
    firsts = items[starts, 0]
    pads = net.encode(torch.zeros_like(firsts), real_cells(torch.ones_like(firsts), 1))
    wanted = torch.cat([targets.flatten()[cells.index], firsts])
    return plain_loss(net, torch.cat([hidden, pads]), wanted)


def plain_loss(net: LRUEncoder, hidden: Tensor, wanted: Tensor) -> Tensor:
    return F.cross_entropy(net.scores(hidden[wanted > 0]), wanted[wanted > 0])


def our_loss(net: LRUEncoder, batch: Batch) -> Tensor:
    return net.loss(*batch.whole)


def prefix_naive_loss(net: NaiveEncoder, batch: Batch) -> Tensor:
    grid, lengths, targets = batch.prefix
    shift = (torch.arange(WIDTH, device=grid.device) + lengths[:, None]) % WIDTH
    hidden = net(grid.gather(1, shift))[:, -1]  # (P, D), rows rolled to the right
    return F.cross_entropy(net.logits(hidden), targets)


def prefix_our_loss(net: LRUEncoder, batch: Batch) -> Tensor:
    grid, lengths, targets = batch.prefix
    return net.full_softmax(net(grid, lengths), targets)


Loss = Callable[[Any, Batch], Tensor]
STEPS: dict[str, tuple[type[nn.Module], Loss]] = {
    "naive": (NaiveEncoder, naive_loss),
    "+ logits at targets only": (NaiveEncoder, naive_targets_loss),
    "+ real products, loop over time": (LRUEncoder, lambda n, b: padded_loss(n, b, WIDTH)),
    "+ trimmed to the longest row": (LRUEncoder, lambda n, b: padded_loss(n, b, None)),
    "+ real cells only": (LRUEncoder, cells_loss),
    "ours (+ loss in chunks)": (LRUEncoder, our_loss),
    "prefix, naive layers": (NaiveEncoder, prefix_naive_loss),
    "prefix, our layers": (LRUEncoder, prefix_our_loss),
}
OURS = "ours (+ loss in chunks)"


def build(kind: type[nn.Module], args: argparse.Namespace) -> nn.Module:
    """A network of fresh but always the same weights."""
    torch.manual_seed(args.seed)
    encoder = LRUEncoder(args.items, D, dropout_prob=0.6, attn_dropout_prob=0.6)
    net = encoder if kind is LRUEncoder else NaiveEncoder(encoder)
    return net.to(args.device)


# --- measuring ------------------------------------------------------------------------------------


def clock(device: str) -> float:
    """Seconds of processor time on a CPU, of the clock on a GPU that has done its work."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def time_steps(args: argparse.Namespace, batches: list[Batch]) -> dict[str, list[float]]:
    """Milliseconds of each form: zero_grad, loss, backward, clip, AdamW; in turn on each batch."""
    nets = {name: build(kind, args).train() for name, (kind, _) in STEPS.items()}
    optimizers = {
        name: torch.optim.AdamW(net.parameters(), lr=1e-3, eps=1e-9, weight_decay=0.0)
        for name, net in nets.items()
    }
    times: dict[str, list[float]] = {name: [] for name in STEPS}
    for batch in batches:
        for name, (_, loss) in STEPS.items():
            start = clock(args.device)
            optimizers[name].zero_grad()
            loss(nets[name], batch).backward()
            nn.utils.clip_grad_norm_(nets[name].parameters(), 5.0)
            optimizers[name].step()
            times[name].append((clock(args.device) - start) * 1e3)
    return {name: values[1:] for name, values in times.items()}  # the first warms up


def check_losses(args: argparse.Namespace, batch: Batch) -> dict[str, float]:
    """The loss of every form without dropout; those over the same targets must agree."""
    losses = {}
    with torch.no_grad():
        for name, (kind, loss) in STEPS.items():
            losses[name] = loss(build(kind, args).eval(), batch).item()
        items, lengths, targets, _ = batch.whole
        without_firsts = build(LRUEncoder, args).eval().loss(items, lengths, targets).item()
    for name, value in losses.items():
        expected = without_firsts if name.startswith("prefix") else losses["naive"]
        if abs(value - expected) > 1e-5 * abs(expected):
            raise SystemExit(f"{name}: loss {value}, expected {expected}")
    return losses


@torch.no_grad()
def time_scores(args: argparse.Namespace, batches: list[Batch]) -> dict[str, list[float]]:
    """Milliseconds to score all items for a batch of users; equal scores or nothing is timed."""
    naive, ours = (build(kind, args).eval() for kind in (NaiveEncoder, LRUEncoder))
    forms: dict[str, Callable[[Batch], Tensor]] = {
        "all positions, naive layers": lambda b: naive.logits(naive(b.left[0]))[:, -1],
        "last position, ours": lambda b: ours.scores(ours(b.whole[0], b.whole[1])),
    }
    torch.testing.assert_close(*(form(batches[0]) for form in forms.values()), rtol=1e-4, atol=1e-5)
    times: dict[str, list[float]] = {name: [] for name in forms}
    for batch in batches:
        for name, form in forms.items():
            start = clock(args.device)
            form(batch)
            times[name].append((clock(args.device) - start) * 1e3)
    return {name: values[1:] for name, values in times.items()}


def summary(times: dict[str, list[float]], ours: str) -> dict[str, dict[str, float]]:
    """Median and quartiles of each form, and the median of its ratio to ours on the same batch."""
    rows = {}
    for name, values in times.items():
        low, middle, high = np.percentile(values, [25, 50, 75])
        ratio = np.median(np.array(values) / np.array(times[ours]))
        keys = ("median_ms", "q1_ms", "q3_ms", "times_ours")
        rows[name] = dict(zip(keys, np.round([middle, low, high, ratio], 2).tolist(), strict=True))
    return rows


def show(title: str, rows: dict[str, dict[str, float]]) -> None:
    print(f"\n{title:<36}{'median ms':>10}{'quartiles':>18}{'x ours':>8}")
    for name, row in rows.items():
        quartiles = f"{row['q1_ms']:.1f}-{row['q3_ms']:.1f}"
        print(f"{name:<36}{row['median_ms']:>10.1f}{quartiles:>18}{row['times_ours']:>8.1f}")


def processor(device: str) -> str:
    if device != "cpu":
        return str(torch.cuda.get_device_name())
    info = Path("/proc/cpuinfo")
    names = (
        [line for line in info.read_text().splitlines() if "model name" in line]
        if info.is_file()
        else []
    )
    return names[0].split(":")[1].strip() if names else platform.processor()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--items", type=int, default=12_102, help="V, with the pad")
    parser.add_argument(
        "--rows", type=int, default=64, help="users a training batch; twice that at evaluation"
    )
    parser.add_argument("--batches", type=int, default=12, help="batches timed, one more warms up")
    parser.add_argument("--inter", type=Path, help="an atomic file to take users' lengths from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--check", action="store_true", help="fail when a ratio misses its goal")
    return parser.parse_args()


def main() -> int:
    args = parse()
    torch.set_num_threads(args.threads)
    args.batches += 1
    batches = list(make_batches(args))
    losses = check_losses(args, batches[0])
    steps = summary(time_steps(args, batches), OURS)
    eval_args = argparse.Namespace(**{**vars(args), "rows": 2 * args.rows})
    scores = summary(time_scores(eval_args, list(make_batches(eval_args))), "last position, ours")
    show(f"Training step, {args.rows} users", steps)
    print(
        f"the official code's own step: {OFFICIAL_MS[0]}-{OFFICIAL_MS[1]} ms (batch 64, one thread)"
    )
    show(f"Full-sort scores, {2 * args.rows} users", scores)

    ratios = {name: steps[name]["times_ours"] for name in ("naive", "prefix, naive layers")}
    ratios["evaluation"] = scores["all positions, naive layers"]["times_ours"]
    missed = [name for name, goal in GOALS.items() if ratios[name] < goal]
    result = {
        "processor": processor(args.device),
        "threads": args.threads,
        "torch": torch.__version__,
        "shapes": {"V": args.items, "B": args.rows, "L": WIDTH, "D": D},
        "targets_a_batch": round(float(np.mean([int((b.left[1] > 0).sum()) for b in batches])), 1),
        "lengths": args.inter.name if args.inter else "drawn like Amazon Beauty's",
        "losses_without_dropout": losses,
        "official_step_ms": OFFICIAL_MS,
        "step": steps,
        "scores": scores,
        "goals": GOALS,
        "missed": missed,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nwritten to {args.out}" + (f"; below the goal: {', '.join(missed)}" if missed else ""))
    return 1 if missed and args.check else 0


if __name__ == "__main__":
    sys.exit(main())

"""Tiny models that take a prefix, and what they are to give, written out head by head.

The reference reads one row at a time without its padding, so that there is neither a mask nor a
place to shift: token t of n stands at position t. It calls no module of the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

VOCAB, WIDTH, HEADS, LAYERS = 23, 8, 2, 3
PAD = 1


@dataclass(frozen=True)
class Build:
    """How one kind of model is made, and the names of its weights.

    Attributes:
        names: query, key, value, out, norm before or after them, up, down, and their norm.
        first: row of the position table at which a text begins.
        before: whether norms stand before attention and feed-forward, not behind the residual.
    """

    class_name: str
    settings: dict[str, Any]
    layer: str
    names: tuple[str, ...]
    words: str
    positions: str
    first: int = 0
    before: bool = False
    causal: bool = False
    act: Callable[[Tensor], Tensor] = F.gelu


_BERT_NAMES = (
    *(f"attention.self.{name}" for name in ("query", "key", "value")),
    *("attention.output.dense", "attention.output.LayerNorm"),
    *("intermediate.dense", "output.dense", "output.LayerNorm"),
)
_OPT_NAMES = (
    *(f"self_attn.{name}_proj" for name in "qkv"),
    *("self_attn.out_proj", "self_attn_layer_norm", "fc1", "fc2", "final_layer_norm"),
)
_ENCODER = {
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "intermediate_size": 12,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "max_position_embeddings": 20,
    "pad_token_id": PAD,
}
_OPT = {
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "ffn_dim": 12,
    "dropout": 0.0,
    "max_position_embeddings": 18,
    "word_embed_proj_dim": WIDTH,
}
_GPT2 = {
    "n_embd": WIDTH,
    "n_head": HEADS,
    "n_layer": LAYERS,
    "n_positions": 18,
    **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
}
_EMBEDDINGS = ("embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight")
_OPT_EMBEDDINGS = ("decoder.embed_tokens.weight", "decoder.embed_positions.weight")
BUILDS = {
    "bert": Build("Bert", _ENCODER, "encoder.layer", _BERT_NAMES, *_EMBEDDINGS),
    "roberta": Build("Roberta", _ENCODER, "encoder.layer", _BERT_NAMES, *_EMBEDDINGS, PAD + 1),
    "xlm-roberta": Build(
        "XLMRoberta", _ENCODER, "encoder.layer", _BERT_NAMES, *_EMBEDDINGS, PAD + 1
    ),
    "mpnet": Build(
        "MPNet",
        _ENCODER,
        "encoder.layer",
        (*(f"attention.attn.{name}" for name in "qkvo"), "attention.LayerNorm", *_BERT_NAMES[5:]),
        *_EMBEDDINGS,
        PAD + 1,
    ),
    "gpt2": Build(
        "GPT2",
        _GPT2,
        "h",
        (*("attn.c_attn",) * 3, "attn.c_proj", "ln_1", "mlp.c_fc", "mlp.c_proj", "ln_2"),
        *("wte.weight", "wpe.weight"),
        before=True,
        causal=True,
        act=partial(F.gelu, approximate="tanh"),
    ),
    "opt": Build(
        "OPT",
        _OPT,
        "decoder.layers",
        _OPT_NAMES,
        *_OPT_EMBEDDINGS,
        2,
        before=True,
        causal=True,
        act=F.relu,
    ),
    "opt-350m": Build(
        "OPT",
        {**_OPT, "word_embed_proj_dim": 4, "do_layer_norm_before": False},
        "decoder.layers",
        _OPT_NAMES,
        *_OPT_EMBEDDINGS,
        2,
        causal=True,
        act=F.relu,
    ),
}
KINDS = tuple(BUILDS)
CAUSAL = tuple(kind for kind in KINDS if BUILDS[kind].causal)
# stock MPNet knows eager attention alone
CASES = [(k, a) for k in KINDS for a in ("eager", "sdpa") if (k, a) != ("mpnet", "sdpa")]


def build_model(kind: str, attention: str = "eager", dtype: torch.dtype = torch.float64) -> Any:
    """Random weights, large enough that every part of the model matters."""
    import transformers

    build = BUILDS[kind]
    config = getattr(transformers, f"{build.class_name}Config")(vocab_size=VOCAB, **build.settings)
    config._attn_implementation = attention
    model = getattr(transformers, f"{build.class_name}Model")(config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            is_scale = name.endswith("weight") and parameter.ndim == 1
            parameter.copy_(1 + 0.2 * noise if is_scale else 0.5 * noise)
    return model.to(dtype).eval()


class Naive:
    """The equations with the weights of a model, which gradients reach."""

    def __init__(self, kind: str, model: Any, prefix_ln: bool = False) -> None:
        self.build = BUILDS[kind]
        self.is_mpnet = kind == "mpnet"
        self.weights = dict(model.named_parameters())
        self.prefix_ln = prefix_ln

    def row(
        self, ids: Tensor, prefix: Tensor, vectors: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """The last states and those entering each layer: (n, H) each.

        Args:
            ids: of the text alone, without padding. Shape: (n,).
            prefix: shape (LAYERS, P, H).
            vectors: before the embeddings, at the first token's position. Shape: (P, E).
        """
        positions = list(range(len(ids)))
        words = self.weights[self.build.words][ids]
        if vectors is not None:
            positions, words = [0] * len(vectors) + positions, torch.cat([vectors, words])
        h, entering = self.embed(words, positions), []
        for index in range(LAYERS):
            entering.append(h)
            h = self.layer(index, h, prefix[index], positions)
        return self.end(h)[len(positions) - len(ids) :], entering

    def embed(self, words: Tensor, positions: list[int]) -> Tensor:
        if "decoder.project_in.weight" in self.weights:
            words = words @ self.weights["decoder.project_in.weight"].T
        places = [self.build.first + position for position in positions]
        h = words + self.weights[self.build.positions][places]
        if "embeddings.token_type_embeddings.weight" in self.weights:
            h = h + self.weights["embeddings.token_type_embeddings.weight"][0]
        return self.norm("embeddings.LayerNorm", h) if "embeddings" in self.build.words else h

    def end(self, h: Tensor) -> Tensor:
        for name in ("ln_f", "decoder.final_layer_norm"):
            if f"{name}.weight" in self.weights:
                h = self.norm(name, h)
        if "decoder.project_out.weight" in self.weights:
            h = h @ self.weights["decoder.project_out.weight"].T
        return h

    def layer(self, index: int, h: Tensor, d: Tensor, positions: list[int]) -> Tensor:
        *attention, norm1, up, down, norm2 = (
            f"{self.build.layer}.{index}.{name}" for name in self.build.names
        )
        if self.build.before:
            d = self.norm(norm1, d) if self.prefix_ln else d
            h = h + self.attend(attention, self.norm(norm1, h), d, positions)
            return h + self.feed_forward(up, down, self.norm(norm2, h))
        h = self.norm(norm1, h + self.attend(attention, h, d, positions))
        return self.norm(norm2, h + self.feed_forward(up, down, h))

    def attend(self, names: list[str], h: Tensor, d: Tensor, positions: list[int]) -> Tensor:
        """Equations 8 to 11: one query of one head after the other."""
        query, key, value, out = names
        both = torch.cat([d, h])
        Q, K, V = self.linear(query, h, 0), self.linear(key, both, 1), self.linear(value, both, 2)
        rows = []
        for t in range(len(h)):
            seen = len(d) + (t + 1 if self.build.causal else len(h))
            heads = []
            for head in range(HEADS):
                part = slice(head * WIDTH // HEADS, (head + 1) * WIDTH // HEADS)
                products = torch.stack([Q[t, part] @ K[j, part] for j in range(seen)])
                scores = products / math.sqrt(WIDTH // HEADS)
                scores = scores + self.bias(head, t, len(d), positions)[:seen]
                weights = scores.exp() / scores.exp().sum()
                heads.append(sum(weights[j] * V[j, part] for j in range(seen)))
            rows.append(torch.cat(heads))  # type: ignore[arg-type]
        return self.linear(out, torch.stack(rows))

    def bias(self, head: int, t: int, P: int, positions: list[int]) -> Tensor:
        """MPNet's, by how far a key is from the query: of P prefix rows nothing. (P + n,)"""
        if not self.is_mpnet:
            return torch.zeros(P + len(positions), dtype=torch.float64)
        table = self.weights["encoder.relative_attention_bias.weight"]
        found = [table[bucket_of(positions[t] - place), head] for place in positions]
        return torch.cat([table.new_zeros(P), torch.stack(found)])

    def feed_forward(self, up: str, down: str, h: Tensor) -> Tensor:
        return self.linear(down, self.build.act(self.linear(up, h)))

    def linear(self, name: str, x: Tensor, third: int = 0) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        if self.build.class_name != "GPT2":
            return x @ weight.T + bias
        if name.endswith("c_attn"):  # of queries, keys and values side by side
            part = slice(third * WIDTH, (third + 1) * WIDTH)
            weight, bias = weight[:, part], bias[part]
        return x @ weight + bias

    def norm(self, name: str, x: Tensor) -> Tensor:
        eps = 1e-12 if self.build.settings is _ENCODER else 1e-5
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]


def bucket_of(distance: int) -> int:
    """Of a query from a key: 8 exact ones to either side, then logarithmic ones up to 128."""
    far = abs(distance)
    if far >= 8:
        far = min(15, 8 + int(math.log(far / 8) / math.log(128 / 8) * 8))
    return far + (16 if distance < 0 else 0)

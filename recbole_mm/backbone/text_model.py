"""A language model that reads a text beside a prefix and makes one vector of it.

It is frozen unless said otherwise: what prefixes bring in is then all that is trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from recbole_mm.backbone.encode import DTYPES, load_encoder, pool
from recbole_mm.backbone.encoder_source import find_encoder
from recbole_mm.backbone.prefix import PrefixModel
from recbole_mm.backbone.prompt import TextEncoder
from recbole_mm.backbone.tiny import fingerprint, train_tokenizer
from recbole_mm.errors import UserError, nearest

Ids = NDArray[np.int64]
POOLINGS = ("auto", "mean", "cls", "last")
_TINY_CONTEXT = 512  # tokens


@dataclass(frozen=True)
class TextModelSpec:
    """A language model's description: a file of `properties/backbone/` of the family ``text``.

    Attributes:
        name: as the user wrote it; goes into the result.
        family: ``text``.
        model: short name, Hugging Face id, or local folder.
        dtype: of frozen weights; trained ones are float32.
        pooling: of the last states: mean, cls, last, or auto: as its own files say, else mean for
            an encoder and last for a decoder.
        is_tiny: a small BERT with random weights instead of `model`.
        tiny: its sizes.
    """

    name: str
    family: str
    model: str
    dtype: str = "float32"
    pooling: str = "auto"
    is_tiny: bool = False
    tiny: Mapping[str, int] | None = None

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> TextModelSpec:
        """A checked description.

        Raises:
            UserError: an unknown key or value, or a backbone of another kind.
        """
        if mapping.get("family") != "text":
            raise UserError(
                f"--backbone={mapping.get('name')} ranks prompts; this model needs one that reads "
                "texts, such as minilm."
            )
        known = {field.name for field in fields(cls)}
        for key in mapping:
            if key not in known:
                raise UserError(
                    f"backbone {mapping.get('name')}: no key '{key}'{nearest(key, known)}."
                )
        spec = cls(**mapping)
        for key, allowed in (("dtype", tuple(DTYPES)), ("pooling", POOLINGS)):
            if getattr(spec, key) not in allowed:
                raise UserError(
                    f"{key} is '{getattr(spec, key)}': it is one of {', '.join(allowed)}."
                )
        return spec


class TextModel(nn.Module):
    """A language model that takes prefixes, with its tokenizer.

    Args:
        name: of the backbone, for the result.
        model: of a class that `PrefixModel` takes.
        tokenizer: its own.
        pooling: mean, cls or last.
        version: what tells it from other models: revision, or hash of its files.

    Attributes:
        reads: the same with prefixes, see `PrefixModel`.
        encoder: text to token ids.
        fingerprint: what decides the ids of a text.
    """

    def __init__(
        self, name: str, model: nn.Module, tokenizer: Any, pooling: str, version: str
    ) -> None:
        super().__init__()
        self.name, self.model, self.pooling, self.version = name, model, pooling, version
        self.reads = PrefixModel(model)
        self.encoder = TextEncoder(tokenizer)
        self.fingerprint = fingerprint(tokenizer)
        pad = tokenizer.pad_token_id
        self.pad_id = int(pad if pad is not None else tokenizer.eos_token_id or 0)
        self.before, self.after = _frame(tokenizer)

    @property
    def width(self) -> int:
        """Size of a text's vector: that of a state, but of a word embedding for OPT-350m."""
        config: Any = self.model.config  # type: ignore[union-attr]
        return int(getattr(config, "word_embed_proj_dim", config.hidden_size))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def padded(self, rows: Sequence[Ids]) -> tuple[Tensor, Tensor]:
        """Token ids with padding at the end, and which are none. Shapes: (B, T)."""
        T = max(map(len, rows))
        ids = torch.full((len(rows), T), self.pad_id)  # (B, T)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = torch.from_numpy(row), 1
        return ids.to(self.device), mask.to(self.device)

    def vectors(
        self,
        texts: tuple[Tensor, Tensor],
        prefix: Tensor | None = None,
        inputs: Tensor | None = None,
    ) -> Tensor:
        """One vector a text, float32.

        Args:
            texts: of `padded`.
            prefix: for every layer. Shape: (N, B, P, H).
            inputs: vectors before the words, instead of a prefix. Shape: (B, P, E).

        Returns:
            Shape: (B, width).
        """
        ids, mask = texts
        if inputs is None:
            states = self.reads(ids, mask, prefix)  # (B, T, H)
        else:
            states = self.reads.with_inputs(ids, mask, inputs)
        return pool(states.float(), mask, self.pooling)

    @torch.no_grad()
    def layer_means(self, texts: tuple[Tensor, Tensor]) -> Tensor:
        """The mean state of a text that enters each layer, without prefix. Shape: (N, B, H)."""
        ids, mask = texts
        _, states = self.reads.states(ids, mask)  # (N, B, T, H)
        weights = mask[None, :, :, None].float()
        return (states.float() * weights).sum(2) / weights.sum(2)


def _frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that the model wants before and after a text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    at = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    return whole[:at], whole[at + len(plain) :]


def load_text_model(
    spec: TextModelSpec, texts: Iterable[str], fixed: Iterable[str], seed: int
) -> TextModel:
    """Loads a language model, or builds a tiny one; frozen.

    Args:
        spec: its description.
        texts: the dataset's own texts, of which a tiny one's tokenizer is trained.
        fixed: our own words in them, likewise.
        seed: of a tiny one's weights.

    Raises:
        UserError: it cannot be found, or takes no prefixes.
    """
    if spec.is_tiny:
        return _tiny(spec, texts, fixed, seed)
    source = find_encoder(spec.model)
    found: Any = load_encoder(source, "cpu", spec.dtype)
    if not hasattr(found, "how"):
        raise UserError(
            f"Backbone '{spec.name}' has two towers and takes no prefix: take a language model."
        )
    pooling = spec.pooling
    if pooling == "auto":
        decodes = found.model.config.model_type in ("gpt2", "opt")
        said = source.json("modules.json") is not None or not decodes
        pooling = found.how if said else "last"
    tokenizer = found.tokens.tokenizer
    return TextModel(spec.name, found.model, tokenizer, pooling, source.revision)


class _Plain:
    """What `train_tokenizer` asks of a family: here no special tokens but padding."""

    special_tokens = ("<|pad|>",)
    special_roles: ClassVar = dict.fromkeys(("pad_token", "eos_token", "unk_token"), "<|pad|>")


def _tiny(spec: TextModelSpec, texts: Iterable[str], fixed: Iterable[str], seed: int) -> TextModel:
    from transformers import BertConfig, BertModel

    sizes = dict(spec.tiny or {})
    tokenizer = train_tokenizer(_Plain, texts, fixed, sizes["vocab_size"])  # type: ignore[arg-type]
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        max_position_embeddings=_TINY_CONTEXT,
        pad_token_id=tokenizer.pad_token_id,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BertModel(config, add_pooling_layer=False).eval().requires_grad_(False)
    version = f"tiny {sorted(sizes.items())} {seed} {fingerprint(tokenizer)}"
    pooling = "mean" if spec.pooling == "auto" else spec.pooling
    return TextModel(spec.name, model, tokenizer, pooling, version)

"""Vectors beside a text: further keys and values of every layer, or inputs before its first token.

A prefix of a layer gives keys and values by that layer's own weights and asks nothing itself: every
token of the text sees all of it, in a causal model too (RA-Rec, equations 7 to 11). Positions are
those of the text alone, so that a prefix moves no token; they count real tokens, so that it does
not matter on which side a row is padded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from recbole_mm.backbone.mpnet import run_mpnet
from recbole_mm.errors import UserError

PREFIX_LN = ("none", "layer")
_ATTENTION = ("eager", "sdpa")


@dataclass(frozen=True)
class _Family:
    """Where models of one build keep their parts.

    Attributes:
        layers: path of the list of layers.
        projections: paths, within a layer, of what makes keys and what makes values; a single one
            makes queries, keys and values side by side.
        norm: path, within a layer, of the norm before its attention; None: has none.
        after_padding: positions begin after the id of the padding token, not at 0.
    """

    layers: str
    projections: tuple[str, ...]
    norm: str | None = None
    after_padding: bool = False


_BERT = _Family("encoder.layer", ("attention.self.key", "attention.self.value"))
_ROBERTA = _Family(_BERT.layers, _BERT.projections, after_padding=True)
_MPNET = _Family("encoder.layer", ("attention.attn.k", "attention.attn.v"), after_padding=True)
_GPT2 = _Family("h", ("attn.c_attn",), "ln_1")
_OPT = _Family("decoder.layers", ("self_attn.k_proj", "self_attn.v_proj"), "self_attn_layer_norm")
_FAMILIES = {
    "BertModel": _BERT,
    "RobertaModel": _ROBERTA,
    "XLMRobertaModel": _ROBERTA,
    "MPNetModel": _MPNET,
    "GPT2Model": _GPT2,
    "OPTModel": _OPT,
}


class PrefixModel:
    """A Hugging Face base model that takes vectors beside its text; has no weights of its own.

    Attributes:
        model: the model, as it was given; nothing in it is changed.
        n_layers: its layers, each of which takes a prefix.
        width: H, of the states that enter a layer, and of a prefix.
        max_tokens: the longest text it has positions for.

    Args:
        model: a `BertModel`, `RobertaModel`, `XLMRobertaModel`, `MPNetModel`, `GPT2Model` or
            `OPTModel`.
        prefix_ln: none: prefixes go to the projections as they are; layer: through the norm that
            stands before the attention, as a token's state does (GPT-2, OPT but for OPT-350m).

    Raises:
        UserError: the model is of another class, reads a second text by cross-attention, has
            gradient checkpointing on or an attention other than eager or sdpa, or has no norm for
            `prefix_ln`.
    """

    def __init__(self, model: Any, prefix_ln: str = "none") -> None:
        self.model = model
        self._family = _family_of(model)
        _check_settings(model)
        self._norm = _norm_of(model, self._family, prefix_ln)
        self.n_layers = int(model.config.num_hidden_layers)
        self.width = int(model.config.hidden_size)
        self._first = model.embeddings.padding_idx + 1 if self._family.after_padding else 0
        self.max_tokens = int(model.config.max_position_embeddings) - self._first

    @property
    def word_embeddings(self) -> Tensor:
        """The matrix of word embeddings (V, E); E is `width`, but for OPT-350m."""
        weight: Tensor = self.model.get_input_embeddings().weight
        return weight

    def __call__(self, input_ids: Tensor, mask: Tensor, prefix: Tensor | None = None) -> Tensor:
        """The last hidden states of a text, read with a prefix.

        Args:
            input_ids: shape (B, T).
            mask: 1 for tokens, 0 for padding, which stands on one side of a row. Shape: (B, T).
            prefix: of every layer; None: the text alone. Shape: (n_layers, B, P, H).

        Returns:
            Shape: (B, T, H), or (B, T, E) for OPT-350m; where the mask is 0, of no meaning.

        Raises:
            UserError: gradient checkpointing has been switched on.
            ValueError: a shape does not fit, or the text is longer than `max_tokens`.
        """
        return self._run(self._embed(input_ids), mask, self._positions(mask), prefix)[0]

    def states(
        self, input_ids: Tensor, mask: Tensor, prefix: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As a call, and the states that enter each layer, before any norm: (n_layers, B, T, H)."""
        embeds, positions = self._embed(input_ids), self._positions(mask)
        last, entering = self._run(embeds, mask, positions, prefix, keep_states=True)
        return last, torch.stack(entering)

    def with_inputs(self, input_ids: Tensor, mask: Tensor, vectors: Tensor) -> Tensor:
        """The last hidden states of a text before whose input embeddings vectors stand.

        They are tokens but for the embedding: they ask too, and in a causal model see those before
        them. All stand at the first token's position, whose embedding is added to them: the
        bias of what makes them can take it away.

        Args:
            input_ids: shape (B, T).
            mask: as in a call. Shape: (B, T).
            vectors: shape (B, P, E), E that of `word_embeddings`.

        Returns:
            Of the text. Shape: (B, T, H), or (B, T, E) for OPT-350m.

        Raises:
            UserError, ValueError: as a call.
        """
        embeds, positions = self._embed(input_ids), self._positions(mask)
        B, P = vectors.shape[:2]
        _check_shape("vectors", vectors, (len(input_ids), P, embeds.shape[2]))
        embeds = torch.cat([vectors.to(embeds.dtype), embeds], dim=1)  # (B, P + T, E)
        positions = torch.cat([positions.new_full((B, P), self._first), positions], dim=1)
        return self._run(embeds, _seen_before(mask, P), positions, None)[0][:, P:]

    def _embed(self, input_ids: Tensor) -> Tensor:
        embeds: Tensor = self.model.get_input_embeddings()(input_ids)  # (B, T, E)
        return embeds

    def _positions(self, mask: Tensor) -> Tensor:
        """(B, T)"""
        if mask.shape[1] > self.max_tokens:
            raise ValueError(
                f"texts of {mask.shape[1]} tokens: {type(self.model).__name__} has positions for "
                f"{self.max_tokens}"
            )
        return (mask.long().cumsum(dim=1) - 1).clamp(min=0) + self._first

    def _run(
        self,
        embeds: Tensor,
        mask: Tensor,
        positions: Tensor,
        prefix: Tensor | None,
        keep_states: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The last states, and those entering each layer."""
        _check_settings(self.model)
        B, T = embeds.shape[:2]
        _check_shape("mask", mask, (B, T))
        if prefix is None:
            prefix = embeds.new_empty(self.n_layers, B, 0, self.width)
        _check_shape("prefix", prefix, (self.n_layers, B, prefix.shape[-2], self.width))
        mask = _seen_before(mask, prefix.shape[2])  # (B, P + T)
        prefix = prefix.to(self.model.dtype).contiguous()  # GPT-2 takes views of it
        if self._family is _MPNET:
            return run_mpnet(self.model, embeds, mask, positions, prefix, keep_states)
        out = self.model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions,  # else they would begin at P
            past_key_values=self._cache(prefix),
            use_cache=False,
            output_hidden_states=keep_states,
            return_dict=True,
        )
        return out.last_hidden_state, tuple(out.hidden_states[:-1]) if keep_states else ()

    def _cache(self, prefix: Tensor) -> Any:
        """Anew each time, because a forward pass appends the text to it."""
        from transformers import DynamicCache

        cache = DynamicCache()
        for index, (keys, values) in enumerate(self._keys_values(prefix)):
            cache.update(keys, values, index)
        return cache

    def _keys_values(self, prefix: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each layer, equations 10 and 11. Shape: (B, heads, P, H / heads) both."""
        heads = self.model.config.num_attention_heads
        layers = self.model.get_submodule(self._family.layers)
        for layer, d in zip(layers, prefix, strict=True):
            if self._norm is not None:
                d = layer.get_submodule(self._norm)(d)
            made = [layer.get_submodule(path)(d) for path in self._family.projections]
            both = torch.cat(made, dim=-1)[..., -2 * self.width :]  # (B, P, 2H)
            keys, values = both.unflatten(-1, (2 * heads, -1)).transpose(1, 2).chunk(2, dim=1)
            yield keys, values


def _family_of(model: Any) -> _Family:
    name = next((c.__name__ for c in type(model).__mro__ if c.__name__ in _FAMILIES), None)
    if name is None:
        kind = getattr(getattr(model, "config", None), "model_type", "unknown")
        raise UserError(
            f"{type(model).__name__} (model type '{kind}') takes no prefix: use a "
            f"{', '.join(_FAMILIES)}, of a model with a head its base_model."
        )
    return _FAMILIES[name]


def _check_settings(model: Any) -> None:
    """Raises `UserError` for settings with which a prefix would be lost or untested."""
    name, config = type(model).__name__, model.config
    if any(getattr(config, key, False) for key in ("is_decoder", "add_cross_attention")):
        raise UserError(
            f"{name} is set up as the decoder of an encoder-decoder, which takes no prefix: load "
            "it without is_decoder and add_cross_attention."
        )
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise UserError(
            f"{name} would drop a prefix while gradient checkpointing is on: set "
            "gradient_checkpointing to false."
        )
    if config._attn_implementation not in _ATTENTION:
        raise UserError(
            f"{name} takes no prefix with attention {config._attn_implementation}: set attention "
            f"to {' or '.join(_ATTENTION)}."
        )


def _norm_of(model: Any, family: _Family, prefix_ln: str) -> str | None:
    if prefix_ln not in PREFIX_LN:
        raise UserError(f"prefix_ln is '{prefix_ln}': it is one of {', '.join(PREFIX_LN)}.")
    if prefix_ln == "none":
        return None
    if family.norm is None or not getattr(model.config, "do_layer_norm_before", True):
        raise UserError(
            f"prefix_ln is layer, but {type(model).__name__} has no norm before its attention: "
            "set prefix_ln to none."
        )
    return family.norm


def _check_shape(what: str, found: Tensor, expected: tuple[int, ...]) -> None:
    if found.shape != expected:
        raise ValueError(f"{what} has shape {tuple(found.shape)}, not {expected}")


def _seen_before(mask: Tensor, P: int) -> Tensor:
    """The mask with P places before it that every token sees. (B, P + T)"""
    return F.pad(mask.long(), (P, 0), value=1)

"""Texts that a language model writes, each once and for ever: in batches, kept on disk, resumable.

A request is what a prompt says; its key is made of the model, its revision, the words, the bytes of
the pictures and how is decoded. What has a key on disk is not written again, and a model is loaded
only when a text is missing.
"""

from __future__ import annotations

import hashlib
import json
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from recbole_mm.backbone.batch import PromptBatch, by_length, collate
from recbole_mm.backbone.load import (
    Backbone,
    BackboneSpec,
    check_template,
    commit_of,
    load_backbone,
    model_files,
)
from recbole_mm.backbone.prompt import Prompt, clean_text, join, text_piece
from recbole_mm.backbone.vision import ItemImages
from recbole_mm.errors import UserError

_HALF = "\N{REPLACEMENT CHARACTER}"  # of a character of which not all bytes were written
_PROMPTS_AT_ONCE = 4096  # written and sorted by length together: memory stays bounded
# What of a description changes what a model says.
_SAYS = (
    *("family", "model", "revision", "dtype", "quantize"),
    *("min_pixels", "max_pixels", "image_pooling", "is_tiny"),
)


# --- what is asked --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quoted:
    """Text from outside, after a space: cleaned, without special tokens, cut to its budget."""

    text: str
    max_tokens: int


@dataclass(frozen=True)
class Shown:
    """The picture of an item; `instead` is said where it has none that can be read."""

    item: int
    instead: str


Request = tuple[str | Quoted | Shown, ...]  # str: our own words


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: a text is cut there.
        temperature: 0 takes the likeliest token; above it tokens are drawn.
        top_p: drawn are the likeliest tokens that have this share of the probability.
        seed: of the draw; each request has its own generator, whatever batch it is in.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def about(self) -> list[float]:
        """What the result depends on."""
        drawn = [self.temperature, self.top_p, self.seed] if self.temperature else []
        return [self.max_new_tokens, *drawn]


# --- what is kept ---------------------------------------------------------------------------------


class TextLog:
    """Append-only texts on disk by key: a killed job loses at most the records in flight.

    Each process appends to a file of its own and reads those of all. A line that is torn or damaged
    is passed over: its checksum tells.

    Args:
        folder: made when the first text is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._own = folder / f"{uuid.uuid4().hex}.jsonl"
        self._texts: dict[str, str] = {}
        for path in sorted(folder.glob("*.jsonl")):
            self._texts.update(_records(path))

    def __contains__(self, key: object) -> bool:
        return key in self._texts

    def __getitem__(self, key: str) -> str:
        return self._texts[key]

    def __len__(self) -> int:
        return len(self._texts)

    def append(self, key: str, text: str) -> None:
        """Stores a text under its key."""
        self.folder.mkdir(parents=True, exist_ok=True)
        record = {"key": key, "text": text, "check": _checksum(key, text)}
        with self._own.open("ab") as file:
            file.write(json.dumps(record).encode() + b"\n")
        self._texts[key] = text


def _checksum(key: str, text: str) -> int:
    return zlib.crc32(f"{key}\n{text}".encode("utf-8", "surrogatepass"))


def _records(path: Path) -> Iterator[tuple[str, str]]:
    for line in path.read_bytes().split(b"\n"):
        with suppress(ValueError, KeyError, TypeError):
            record = json.loads(line)
            key, text = str(record["key"]), str(record["text"])
            if record["check"] == _checksum(key, text):
                yield key, text


# --- who answers ----------------------------------------------------------------------------------


class LazyBackbone:
    """A frozen backbone that is loaded when it is first needed, and can be let go.

    Args:
        spec: which.
        texts: the dataset's own, of which a tiny backbone's tokenizer is trained.
        fixed: texts of the prompts, likewise.
        seed: of a tiny backbone's weights.
        device: where it computes.
    """

    def __init__(
        self,
        spec: BackboneSpec,
        texts: Sequence[str],
        fixed: Sequence[str],
        seed: int,
        device: torch.device,
    ) -> None:
        self.spec, self._texts, self._fixed = spec, texts, fixed
        self._seed, self._device = seed, device
        self._loaded: Backbone | None = None

    @property
    def is_loaded(self) -> bool:
        """Whether it is in memory."""
        return self._loaded is not None

    def get(self) -> Backbone:
        """The backbone.

        Raises:
            UserError: see `load_backbone`.
        """
        if self._loaded is None:
            found = load_backbone(self.spec, self._texts, self._fixed, self._seed, adapt=False)
            self._loaded = found.to(self._device)
        return self._loaded.eval()

    def check(self) -> None:
        """Tells what can be told of it before it is loaded.

        Raises:
            UserError: see `check_template`.
        """
        check_template(self.spec)

    def lend(self, backbone: Backbone) -> None:
        """Takes the same backbone from elsewhere, before it is trained, instead of a second one:
        new adapters change nothing."""
        self._loaded = backbone

    def release(self) -> None:
        """Lets go of it; it is loaded again when it is needed again."""
        self._loaded = None

    @cached_property
    def identity(self) -> str:
        """What decides what it says: 64 hexadecimal digits, found without loading its weights."""
        parts: list[Any] = [getattr(self.spec, name) for name in _SAYS]
        if self.spec.is_tiny:
            parts += [dict(self.spec.tiny or {}), self._seed, [*self._texts], [*self._fixed]]
        else:
            parts += [commit_of(self.spec), *model_files(self.spec.model)]
        return _digest(parts)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


class TextWriter:
    """Writes texts with a backbone, or finds them among those that it wrote before.

    Args:
        source: who writes.
        images: the pictures of the items, for a loaded backbone.
        picture_mark: what names the content of an item's pictures.
        decoding: how.
        max_tokens: padded tokens in one batch, those to come included.
        cache: below it texts are kept.
    """

    def __init__(
        self,
        source: LazyBackbone,
        images: Callable[[Backbone], ItemImages],
        picture_mark: Callable[[int], str],
        decoding: Decoding,
        max_tokens: int,
        cache: Path,
    ) -> None:
        self.source, self.decoding, self.max_tokens = source, decoding, max_tokens
        self._images, self._picture_mark = images, picture_mark
        self.log = TextLog(cache / f"texts-{source.identity[:16]}")

    def key(self, request: Request) -> str:
        """Under which the text of a request is kept."""
        return _digest([self.source.identity, self.decoding.about(), *map(self._said, request)])

    def _said(self, part: str | Quoted | Shown) -> list[Any]:
        if isinstance(part, Quoted):
            return ["quoted", part.text, part.max_tokens]
        if isinstance(part, Shown):
            return ["shown", self._picture_mark(part.item), part.instead]
        return ["words", part]

    def texts(
        self, requests: Sequence[Request], name: str = "Texts", show_progress: bool = False
    ) -> list[str]:
        """The text of each request; equal requests are answered once.

        Args:
            requests: what is asked.
            name: of the bar, which counts texts, how many a second and what is left.
            show_progress: whether there is a bar.

        Raises:
            UserError: a prompt is longer than the backbone reads.
        """
        keys = [self.key(request) for request in requests]
        new = {k: r for k, r in zip(keys, requests, strict=True) if k not in self.log}
        if new:
            there = len({*keys}) - len(new)
            with tqdm(
                total=there + len(new),
                initial=there,
                ncols=100,
                desc=name,
                unit="text",
                disable=not show_progress,
            ) as bar:
                for key, text in self._write(new):
                    self.log.append(key, text)
                    bar.update()
        return [self.log[key] for key in keys]

    def _write(self, new: Mapping[str, Request]) -> Iterator[tuple[str, str]]:
        """Each text as soon as it has ended."""
        backbone, keys = self.source.get(), list(new)
        images = self._images(backbone)
        for start in range(0, len(keys), _PROMPTS_AT_ONCE):
            part = keys[start : start + _PROMPTS_AT_ONCE]
            prompts = [write_prompt(backbone, images, new[key]) for key in part]
            lengths = [len(prompt) + self.decoding.max_new_tokens for prompt in prompts]
            check_room(backbone, max(lengths))
            for rows in by_length(lengths, self.max_tokens):
                asked = [prompts[row] for row in rows]
                seeds = [int(part[row][:12], 16) for row in rows]
                for place, ids in decode(backbone, images, asked, self.decoding, seeds):
                    said = backbone.tokenizer.decode(ids, skip_special_tokens=True)
                    yield part[rows[place]], clean_text(said.replace(_HALF, ""))


def check_room(backbone: Backbone, tokens: int) -> None:
    """Raises `UserError` where a prompt and its answer are longer than the backbone reads."""
    if backbone.context is not None and tokens > backbone.context:
        raise UserError(
            f"A prompt and its answer take up to {tokens} tokens, but backbone '{backbone.name}' "
            f"reads {backbone.context}: lower the budgets of texts (keys that end in _tokens), "
            "block_size or max_pixels, or take a backbone that reads more."
        )


def write_prompt(backbone: Backbone, images: ItemImages, request: Request) -> Prompt:
    """A request as one turn of a chat, up to where the answer begins."""
    family = backbone.family
    return write_parts(backbone, images, (family.chat_head, *request, family.chat_tail))


def write_parts(backbone: Backbone, images: ItemImages, parts: Request) -> Prompt:
    """Parts of a prompt, one behind the other."""
    family, encoder = backbone.family, backbone.encoder

    def piece(part: str | Quoted | Shown) -> Prompt:
        shown = images.piece(part.item) if isinstance(part, Shown) and family.sees else None
        if shown is not None:
            return shown
        if isinstance(part, Quoted):
            return text_piece(encoder.words(part.text, part.max_tokens), family.axes)
        words = part.instead if isinstance(part, Shown) else part
        return text_piece(encoder.trusted(words), family.axes)

    return join([piece(part) for part in parts])


# --- decoding -------------------------------------------------------------------------------------


@torch.no_grad()
def decode(
    backbone: Backbone,
    images: ItemImages,
    prompts: Sequence[Prompt],
    how: Decoding,
    seeds: Sequence[int],
) -> Iterator[tuple[int, list[int]]]:
    """Answers prompts together; one that has ended makes room at once.

    Args:
        backbone: who answers.
        images: where the rows of the prompts' pictures come from.
        prompts: B of them; like lengths waste least.
        how: tokens are chosen.
        seeds: of each prompt's draw.

    Yields:
        The place of a prompt and the token ids of its answer, in the order in which they end.
    """
    ends = end_ids(backbone)
    rngs = [np.random.default_rng([how.seed, seed]) for seed in seeds]
    answers: list[list[int]] = [[] for _ in prompts]
    live = list(range(len(prompts)))
    reader = _Reader(backbone, images, prompts)
    while live:
        tokens = _choose(reader.logits(), how, [rngs[row] for row in live])  # (b,)
        kept = []
        for place, (row, token) in enumerate(zip(live, tokens.tolist(), strict=True)):
            answers[row] += [] if token in ends else [token]
            if token in ends or len(answers[row]) == how.max_new_tokens:
                yield row, answers[row]
            else:
                kept.append(place)
        live = [live[place] for place in kept]
        if live:
            reader.read(tokens, kept)


class _Reader:
    """The language model before its next tokens: the keys and values of all that it has read."""

    def __init__(self, backbone: Backbone, images: ItemImages, prompts: Sequence[Prompt]) -> None:
        self.backbone, self.images = backbone, images
        batch = collate(prompts, backbone.pad_id, left=True).to(backbone.device)
        T, device = batch.ids.shape[1], backbone.device
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self.seen = torch.arange(T, device=device) >= T - lengths[:, None]  # (B, T)
        self.spans = torch.tensor([prompt.span for prompt in prompts], device=device)
        self._take(batch)

    def _take(self, batch: PromptBatch, **more: Any) -> None:
        out = self.backbone.run(
            batch, self.images, attention_mask=self.seen.long(), use_cache=True, **more
        )
        self.cache, self.states = out.past_key_values, out.last_hidden_state[:, -1]

    def logits(self) -> Tensor:
        """Of the next token. Shape: (b, vocabulary)."""
        found: Tensor = self.backbone.head(self.states)
        return found.float()

    def read(self, tokens: Tensor, kept: list[int]) -> None:
        """Goes on with one token in each of the rows that are kept, and forgets the others."""
        if len(kept) < len(tokens):
            index = torch.tensor(kept, device=tokens.device)
            self.cache.batch_select_indices(index)
            tokens, self.seen, self.spans = tokens[index], self.seen[index], self.spans[index]
        axes = self.backbone.family.axes
        nothing = torch.zeros(0, dtype=torch.long, device=tokens.device)
        batch = PromptBatch(
            tokens[:, None],
            self.spans[None, :, None].expand(axes, -1, 1),
            torch.zeros_like(tokens),
            [],
            nothing,
            nothing,
        )
        self.seen = torch.cat([self.seen, self.seen.new_ones(len(tokens), 1)], dim=1)
        self._take(batch, past_key_values=self.cache)
        self.spans = self.spans + 1


def end_ids(backbone: Backbone) -> set[int]:
    """Tokens that end an answer: the family's own, the tokenizer's and the model's."""
    model: Any = backbone.model
    eos = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = {*(eos if isinstance(eos, Iterable) else [eos]), backbone.tokenizer.eos_token_id}
    found.update(backbone.encoder.trusted(backbone.family.answer_end)[:1])
    return {int(token) for token in found if token is not None}


def _choose(logits: Tensor, how: Decoding, rngs: Sequence[np.random.Generator]) -> Tensor:
    """The next token of each row. (b, vocabulary) -> (b,)."""
    if how.temperature == 0:
        return logits.argmax(dim=1)
    best, order = (logits / how.temperature).softmax(dim=1).sort(dim=1, descending=True)
    allowed = best.cumsum(dim=1) - best < how.top_p  # the likeliest is always
    # An exponential race: its winner is a draw in proportion to the probabilities.
    race = np.stack([rng.exponential(size=logits.shape[1]) for rng in rngs])  # (b, vocabulary)
    arrival = torch.from_numpy(race).to(best).clamp(min=1e-30)
    winner = (best * allowed / arrival).argmax(dim=1, keepdim=True)
    return order.gather(1, winner)[:, 0]

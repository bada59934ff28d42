"""Prompts as pieces of token ids: nothing an item's seller wrote can move a boundary or an image.

A prompt is joined from pieces. Fixed text may hold the tokenizer's special tokens; item text never
does: it is normalised, encoded with special tokens disabled and cut to its budget. Where an image
stands is known by construction, never found by searching text.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]

# Separators and invisible characters: line and paragraph separators, zero-width, bidi controls,
# variation selectors, the byte order mark, tags; and lone surrogates, which no tokenizer takes.
_INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_SPACES = re.compile(r"\s+")
_HISTORY, _CANDIDATES = "History:\n", "Candidates:\n"
_CHARACTERS_PER_TOKEN = 32  # text beyond this many times the budget is not even looked at


@dataclass(frozen=True)
class ImageSlot:
    """`count` placeholder tokens from token `start` on stand for the image of `item`."""

    item: int
    start: int
    count: int


@dataclass(frozen=True)
class Prompt:
    """A prompt, or a piece of one.

    Attributes:
        ids: token ids. Shape: (T,).
        positions: position of each token on each axis of the rotary embedding, counted from the
            piece's first token. Shape: (A, T); A is 3 for Qwen2-VL, 1 for most families.
        span: how far a piece that follows is moved on.
        slots: the images in it, in order.
    """

    ids: Ids
    positions: Ids
    span: int
    slots: tuple[ImageSlot, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)


def text_piece(ids: Sequence[int], axes: int) -> Prompt:
    """A piece without images: positions count up alike on all axes."""
    n = len(ids)
    positions = np.tile(np.arange(n, dtype=np.int64), (axes, 1))  # (A, n)
    return Prompt(np.asarray(ids, dtype=np.int64), positions, n)


def join(pieces: Sequence[Prompt]) -> Prompt:
    """Puts pieces one behind the other."""
    lengths = np.array([len(piece) for piece in pieces])
    moved = np.cumsum([0, *(piece.span for piece in pieces)])
    starts = np.cumsum([0, *lengths])
    positions = np.concatenate([piece.positions for piece in pieces], axis=1)  # (A, T)
    slots = tuple(
        ImageSlot(slot.item, int(start) + slot.start, slot.count)
        for piece, start in zip(pieces, starts, strict=False)
        for slot in piece.slots
    )
    return Prompt(
        np.concatenate([piece.ids for piece in pieces]),
        positions + np.repeat(moved[:-1], lengths),
        int(moved[-1]),
        slots,
    )


@dataclass(frozen=True)
class Fork:
    """Prompts that begin alike: a trunk, and branches that each go on from it.

    Attributes:
        trunk: what all begin with.
        branches: how each goes on; their positions follow the trunk's.
    """

    trunk: Prompt
    branches: tuple[Prompt, ...]

    def __len__(self) -> int:
        return len(self.trunk) + sum(map(len, self.branches))


def fork(trunk: Prompt, branches: Sequence[Prompt]) -> Fork:
    """Moves the positions of every branch behind the trunk's."""
    moved = (Prompt(b.ids, b.positions + trunk.span, b.span, b.slots) for b in branches)
    return Fork(trunk, tuple(moved))


def clean_text(text: str) -> str:
    """NFKC without control, bidi, zero-width and unassigned characters; single spaces.

    Line breaks and tabs become spaces. Removing what is invisible can bring letters together, so
    the text is normalised once more at the end: cleaning twice changes nothing.
    """
    text = _SPACES.sub(" ", unicodedata.normalize("NFKC", text))
    kept = "".join(c for c in text if unicodedata.category(c) not in _INVISIBLE)
    return _SPACES.sub(" ", unicodedata.normalize("NFKC", kept)).strip()


class TextEncoder:
    """Encodes trusted text (ours) and plain text (anyone's) with a Hugging Face fast tokenizer.

    Pieces are encoded as they stand in the middle of a text: tokenizers such as Llama's, which put
    a space before whatever they are given, are given a line break first, whose tokens are dropped.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._reserved = frozenset(tokenizer.get_added_vocab().values())
        line, letter, both = (self._encode(text) for text in ("\n", "a", "\na"))
        self._before = "" if both == line + letter else "\n"
        self._dropped = len(line) if self._before else 0

    def trusted(self, text: str) -> list[int]:
        """Token ids of our own text; special tokens written in it count as such."""
        return self._encode(self._before + text)[self._dropped :]

    def plain(self, text: str) -> list[int]:
        """Token ids of text from outside: no id of a special or added token can come out."""
        ids = self._encode(self._before + text, split_special_tokens=True)[self._dropped :]
        return [token for token in ids if token not in self._reserved]

    def _encode(self, text: str, **how: bool) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False, **how))

    def words(self, text: str, max_tokens: int) -> list[int]:
        """Token ids of a plain text after a space, cleaned, at most `max_tokens` of them."""
        ids = self.plain(f" {clean_text(text[: max_tokens * _CHARACTERS_PER_TOKEN])}")[:max_tokens]
        while ids and self.tokenizer.decode(ids).endswith("\N{REPLACEMENT CHARACTER}"):
            ids.pop()  # the cut fell inside a character
        return ids

    def field(self, text: str, max_tokens: int) -> list[int]:
        """Token ids of one attribute's value inside JSON quotes, at most `max_tokens` of them."""
        text = clean_text(text[: max_tokens * _CHARACTERS_PER_TOKEN])
        ids = self.plain(json.dumps(text, ensure_ascii=False)[1:-1])[:max_tokens]
        while ids and self._ragged(ids):
            ids.pop()
        return ids

    def _ragged(self, ids: list[int]) -> bool:
        """Whether the cut fell inside a character or a backslash escape."""
        text = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        escapes = len(text) - len(text.rstrip("\\"))
        return text.endswith("\N{REPLACEMENT CHARACTER}") or escapes % 2 == 1


@dataclass(frozen=True)
class PromptStyle:
    """What a ranking prompt says besides its items.

    Attributes:
        instruction: the task, one or two sentences of our own.
        attributes: keys of an item line in their order; ``image`` is the picture, the others are
            columns of the dataset's text file. What an item lacks is left out of its line.
        max_attr_tokens: budget of each text attribute.
    """

    instruction: str
    attributes: tuple[str, ...]
    max_attr_tokens: int

    def fixed_text(self) -> list[str]:
        """Everything a prompt says besides what its items say."""
        keys = ", ".join(f'"{name}": ""' for name in self.attributes)
        return [f"{self.instruction}\n{_HISTORY}{_CANDIDATES}", f" {{{keys}}}\n"]


class PromptWriter:
    """Writes ranking prompts: history from oldest to newest, then candidates under letters.

    Args:
        encoder: of the backbone's tokenizer.
        family: the backbone's family: chat template, image pieces, number of position axes.
        style: see `PromptStyle`.
        text: text of an item's attribute, or None where it is missing.
        image: piece that stands for an item's picture, or None where it has none.
        letters: one token id sequence a candidate, as written inside the brackets.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        family: Any,
        style: PromptStyle,
        text: Callable[[int, str], str | None],
        image: Callable[[int], Prompt | None],
        letters: str,
    ) -> None:
        self.encoder, self.style, self.axes = encoder, style, int(family.axes)
        self._text, self._image = text, image
        self._lines: dict[int, Prompt] = {}
        self._opening = self._trusted(f"{family.chat_head}{style.instruction}\n{_HISTORY}")
        self._between = self._trusted(_CANDIDATES)
        self._closing = self._trusted(family.chat_tail)
        self._labels = [self._trusted(f"({letter})") for letter in letters]

    def write(self, history: Iterable[int], candidates: Sequence[int]) -> Prompt:
        """The prompt that asks which of the candidates comes after the history.

        Args:
            history: item ids, oldest first.
            candidates: item ids, at most one a letter.
        """
        return join([self._asking(history), self._offering(candidates)])

    def write_fork(self, history: Iterable[int], sets: Sequence[Sequence[int]]) -> Fork:
        """The prompts of several candidate sets for one history, which stands there once.

        Args:
            history: item ids, oldest first.
            sets: item ids of each set, at most one a letter.
        """
        return fork(self._asking(history), [self._offering(candidates) for candidates in sets])

    def _asking(self, history: Iterable[int]) -> Prompt:
        return join([self._opening, *(self.line(item) for item in history), self._between])

    def _offering(self, candidates: Sequence[int]) -> Prompt:
        pieces: list[Prompt] = []
        for label, item in zip(self._labels[: len(candidates)], candidates, strict=True):
            pieces += (label, self.line(item))
        return join([*pieces, self._closing])

    def line(self, item: int) -> Prompt:
        """The item's line, `` {"title": "…", …}`` with its line break; written once and kept."""
        if item not in self._lines:
            self._lines[item] = self._write_line(item)
        return self._lines[item]

    def _write_line(self, item: int) -> Prompt:
        pieces: list[Prompt] = []
        close = ""
        for name in self.style.attributes:
            value = self._image(item) if name == "image" else self._value(item, name)
            if value is None:
                continue
            quote = "" if name == "image" else '"'
            # The quote after a space is a token of its own, so that a value's tokens are those
            # that it has in the line encoded as a whole.
            opening = f'{close}, "{name}":' if pieces else f' {{"{name}":'
            pieces += (self._trusted(opening + (quote and " " + quote)), value)
            close = quote
        return join([*pieces, self._trusted(close + "}\n" if pieces else " {}\n")])

    def _value(self, item: int, name: str) -> Prompt | None:
        text = self._text(item, name)
        if text is None:
            return None
        return text_piece(self.encoder.field(text, self.style.max_attr_tokens), self.axes)

    def _trusted(self, text: str) -> Prompt:
        return text_piece(self.encoder.trusted(text), self.axes)

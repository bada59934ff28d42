"""Prompts that show a user's items, each with a slot or in words, and what is asked behind them.

Like all prompts they are joined from pieces: nothing an item's seller wrote can make a slot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from recbole_mm.backbone.prompt import Prompt, TextEncoder, join, text_piece
from recbole_mm.backbone.slots import READ, slot_piece

SLOT = "slot"  # as a field of an item's line
LABELS = {"title": "Title", "brand": "Brand", "category": "Category", "description": "Description"}
_UNKNOWN = "Unknown"
_INSTEAD = ("description", "category", "brand")  # of a slot that an item has no vector for


@dataclass(frozen=True)
class HistoryStyle:
    """What a prompt says besides its items.

    Attributes:
        task: before the items, in our words.
        recommend: after them, before the slot whose state is read.
        fields: of an item's line in their order: keys of `LABELS` and ``slot``.
        slot_label: what stands before a slot.
        max_tokens: budget of each field's text.
    """

    task: str
    recommend: str
    fields: tuple[str, ...]
    slot_label: str
    max_tokens: dict[str, int]

    def fixed_text(self) -> list[str]:
        """Everything a prompt says besides what its items say."""
        labels = [*(LABELS[f] for f in self.fields if f != SLOT), self.slot_label]
        line = ", ".join(f"{label}:" for label in labels)
        return [f"{self.task} {{{line} {_UNKNOWN}}}, ", self.recommend]


class HistoryWriter:
    """Writes the parts of prompts.

    Args:
        encoder: of the language model's tokenizer.
        style: see `HistoryStyle`.
        text: of an item's property, None where it has none.
        has_vector: whether an item has a vector for its slot.
        begin: text of the token that begins a prompt.
        end: id of the token that ends an answer.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        style: HistoryStyle,
        text: Callable[[int, str], str | None],
        has_vector: Callable[[int], bool],
        begin: str,
        end: int,
    ) -> None:
        self.encoder, self.style, self._end = encoder, style, end
        self._text, self._has_vector = text, has_vector
        self._lines: dict[int, Prompt] = {}
        self._values: dict[tuple[str, str], list[int]] = {}
        self._pieces: dict[str, Prompt] = {}
        self._opening = self._trusted(f"{begin}{style.task}\n")
        self._between = self._trusted(", ")
        asking = self._trusted(f"\n{style.recommend} ")
        self.asking = join([asking, slot_piece(READ, end)])
        self.opening_tokens = len(self._opening)

    def line(self, item: int) -> Prompt:
        """``{Title: …, Visual Representation: [slot]}``, with what stands between; kept."""
        if item not in self._lines:
            pieces = [self._trusted("{")]
            for place, field in enumerate(self._fields(item)):
                pieces += [self._between] if place else []
                pieces += self._field(item, field)
            self._lines[item] = join([*pieces, self._trusted("}"), self._between])
        return self._lines[item]

    def trunk(self, items: Sequence[int], room: int) -> Prompt:
        """The task and the newest items that fit, oldest first; the newest is always there.

        Args:
            items: ids, oldest first.
            room: tokens, at most.
        """
        lines: list[Prompt] = []
        left = room - self.opening_tokens
        for item in reversed(items):
            line = self.line(item)
            if lines and len(line) > left:
                break
            lines.insert(0, line)
            left -= len(line)
        return join([self._opening, *lines])

    def question(
        self, item: int, name: str, words: tuple[str, str], whole: bool = False
    ) -> tuple[Prompt, int] | None:
        """A question about a property with its answer.

        Args:
            item: whose property.
            name: of the property, a key of `LABELS`.
            words: the question, and what stands before the value in its answer.
            whole: whether the latter is part of what is to be said.

        Returns:
            The piece, and how many tokens at its end are to be said, the last of them the end of
            the answer; None where the item has no such property.
        """
        value = self.value(item, name)
        if not value:
            return None
        asked, lead = self._trusted(f"\n{words[0]}\n"), self._trusted(words[1])
        told = text_piece([*value, self._end], 1)
        return join([asked, lead, told]), len(told) + whole * len(lead)

    def longest_question(self, name: str, questions: Sequence[str], lead: str) -> int:
        """Tokens that a question about a property takes with its answer, at most."""
        asked = max(len(self._trusted(f"\n{words}\n")) for words in questions)
        return asked + len(self._trusted(lead)) + self.style.max_tokens[name] + 1

    def value(self, item: int, name: str) -> list[int]:
        """Tokens of an item's property, kept by what it says; none where there is none."""
        text = self._text(item, name)
        if not text:
            return []
        if (name, text) not in self._values:
            self._values[name, text] = self.encoder.words(text, self.style.max_tokens[name])
        return self._values[name, text]

    def _fields(self, item: int) -> list[str]:
        """Those of the line; words in place of a slot without a vector."""
        if self._has_vector(item) or SLOT not in self.style.fields:
            return list(self.style.fields)
        words = [name for name in _INSTEAD if self.value(item, name)][:1]
        wanted = [name for f in self.style.fields for name in ([f] if f != SLOT else words)]
        return list(dict.fromkeys(wanted))

    def _field(self, item: int, field: str) -> list[Prompt]:
        if field == SLOT:
            return [self._trusted(f"{self.style.slot_label}: "), slot_piece(item, self._end)]
        ids = self.value(item, field) or self.encoder.words(_UNKNOWN, 8)
        return [self._trusted(f"{LABELS[field]}:"), text_piece(ids, 1)]

    def _trusted(self, text: str) -> Prompt:
        if text not in self._pieces:
            self._pieces[text] = text_piece(self.encoder.trusted(text), 1)
        return self._pieces[text]

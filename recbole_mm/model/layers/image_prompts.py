"""I-LLMRec's prompts: a user's items, and behind them the slot that is read and a question."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recbole_mm.backbone.histories import SLOT, HistoryStyle, HistoryWriter
from recbole_mm.backbone.prompt import Prompt, fork
from recbole_mm.backbone.slots import Packed, pack
from recbole_mm.data.content import ItemContent
from recbole_mm.errors import UserError
from recbole_mm.model.layers.questions import ANSWERS, PROPERTIES, QUESTIONS

Ints = NDArray[np.int64]
Question = tuple[Prompt, int]
# Fields of an item's line, and the type of the features that fill its slot.
REPRESENTATIONS: dict[str, tuple[tuple[str, ...], str | None]] = {
    "image": (("title", SLOT), "img"),
    "attribute": (("title", "brand", "category"), None),
    "cf": (("title", SLOT), "cf"),
    "description": (("title", "description"), None),
    "image+description": (("title", SLOT, "description"), "img"),
}
_SLOT_LABELS = {"img": "Visual Representation", "cf": "Collaborative Representation"}


class Properties:
    """Title, brand, category and description of items, from the columns of `D.text`.

    Args:
        content: of the items.
        columns: the column of each property; one that the dataset lacks is passed over.

    Attributes:
        descriptions: by item id, instead of the column's; None: they are the column's.
    """

    def __init__(self, content: ItemContent, columns: Mapping[str, str]) -> None:
        if unknown := [name for name in columns if name not in PROPERTIES]:
            raise UserError(
                f"columns: '{unknown[0]}' is no property, only {', '.join(PROPERTIES)} are."
            )
        self.content = content
        self.descriptions: Mapping[int, str] | None = None
        self._columns = {k: v for k, v in columns.items() if v in content.attributes}

    def __contains__(self, name: str) -> bool:
        return name in self._columns or (name == "description" and bool(self.descriptions))

    def text(self, item: int, name: str) -> str | None:
        """What is known of an item, None where nothing is; of a category's path the last part."""
        if name == "description" and self.descriptions is not None:
            return self.descriptions.get(item)
        if name not in self._columns:
            return None
        text = self.content.text(item, self._columns[name])
        return text.rpartition(" > ")[2] if text and name == "category" else text

    def texts(self) -> dict[str, dict[int, str]]:
        """What is known of all items, by property."""
        items = range(1, len(self.content.item_tokens))
        told = {name: {item: self.text(item, name) for item in items} for name in PROPERTIES}
        return {
            name: {item: text for item, text in of.items() if text} for name, of in told.items()
        }

    def everything(self, item: int) -> str | None:
        """All that is known of an item."""
        values = (self.text(item, name) for name in PROPERTIES)
        return ". ".join(value for value in values if value) or None


@dataclass(frozen=True)
class PromptSettings:
    """What prompts say.

    Attributes:
        item_repr: a key of `REPRESENTATIONS`.
        task: before the items.
        recommend: behind them, before the slot that is read.
        asked: properties that are asked for.
        whole_answer: whether the words before an answer's value are to be said too.
        max_attr_tokens: of a title, a brand or a category.
        max_description_tokens: of a description.
        max_context: of a prompt, its answer included.
    """

    item_repr: str
    task: str
    recommend: str
    asked: tuple[str, ...]
    whole_answer: bool
    max_attr_tokens: int
    max_description_tokens: int
    max_context: int

    @classmethod
    def of(cls, config: Any) -> PromptSettings:
        """What a recommender's configuration says of them."""
        same = ("item_repr", "task", "recommend", "max_attr_tokens", "max_description_tokens")
        return cls(
            **{key: config[key] for key in (*same, "max_context")},
            asked=tuple(config["ila_properties"] or ()),
            whole_answer=config["ila_loss_on"] == "full",
        )

    @property
    def slot_type(self) -> str | None:
        """The type of the features in slots; None where items are told in words."""
        return REPRESENTATIONS[self.item_repr][1]

    def style(self, properties: Properties) -> HistoryStyle:
        """Of prompts for a dataset's items.

        Raises:
            UserError: the dataset has nothing of what a line should say.
        """
        wanted = REPRESENTATIONS[self.item_repr][0]
        fields = tuple(name for name in wanted if name == SLOT or name in properties)
        if not fields or ("description" in wanted and "description" not in fields):
            missing = next(name for name in reversed(wanted) if name not in fields)
            raise UserError(
                f"item_repr: {self.item_repr} tells of each item's {missing}, and "
                f"{properties.content.path('text')} has no such column: name it in columns, or set "
                "item_repr: image."
            )
        short = dict.fromkeys(PROPERTIES, self.max_attr_tokens)
        return HistoryStyle(
            self.task,
            self.recommend,
            fields,
            _SLOT_LABELS.get(str(self.slot_type), ""),
            {**short, "description": self.max_description_tokens},
        )

    def fixed_text(self, style: HistoryStyle) -> list[str]:
        """Everything that prompts say besides what items say."""
        asked = [f"{words} {ANSWERS[name]}" for name in self.asked for words in QUESTIONS[name]]
        return [*style.fixed_text(), *asked]


class ImagePrompts:
    """The prompts of one dataset's items for one language model.

    Args:
        settings: what they say.
        properties: of the items.
        backbone: a loaded `Backbone`.
        has_vector: whether an item has features for its slot.

    Raises:
        UserError: `max_context` is too small for some item, or more than the backbone reads.
    """

    def __init__(
        self,
        settings: PromptSettings,
        properties: Properties,
        backbone: Any,
        has_vector: Callable[[int], bool],
    ) -> None:
        self.settings = settings
        tokenizer = backbone.tokenizer
        self.writer = HistoryWriter(
            backbone.encoder,
            settings.style(properties),
            properties.text,
            has_vector,
            tokenizer.bos_token or "",
            int(tokenizer.eos_token_id),
        )
        self.asked = tuple(name for name in settings.asked if name in properties)
        self._room = self._room_of(backbone)
        self._check_items(properties.content)

    def _room_of(self, backbone: Any) -> int:
        """Tokens of a trunk, at most."""
        most, reads = self.settings.max_context, backbone.context
        if reads is not None and most > reads:
            raise UserError(
                f"max_context is {most}, but backbone '{backbone.name}' reads {reads} tokens: "
                "lower it."
            )
        behind = [
            self.writer.longest_question(name, QUESTIONS[name], ANSWERS[name])
            for name in self.asked
        ]
        return most - max(len(self.writer.asking), *behind, 0)

    def _check_items(self, content: ItemContent) -> None:
        lines = [len(self.writer.line(item)) for item in range(1, len(content.item_tokens))]
        needed = self.writer.opening_tokens + max(lines)
        if needed > self._room:
            item = content.item_tokens[1 + int(np.argmax(lines))]
            raise UserError(
                f"max_context is {self.settings.max_context}, but item '{item}' needs "
                f"{self.settings.max_context + needed - self._room} tokens with what stands around "
                "it: raise it, or lower max_attr_tokens or max_description_tokens."
            )

    def has_questions(self, n_items: int) -> bool:
        """Whether there is any property that can be asked for."""
        items = range(1, n_items)
        return any(self.writer.value(item, name) for name in self.asked for item in items)

    def trunk(self, history: Sequence[int]) -> Prompt:
        """The task and the newest items of a history that fit."""
        return self.writer.trunk(history, self._room)

    def question(self, target: int, rng: np.random.Generator) -> Question | None:
        """One of the questions about an item at random; None where it has no property."""
        known = [name for name in self.asked if self.writer.value(target, name)]
        place, template = rng.random(2)
        if not known:
            return None
        name = known[int(place * len(known))]
        words = QUESTIONS[name][int(template * len(QUESTIONS[name]))]
        whole = self.settings.whole_answer
        return self.writer.question(target, name, (words, ANSWERS[name]), whole)

    def passes(
        self,
        histories: Sequence[Ints],
        asked: Sequence[Question | None] | None,
        read: bool,
        packed: bool,
    ) -> list[list[Packed]]:
        """The rows of each forward pass; none where nothing is read or asked.

        Args:
            histories: item ids, oldest first.
            asked: a question for each, as `question` gives it; None: there is none.
            read: whether there is a slot that is read.
            packed: whether it and the question share a row, and the history's tokens.
        """
        trunks = [self.trunk(history.tolist()) for history in histories]
        questions = list(asked or [None] * len(trunks))
        every = [[self._row(t, read, q) for t, q in zip(trunks, questions, strict=True)]]
        if not packed:
            alone = [self._row(trunk, read, None) for trunk in trunks]
            told = [self._row(t, False, q) for t, q in zip(trunks, questions, strict=True)]
            every = [alone, told]
        kept = [[row for row in rows if row is not None] for rows in every]
        return [rows for rows in kept if rows]

    def _row(self, trunk: Prompt, read: bool, asked: Question | None) -> Packed | None:
        branches = [(self.writer.asking, 0)] if read else []
        branches += [asked] if asked else []
        if not branches:
            return None
        return pack(fork(trunk, [piece for piece, _ in branches]), [n for _, n in branches])

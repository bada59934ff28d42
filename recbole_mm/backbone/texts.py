"""What a language model reads of items and of users' histories, as rows of token ids."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from recbole_mm.backbone.text_model import TextModel
from recbole_mm.errors import UserError

Ids = NDArray[np.int64]


class ItemTexts:
    """Token rows of items and of histories: nothing a seller wrote can bring a special token in.

    Args:
        model: whose tokens they are.
        text: of an item; None where it has none.
        task: our sentence before a history.
        max_user_tokens: of a history's text, special tokens among them.
        max_item_tokens: of an item's text, likewise; in a history the same without them.

    Attributes:
        max_item_tokens: as given.
        cut: the items whose text was longer than its budget, of those read so far.
    """

    def __init__(
        self,
        model: TextModel,
        text: Callable[[int], str | None],
        task: str,
        max_user_tokens: int,
        max_item_tokens: int,
    ) -> None:
        most = model.reads.max_tokens
        if max(max_user_tokens, max_item_tokens) > most:
            raise UserError(
                f"max_user_tokens is {max_user_tokens} and max_item_tokens {max_item_tokens}, but "
                f"backbone '{model.name}' reads {most}: lower them."
            )
        self._model, self._text = model, text
        frame = len(model.before) + len(model.after)
        self.max_item_tokens = max_item_tokens
        self._user_room, self._item_room = max_user_tokens - frame, max_item_tokens - frame
        self._task = model.encoder.trusted(f"{task} ")
        self._between = model.encoder.trusted(", ")
        self._nothing = model.encoder.trusted("?")
        if self._user_room <= len(self._task) or self._item_room < 1:
            raise UserError(
                f"max_user_tokens is {max_user_tokens}, but the task alone takes "
                f"{len(self._task) + frame}: raise it, or shorten task."
            )
        self._pieces: dict[int, list[int]] = {}
        self.cut: set[int] = set()

    def item(self, item: int) -> Ids:
        """The item's text alone. Shape: (T,)."""
        return self._framed(self._piece(item) or self._nothing)

    def history(self, items: Iterable[int]) -> Ids:
        """The task, then the items' texts, the newest first, as many as there is room for whole
        (and what fits of the first that does not). Shape: (T,).

        Args:
            items: ids, oldest first.
        """
        ids = list(self._task)
        for place, item in enumerate(reversed(list(items))):
            if len(ids) >= self._user_room:
                break
            ids += [*(self._between if place else ()), *(self._piece(item) or self._nothing)]
        return self._framed(ids[: self._user_room])

    def _piece(self, item: int) -> list[int]:
        """The tokens of an item's text, encoded once."""
        if item not in self._pieces:
            self._pieces[item] = self._encoded(item, self._item_room)
        return self._pieces[item]

    def _encoded(self, item: int, room: int) -> list[int]:
        text = self._text(item)
        if not text:
            return []
        ids = self._model.encoder.words(text, room + 1)
        if len(ids) <= room:
            return ids
        self.cut.add(item)
        return self._model.encoder.words(text, room)

    def _framed(self, ids: Sequence[int]) -> Ids:
        return np.array([*self._model.before, *ids, *self._model.after], dtype=np.int64)

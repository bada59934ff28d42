"""MLLM-MSR's questions as prompts: one template, for training and for test."""

from __future__ import annotations

from collections.abc import Sequence

from recbole_mm.backbone import wording
from recbole_mm.backbone.generate import Request, write_parts
from recbole_mm.backbone.load import Backbone
from recbole_mm.backbone.prompt import Fork, Prompt, fork, join
from recbole_mm.backbone.vision import ItemImages
from recbole_mm.backbone.wording import Budgets, Wording
from recbole_mm.errors import UserError

_KEPT = 100_000  # pieces of prompts that are kept


class Questions:
    """Writes the question whether a user takes an item next.

    Args:
        backbone: whose tokens it is made of.
        images: pieces of item pictures.
        titles: of each item id, empty for nothing. Length: V.
        words: of the dataset.
        answers: that may be given.
        budgets: of what is quoted.
        has_image: whether items are shown.
    """

    def __init__(
        self,
        backbone: Backbone,
        images: ItemImages,
        titles: Sequence[str],
        words: Wording,
        answers: Sequence[str],
        budgets: Budgets,
        has_image: bool,
    ) -> None:
        self._backbone, self._images = backbone, images
        self._titles, self._words, self._budgets = titles, words, budgets
        self._has_image = has_image
        self._pieces: dict[Request | int, Prompt] = {}
        self._head = self._write((backbone.family.chat_head,))
        asked = wording.question(words, answers)
        self._tail = self._write((asked, backbone.family.chat_tail))

    def prompt(self, user: Request, item: int, order: str) -> Prompt:
        """A question, up to where the answer begins.

        Args:
            user: what is said of the user.
            item: its id.
            order: ``pref_first`` or ``item_first``.
        """
        parts = [self._user(user), self._item(item)]
        return join([self._head, *(parts if order == "pref_first" else parts[::-1]), self._tail])

    def fork(self, pairs: Sequence[tuple[Request, int]], order: str) -> Fork:
        """Questions about one user, or with ``item_first`` about one item, which stands there once.

        Args:
            pairs: users and items; the one that comes first is the same in all.
            order: see `prompt`.
        """
        user, item = pairs[0]
        if order == "pref_first":
            trunk = join([self._head, self._user(user)])
            return fork(trunk, [join([self._item(item), self._tail]) for _, item in pairs])
        trunk = join([self._head, self._item(item)])
        return fork(trunk, [join([self._user(user), self._tail]) for user, _ in pairs])

    def _user(self, user: Request) -> Prompt:
        return self._kept(user, user)

    def _item(self, item: int) -> Prompt:
        title = self._titles[item] or "?"
        asked = wording.item_part(self._words, item, title, self._has_image, self._budgets)
        return self._kept(item, asked)

    def _kept(self, key: Request | int, parts: Request) -> Prompt:
        if key not in self._pieces:
            if len(self._pieces) >= _KEPT:
                self._pieces.clear()
            self._pieces[key] = self._write(parts)
        return self._pieces[key]

    def _write(self, parts: Request) -> Prompt:
        return write_parts(self._backbone, self._images, parts)

    def check(self, history_len: int, pref_mode: str) -> None:
        """Compares the longest question with what the backbone reads: nothing is cut but texts.

        Raises:
            UserError: it is longer; says how much of it is the picture.
        """
        most = self._backbone.context
        if pref_mode == "none":
            user = len(self._write(wording.titles_part(self._words, [""] * history_len, _NONE)))
            user += history_len * self._budgets.item
        else:
            user = len(self._write(wording.user_part(self._words, "", _NONE)))
            user += self._budgets.preference
        words = self._write(wording.item_part(self._words, 0, "", False, _NONE))
        shown = len(self._backbone.family.largest_image_piece()) + 8 if self._has_image else 0
        item = len(words) + self._budgets.item + shown
        longest = len(self._head) + user + item + len(self._tail) + 2  # the answer and its end
        if most is not None and longest > most:
            raise UserError(
                f"A question takes up to {longest} tokens, {shown} of them the item's picture, "
                f"which is never cut, but backbone '{self._backbone.name}' reads {most}: lower "
                "max_pref_tokens, max_item_tokens or max_pixels, or set image_pooling: cls."
            )


_NONE = Budgets(1, 1, 1)

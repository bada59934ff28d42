"""What language models make of items and of users' histories, before anything is trained
(MLLM-MSR, its first two stages)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recbole_mm.backbone import wording
from recbole_mm.backbone.generate import Request, TextWriter
from recbole_mm.backbone.wording import Budgets, Wording

ITEM_TEXTS = ("title", "image", "text", "title_image", "fusion")
PREF_MODES = ("recurrent", "direct", "none")
Ids = tuple[int, ...]


@dataclass(frozen=True)
class SummarySettings:
    """What is summed up, and how.

    Attributes:
        item_text: what an item is in a history: its ``title``, a summary of its ``image``, of its
            ``text``, title and image summary (``title_image``), or one text of both summaries
            (``fusion``). Where there is no picture, words stand in.
        pref_mode: ``recurrent``: block by block, each with what was said of those before;
            ``direct``: the whole history at once; ``none``: titles, nothing is generated.
        block_size: items of a block.
        words: of the dataset.
        budgets: of what is quoted.
    """

    item_text: str
    pref_mode: str
    block_size: int
    words: Wording
    budgets: Budgets

    @property
    def sees(self) -> bool:
        """Whether pictures are summed up."""
        return self.pref_mode != "none" and self.item_text in ("image", "title_image", "fusion")


class Summaries:
    """Descriptions of items and preferences of users, each made once.

    Args:
        settings: see there.
        titles: what is known in words of each item id, empty for nothing. Length: V.
        pictured: items that have a picture.
        seer: a model that sees, for pictures.
        speaker: a model that reads, for everything else.
        readable: whether an item's picture can be read; asked before it is described.

    Attributes:
        pictured: items that have a picture, as far as is known.
        descriptions: by item id; to be filled by `describe`, or from elsewhere. With
            ``title_image`` what the picture shows, without the title, which stands before it.
        preferences: by history.
    """

    def __init__(
        self,
        settings: SummarySettings,
        titles: Sequence[str],
        pictured: Iterable[int],
        seer: TextWriter,
        speaker: TextWriter,
        readable: Callable[[int], bool] = lambda item: True,
    ) -> None:
        self.settings, self.titles, self.pictured = settings, titles, {*pictured}
        self._readable = readable
        self.seer, self.speaker = seer, speaker
        self.descriptions: dict[int, str] = {}
        self.preferences: dict[Ids, str] = {}

    def release(self) -> None:
        """Lets go of both models."""
        self.seer.source.release()
        self.speaker.source.release()

    # --- items -----------------------------------------------------------------------
    def describe(self, items: Iterable[int], show_progress: bool = False) -> None:
        """Makes the descriptions of these items that are not there yet."""
        how, words = self.settings.item_text, self.settings.words
        new = [item for item in items if item not in self.descriptions]
        seen: dict[int, str] = {}
        if self.settings.sees:
            shown = self._shown(new)
            asked = [wording.of_picture(words, item) for item in shown]
            seen = dict(zip(shown, self.seer.texts(asked, "Pictures", show_progress), strict=True))
        if how in ("title", "title_image", "image"):
            found = {item: seen.get(item) or self._title(item) for item in new}
        else:
            found = self._summed_up(new, seen, show_progress)
        self.descriptions.update(found)

    def _shown(self, items: Iterable[int]) -> list[int]:
        """Those that have a picture; one that cannot be read is none."""
        shown = [item for item in items if item in self.pictured]
        self.pictured -= {item for item in shown if not self._readable(item)}
        return [item for item in shown if item in self.pictured]

    def _title(self, item: int) -> str:
        return self.titles[item] or "?"

    def _summed_up(
        self, items: Sequence[int], seen: Mapping[int, str], show_progress: bool
    ) -> dict[int, str]:
        """Summaries of words, with those of pictures in them where there are any."""
        words, budgets = self.settings.words, self.settings.budgets
        named = [item for item in items if self.titles[item]]
        asked = [wording.of_text(words, self.titles[item], budgets) for item in named]
        said = dict(zip(named, self.speaker.texts(asked, "Texts", show_progress), strict=True))
        both = [item for item in named if seen.get(item)]
        asked = [wording.of_both(words, said[item], seen[item], budgets) for item in both]
        fused = dict(zip(both, self.speaker.texts(asked, "Both", show_progress), strict=True))
        return {item: "?" for item in items} | {**seen} | said | fused

    # --- users -----------------------------------------------------------------------
    def prefer(self, histories: Iterable[Ids], show_progress: bool = False) -> None:
        """Makes the preferences of these histories that are not there yet: all that is asked of
        a round is asked together."""
        if self.settings.pref_mode == "none":
            return
        new = [h for h in dict.fromkeys(histories) if h not in self.preferences]
        self.describe(dict.fromkeys(item for history in new for item in history))
        found: dict[Ids, str | None] = dict.fromkeys(new)
        blocks = {history: self.blocks(history) for history in new}
        for turn in range(max(map(len, blocks.values()), default=0)):
            left = [history for history in new if turn < len(blocks[history])]
            asked = [self.request(blocks[history][turn], found[history]) for history in left]
            texts = self.speaker.texts(asked, f"Preferences {turn + 1}", show_progress)
            found.update(zip(left, texts, strict=True))
        self.preferences.update({history: text or "?" for history, text in found.items()})

    def blocks(self, history: Ids) -> list[Ids]:
        """The parts of a history that are read one after the other, the oldest first."""
        whole = self.settings.pref_mode == "direct"
        size = len(history) if whole else self.settings.block_size
        return [history[start : start + size] for start in range(0, len(history), size)]

    def request(self, block: Ids, before: str | None) -> Request:
        """What is asked about one block."""
        said = [self.said_of(item) for item in block]
        settings = self.settings
        return wording.of_history(settings.words, said, before, settings.budgets)

    def said_of(self, item: int) -> tuple[str, ...]:
        """What a history says of an item, in parts: none is cut to make room for another."""
        title, description = self._title(item), self.descriptions[item]
        beside = self.settings.item_text == "title_image" and description != title
        return (title, description) if beside else (description,)

    def user_part(self, history: Ids) -> Request:
        """What a question says of a user; makes a preference that is not there yet."""
        settings = self.settings
        if settings.pref_mode == "none":
            titles = [self._title(item) for item in history]
            return wording.titles_part(settings.words, titles, settings.budgets)
        if history not in self.preferences:
            self.prefer([history])
        return wording.user_part(settings.words, self.preferences[history], settings.budgets)


def about(summaries: Summaries) -> dict[str, Any]:
    """How many texts there are and what is missing, for the result."""
    longest = max(map(len, summaries.descriptions.values()), default=0)
    return {
        "descriptions": len(summaries.descriptions),
        "without_picture": len(summaries.titles) - 1 - len(summaries.pictured),
        "longest_description": longest,
        "preferences": len(summaries.preferences),
    }

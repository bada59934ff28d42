"""The sentences of MLLM-MSR, in our words: what is asked about items, users and the two together.

All are lists of parts (`generate.Request`), so that nothing that sellers wrote, or a language model
made of it, can move a boundary. Nouns and verbs are the dataset's: videos are watched and have
covers, products are bought and have pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from recbole_mm.backbone.generate import Quoted, Request, Shown
from recbole_mm.errors import UserError, nearest


@dataclass(frozen=True)
class Wording:
    """What is recommended, and what users do with it.

    Attributes:
        item: one of them.
        items: several.
        take: what a user does.
        took: what a user did.
        picture: what its picture is called.
        brief: no sentences at all: to a tiny backbone they mean nothing.
    """

    item: str = "product"
    items: str = "products"
    take: str = "buy"
    took: str = "bought"
    picture: str = "picture"
    brief: bool = False

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, object], brief: bool = False) -> Wording:
        """The words of `wording`; those that are not named are a shop's.

        Raises:
            UserError: an unknown name, or no word.
        """
        known = [field.name for field in fields(cls) if field.name != "brief"]
        for name, word in mapping.items():
            if name not in known:
                raise UserError(
                    f"wording has no word '{name}'{nearest(name, known)}: it is of "
                    f"{', '.join(known)}."
                )
            if not isinstance(word, str) or not word.strip():
                raise UserError(f"wording: {name} is {word!r}: write a word, such as product.")
        return cls(**{name: str(word) for name, word in mapping.items()}, brief=brief)


@dataclass(frozen=True)
class Budgets:
    """Tokens that prompts give to texts that are not ours.

    Attributes:
        item: a title, or the description of an item.
        summary: each part of an item's description (title, what its picture shows) where it is
            summed up.
        preference: a user's preference.
    """

    item: int
    summary: int
    preference: int


# --- items ----------------------------------------------------------------------------------------


def of_picture(words: Wording, item: int) -> Request:
    """Asks what an item's picture shows."""
    if words.brief:
        return (Shown(item, "?"),)
    return (
        f"This is the {words.picture} of a {words.item}:\n",
        Shown(item, "none"),
        "\nDescribe in one paragraph what it shows: colours, objects, any text, what stands out.",
    )


def of_text(words: Wording, text: str, budgets: Budgets) -> Request:
    """Asks what is said about an item."""
    if words.brief:
        return (Quoted(text, budgets.summary),)
    return (
        f"This is said about a {words.item}:",
        Quoted(text, budgets.summary),
        "\nSum it up in one short paragraph.",
    )


def of_both(words: Wording, text: str, picture: str, budgets: Budgets) -> Request:
    """Asks for one description made of two."""
    if words.brief:
        return (Quoted(text, budgets.summary), Quoted(picture, budgets.summary))
    return (
        f"This is said about a {words.item}:",
        Quoted(text, budgets.summary),
        f"\nIts {words.picture} shows this:",
        Quoted(picture, budgets.summary),
        f"\nDescribe the {words.item} in one paragraph that has both.",
    )


# --- users ----------------------------------------------------------------------------------------


def of_history(
    words: Wording, items: Sequence[Sequence[str]], before: str | None, budgets: Budgets
) -> Request:
    """Asks what a user prefers, who took these items and was described so before.

    Args:
        words: of the dataset.
        items: what is said of each, in parts, each of which has its budget.
        before: the user's preference until then.
        budgets: of what is quoted.
    """
    said = [tuple(Quoted(part, budgets.summary) for part in parts) for parts in items]
    if words.brief:
        quoted = tuple(part for parts in said for part in parts)
        return (*quoted, *(() if before is None else (Quoted(before, budgets.preference),)))
    lines: list[str | Quoted | Shown] = []
    for number, (first, *others) in enumerate(said, start=1):
        lines += [f"\n{number}.", first]
        for part in others:
            lines += [".", part]
    known: Request = ()
    if before is not None:
        known = ("\nUntil then the user preferred:", Quoted(before, budgets.preference))
    return (
        f"A user {words.took} these {words.items}, the oldest first:",
        *lines,
        *known,
        f"\nDescribe in one paragraph what the user prefers now, without naming single "
        f"{words.items}.",
    )


# --- both -----------------------------------------------------------------------------------------


def user_part(words: Wording, preference: str, budgets: Budgets) -> Request:
    """What is said of a user."""
    if words.brief:
        return (Quoted(preference, budgets.preference),)
    return ("A user prefers:", Quoted(preference, budgets.preference), "\n")


def titles_part(words: Wording, titles: Sequence[str], budgets: Budgets) -> Request:
    """The same by what the user took."""
    if words.brief:
        return tuple(Quoted(title, budgets.item) for title in titles)
    lines: list[str | Quoted | Shown] = []
    for number, title in enumerate(titles, start=1):
        lines += [f"\n{number}.", Quoted(title, budgets.item)]
    return (f"A user {words.took}, the oldest first:", *lines, "\n")


def item_part(words: Wording, item: int, title: str, has_image: bool, budgets: Budgets) -> Request:
    """What is said and shown of an item."""
    if words.brief:
        return (Quoted(title, budgets.item), *((Shown(item, ""),) if has_image else ()))
    shown: Request = ()
    if has_image:
        shown = (f"\nIts {words.picture}:", Shown(item, " none"))
    return (f"A {words.item}:", Quoted(title, budgets.item), *shown, "\n")


def question(words: Wording, answers: Sequence[str]) -> str:
    """What is asked of both."""
    if words.brief:
        return "?"
    return f"Will the user {words.take} this {words.item} next? Answer {' or '.join(answers)}."


def fixed_text(words: Wording, answers: Sequence[str]) -> list[str]:
    """Every sentence without what is quoted, for a tiny backbone's tokenizer."""
    none = Budgets(1, 1, 1)
    requests: list[Request] = [
        of_picture(words, 0),
        of_text(words, "", none),
        of_both(words, "", "", none),
        of_history(words, [["", ""]] * 3, "", none),
        user_part(words, "", none),
        titles_part(words, ["", ""], none),
        item_part(words, 0, "", has_image=True, budgets=none),
        (question(words, answers),),
    ]
    said = [" ".join(part for part in r if isinstance(part, str)) for r in requests]
    return [*said, *(f" {answer}" for answer in answers), *(f"\n{answer}" for answer in answers)]

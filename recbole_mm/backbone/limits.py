"""What a backbone can take of a run's prompts, told before anything is trained."""

from __future__ import annotations

from collections.abc import Callable

from recbole_mm.backbone.families import FAMILIES
from recbole_mm.backbone.load import Backbone, BackboneSpec
from recbole_mm.backbone.prompt import Prompt, PromptStyle, PromptWriter
from recbole_mm.data.content import ItemContent
from recbole_mm.errors import UserError


def check_sight(spec: BackboneSpec, style: PromptStyle) -> None:
    """Raises `UserError` where prompts are to show pictures to a model that reads text alone."""
    if "image" in style.attributes and not FAMILIES[spec.family].sees:
        others = [name for name in style.attributes if name != "image"] or ["title"]
        raise UserError(
            f"attributes has image in it, but backbone '{spec.name}' reads text alone: set "
            f"attributes to [{','.join(others)}] or take a backbone that sees, such as qwen2-vl-2b."
        )


def check_context(
    backbone: Backbone, style: PromptStyle, letters: str, history: int, content: ItemContent
) -> None:
    """Compares the longest prompt that there can be with what the backbone reads.

    Text is first taken to be as long as `max_attr_tokens` allows; only where such a prompt would be
    too long are the dataset's own texts looked at, and the longest lines put into one prompt.

    Args:
        backbone: the loaded backbone.
        style: of the prompts.
        letters: one a candidate.
        history: items of the history, at most.
        content: of the dataset's items.

    Raises:
        UserError: it is longer; names the keys to lower.
    """
    most = backbone.context
    if most is None or _longest_by_style(backbone, style, letters, history) < most:
        return
    longest = _longest_by_text(backbone, style, letters, history, content)
    if longest < most:  # the answer's token comes behind it
        return
    pooled = "image" not in style.attributes or backbone.spec.image_pooling == "cls"
    keys = "max_history_items, n_candidates or max_attr_tokens"
    raise UserError(
        f"A prompt of {history} history items and {len(letters)} candidates takes up to {longest} "
        f"tokens, but backbone '{backbone.name}' reads {most}: lower {keys}, or shorten attributes"
        + ("." if pooled else "; image_pooling: cls makes one token of a picture.")
    )


def _longest_by_style(backbone: Backbone, style: PromptStyle, letters: str, history: int) -> int:
    """Tokens of a prompt whose every text fills its budget."""
    writer = PromptWriter(
        backbone.encoder, backbone.family, style, lambda *_: "", _picture(backbone), letters
    )
    texts = sum(name != "image" for name in style.attributes)
    empty = writer.write([1] * history, [1] * len(letters))
    return len(empty) + (history + len(letters)) * texts * style.max_attr_tokens


def _longest_by_text(
    backbone: Backbone, style: PromptStyle, letters: str, history: int, content: ItemContent
) -> int:
    """Tokens of a prompt of the items with the longest lines, pictures as large as they get."""
    picture = _picture(backbone)
    writer = PromptWriter(
        backbone.encoder,
        backbone.family,
        style,
        content.text,
        lambda item: picture(item) if content.image_paths(item) else None,
        letters,
    )
    items = sorted(range(1, len(content.item_tokens)), key=lambda item: -len(writer.line(item)))
    shown = items[: history + len(letters)]
    return len(writer.write(shown[len(letters) :], shown[: len(letters)]))


def _picture(backbone: Backbone) -> Callable[[int], Prompt | None]:
    """The largest picture there is, for every item."""
    piece = backbone.family.largest_image_piece() if backbone.family.sees else None
    return lambda item: piece

"""What prompts say in place of a dataset's own descriptions: a file's, noisy ones, summaries.

Source: Kim et al., "Image is All You Need", 2025: summaries as in TRSR (appendix B), noise (figure
6).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recbole_mm.data.content import ItemContent
from recbole_mm.data.made_texts import read_texts
from recbole_mm.errors import UserError

_MARKUP = ("<p>", "<br>", "</b>", "<li>", "</div>", "&nbsp;", "<span", 'style="">')
_SOURCE_TOKENS = 1024  # of a description that is summed up
_LABELS = {"title": "Title:", "brand": "Brand:", "category": "Category:"}
_ASKED = "\nSay in one short paragraph what is worth knowing of it."


def with_noise(text: str, share: float, seed: Sequence[int]) -> str:
    """Markup between the words of a text, as a crawler leaves it.

    Args:
        text: any.
        share: pieces of markup a word, on average.
        seed: of the draw.
    """
    rng, noisy = np.random.default_rng(seed), list[str]()
    for word in text.split():
        pieces = int(share) + int(rng.random() < share % 1)
        noisy += [word, *(str(piece) for piece in rng.choice(_MARKUP, pieces))]
    return " ".join(noisy)


def descriptions_of(
    config: Any, content: ItemContent, texts: Mapping[str, Mapping[int, str]]
) -> dict[int, str] | None:
    """What descriptions say instead of the column; None: they are the column's.

    Args:
        config: of the model.
        content: of the items.
        texts: what is known of items, by property.

    Raises:
        UserError: the file cannot be read, there is nothing to be summed up, or the model that sums
            up cannot be loaded.
    """
    share, path = config["description_noise"], config["description_file"]
    if not (path or share or config["summarize"]):
        return None
    told = dict(texts.get("description", {}))
    if path:
        name = config["dataset"]
        read = read_texts(Path(path), content.item_tokens, name, "description_file")
        told |= {items[0]: text for items, text in read.items() if len(items) == 1}
    if share:
        told = {n: with_noise(text, share, (config["seed"], n)) for n, text in told.items()}
    if config["summarize"]:
        return _summaries(config, content, {**texts, "description": told})
    return told


def _summaries(
    config: Any, content: ItemContent, texts: Mapping[str, Mapping[int, str]]
) -> dict[int, str]:
    """Of all items of which anything is known, each written once for ever."""
    from recbole_mm.backbone.generate import Decoding, LazyBackbone, Quoted, TextWriter
    from recbole_mm.backbone.load import BackboneSpec
    from recbole_mm.backbone.vision import ItemImages

    budgets = dict.fromkeys(_LABELS, config["max_attr_tokens"])
    items = sorted({item for known in texts.values() for item in known})
    if not items:
        raise UserError(
            f"summarize: {content.path('text')} says nothing of any item: name its columns in "
            "columns, or set summarize: False."
        )

    def request(item: int) -> tuple[Any, ...]:
        known = [name for name in (*_LABELS, "description") if item in texts.get(name, {})]
        parts: list[Any] = []
        for name in known:
            most = budgets.get(name, _SOURCE_TOKENS)
            parts += ["\n" + _LABELS.get(name, "Description:"), Quoted(texts[name][item], most)]
        return (*parts, _ASKED)

    spec = BackboneSpec.from_mapping(config["text_backbone_spec"])
    said = sorted({text for known in texts.values() for text in known.values()})
    fixed = ["\n".join(["", *_LABELS.values(), "Description:"]) + _ASKED]
    writer = LazyBackbone(spec, said, fixed, config["seed"], config["device"])
    found = TextWriter(
        writer,
        lambda backbone: ItemImages(backbone.family, _nothing, _nothing, frozen=False),
        lambda item: "",
        Decoding(config["summary_tokens"]),
        config["generate_tokens"],
        Path(config["cache_dir"]),
    ).texts([request(item) for item in items], "Summaries", config["show_progress"])
    writer.release()
    return dict(zip(items, found, strict=True))


def _nothing(item: int) -> None:
    """Words alone are summed up."""

"""The models and the texts of MLLM-MSR, as a configuration describes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from recbole_mm.backbone.families import FAMILIES
from recbole_mm.backbone.generate import Decoding, LazyBackbone, TextWriter
from recbole_mm.backbone.load import RUN_KEYS, Backbone, BackboneSpec, load_backbone
from recbole_mm.backbone.questions import Questions
from recbole_mm.backbone.vision import ItemImages
from recbole_mm.backbone.wording import Budgets, Wording, fixed_text
from recbole_mm.backbone.yesno import YesNoScorer, find_answers
from recbole_mm.data.content import ItemContent
from recbole_mm.data.images import ImageStore, digest_of
from recbole_mm.errors import UserError
from recbole_mm.model.layers.summaries import Summaries, SummarySettings


@dataclass(frozen=True)
class Parts:
    """What an `MLLMMSR` is made of."""

    scorer: YesNoScorer
    summaries: Summaries
    questions: Questions


def build(config: Any, content: ItemContent, device: torch.device) -> Parts:
    """Loads what is trained, and prepares what is loaded when it is needed.

    Raises:
        UserError: a package, weights or item content are missing, or keys do not go together.
    """
    words, answers = _words(config), list(config["answers"])
    budgets = Budgets(
        config["max_item_tokens"], config["max_summary_tokens"], config["max_pref_tokens"]
    )
    settings = SummarySettings(
        config["item_text"], config["pref_mode"], config["block_size"], words, budgets
    )
    spec, text_spec = _specs(config)
    _check_sight(config, spec, settings)
    titles = _titles(config, content)
    texts, fixed = sorted({*filter(None, titles)}), fixed_text(words, answers)
    seed: int = config["seed"]
    speaker = LazyBackbone(text_spec, texts, fixed, seed, device)
    if settings.pref_mode != "none":
        speaker.check()
    backbone = load_backbone(spec, texts, fixed, seed).to(device)
    images = _images(backbone, content, config)
    scorer = YesNoScorer(
        backbone, images, find_answers(backbone, answers), config["loss_on"], config["score_tokens"]
    )
    questions = Questions(
        backbone, images, titles, words, answers, budgets, config["use_candidate_image"]
    )
    questions.check(config["history_len"], config["pref_mode"])
    seer = LazyBackbone(spec, texts, fixed, seed, device)
    seer.lend(backbone)
    pictures = ImageStore(content)
    summaries = Summaries(
        settings,
        titles,
        [item for item in range(1, len(titles)) if _has_picture(content, item)],
        _writer(seer, config["item_summary_tokens"], config, content),
        _writer(speaker, config["user_summary_tokens"], config, content),
        lambda item: pictures.get(item) is not None,
    )
    return Parts(scorer, summaries, questions)


def _words(config: Any) -> Wording:
    return Wording.from_mapping(config["wording"] or {}, config["brief"])


def _specs(config: Any) -> tuple[BackboneSpec, BackboneSpec]:
    own = {key: config[key] for key in RUN_KEYS if config[key] is not None}
    spec = BackboneSpec.from_mapping({**config["backbone_spec"], **own})
    return spec, BackboneSpec.from_mapping(config["text_backbone_spec"])


def _check_sight(config: Any, spec: BackboneSpec, settings: SummarySettings) -> None:
    shows = [
        *(["use_candidate_image: False"] if config["use_candidate_image"] else []),
        *(["item_text: title"] if settings.sees else []),
    ]
    if shows and not FAMILIES[spec.family].sees:
        raise UserError(
            f"backbone '{spec.name}' reads text alone and can be shown no pictures: set "
            f"{' and '.join(shows)}, or take a backbone that sees, such as llava-1.6-mistral-7b."
        )


def _titles(config: Any, content: ItemContent) -> Sequence[str]:
    """What is known in words of each item; the pad has none."""
    found = [name for name in config["attributes"] if name in content.attributes]
    pictures = config["use_candidate_image"] and content.coverage()["image"]
    if not found and not pictures:
        raise UserError(
            f"MLLM-MSR reads {', '.join(config['attributes'])}, but {content.path('text')} has "
            "none of them, and there are no pictures: set attributes to columns it has."
        )
    values = [
        [content.text(item, name) for name in found] for item in range(len(content.item_tokens))
    ]
    return [", ".join(value for value in row if value) for row in values]


def _has_picture(content: ItemContent, item: int) -> bool:
    return any(path.is_file() for path in content.image_paths(item))


def _images(backbone: Backbone, content: ItemContent, config: Any) -> ItemImages:
    return ItemImages(
        backbone.family,
        ImageStore(content).get,
        lambda item: next(iter(content.image_paths(item)), None),
        frozen=not backbone.trains_vision,
        log=None if backbone.spec.is_tiny else backbone.vision_log(Path(config["cache_dir"])),
    )


def _writer(source: LazyBackbone, tokens: int, config: Any, content: ItemContent) -> TextWriter:
    def mark(item: int) -> str:
        return " ".join(digest_of(path) or "-" for path in content.image_paths(item))

    def images(backbone: Backbone) -> ItemImages:
        return _images(backbone, content, config)

    decoding = Decoding(tokens, config["temperature"], config["top_p"], config["seed"])
    cache = Path(config["cache_dir"])
    return TextWriter(source, images, mark, decoding, config["generate_tokens"], cache)

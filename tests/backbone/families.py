"""Tiny backbones of every family, and what Hugging Face's own forward pass makes of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recbole_mm.backbone.batch import collate
from recbole_mm.backbone.load import Backbone
from recbole_mm.backbone.prompt import Prompt
from tests.backbone.shop import backbone_of, images_of, picture, writer_of

# Larger than those shipped: several rows of patches a picture.
SEEING: dict[str, dict[str, Any]] = {
    "qwen2_vl": {},
    "qwen2_5_vl": {},
    "llava": {"tiny": {"image_size": 84, "patch_size": 28}},
    "idefics3": {"tiny": {"image_size": 84, "patch_size": 14}},
}
FAMILY_NAMES = (*SEEING, "causal_lm", "chat_lm")
PROMPTS = [([1, 2], [3, 4, 5]), ([5], [1, 6]), ([2], [2, 2]), ([7, 7, 3, 4], [4, 6, 1, 2])]


def family_backbone(name: str, **changes: Any) -> Backbone:
    """A tiny backbone of a family; the same weights each time."""
    return backbone_of(family=name, **{**SEEING.get(name, {}), **changes}).eval()


def family_prompts(backbone: Backbone) -> list[Prompt]:
    """Of no picture, of one picture several times, of several."""
    writer = writer_of(backbone)
    return [writer.write(*prompt) for prompt in PROMPTS]


def our_logits(backbone: Backbone, prompts: Sequence[Prompt], positions: int = 1) -> Tensor:
    """(B, S, vocabulary)"""
    batch = collate(prompts, backbone.pad_id)
    logits: Tensor = backbone.head(backbone.hidden(batch, images_of(backbone), positions))
    return logits


def stock_inputs(backbone: Backbone, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """What Hugging Face's processor would hand to the model: pictures once a place they stand."""
    T = max(map(len, prompts))
    ids = torch.full((len(prompts), T), backbone.pad_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.from_numpy(prompt.ids)
        mask[row, : len(prompt)] = 1
    return {"input_ids": ids, "attention_mask": mask, **_pixels(backbone, prompts, ids)}


def stock_logits(backbone: Backbone, prompts: Sequence[Prompt]) -> Tensor:
    """Of the whole model, given ids and pixels. (B, T, vocabulary)"""
    model: Any = backbone.model
    logits: Tensor = model(**stock_inputs(backbone, prompts), use_cache=False).logits
    return logits


def _pixels(backbone: Backbone, prompts: Sequence[Prompt], ids: Tensor) -> dict[str, Any]:
    shown = [[picture(slot.item) for slot in prompt.slots] for prompt in prompts]
    family: Any = backbone.family
    if not any(shown):
        return {}
    if backbone.spec.family == "idefics3":  # pictures of a prompt are one row, padded with none
        return dict(family.processor(images=[row for row in shown if row], return_tensors="pt"))
    found = dict(family.processor(images=[p for row in shown for p in row], return_tensors="pt"))
    if backbone.spec.family.startswith("qwen"):
        pad = backbone.tokenizer.convert_tokens_to_ids(family.placeholder)
        found["mm_token_type_ids"] = (ids == pad).int()
    return found

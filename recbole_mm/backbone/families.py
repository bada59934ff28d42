"""What one family of Hugging Face models does its own way, so that no other code knows a family.

A family says how a chat turn is written, which piece of a prompt stands for an image and how pixels
become feature rows. Everything else (prompts, letters, batches, training) is the same for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from recbole_mm.backbone.prompt import ImageSlot, Prompt, join, text_piece
from recbole_mm.errors import UserError


@dataclass(frozen=True)
class Pixels:
    """One image as the vision tower takes it.

    Attributes:
        values: patches, normalised. Shape: (patches, D of a patch); Qwen2-VL: D = 3 * 2 * 14 * 14.
        grid: patches in time, height and width.
    """

    values: Tensor
    grid: tuple[int, int, int]


class Family(Protocol):
    """The two functions that a family is (`pixels` with `encode`, `image_piece`) and its chat turn.

    Attributes:
        chat_head: text before the user's words, special tokens included.
        chat_tail: text between the user's words and the answer.
        answer_end: special token that ends an answer.
        axes: axes of the rotary position embedding.
        frozen_parts: paths of the modules that LoRA and quantisation leave alone.
    """

    chat_head: str
    chat_tail: str
    answer_end: str
    axes: int
    frozen_parts: tuple[str, ...]

    def pixels(self, image: Any) -> Pixels | None:
        """Resizes and normalises a PIL image; None where it has no form the tower can take."""

    def image_piece(self, item: int, grid: tuple[int, int, int]) -> Prompt:
        """The piece that stands for the image of `item`, placeholder tokens and all."""

    def encode(self, model: nn.Module, images: Sequence[Pixels]) -> list[Tensor]:
        """Feature rows of each image, one a placeholder token. Shapes: (n, D)."""

    def language_model(self, model: nn.Module) -> nn.Module:
        """The module that takes `inputs_embeds` and `position_ids`."""

    def vision_tower(self, model: nn.Module) -> nn.Module:
        """The module whose features `encode` returns."""


class Qwen2VL:
    """Qwen2-VL (Wang et al. 2024, arXiv 2409.12191): native resolution, 2-D positions for images.

    One token stands for 28 x 28 pixels. An image is resized once, to sides that are multiples of
    28 with a product within the pixel budget.
    """

    chat_head = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    chat_tail = "<|im_end|>\n<|im_start|>assistant\n"
    answer_end = "<|im_end|>"
    axes = 3  # time, height, width
    frozen_parts: tuple[str, ...] = ("model.visual", "lm_head")
    _most_stretched = 200  # the resizer's own limit of width to height

    def __init__(self, tokenizer: Any, min_pixels: int, max_pixels: int) -> None:
        from transformers import Qwen2VLImageProcessorPil

        if not 28 * 28 <= min_pixels <= max_pixels:
            raise UserError(
                f"The backbone's pixel budget is min_pixels={min_pixels}, max_pixels={max_pixels}: "
                "set 784 (one token) <= min_pixels <= max_pixels in its YAML."
            )
        self.processor = Qwen2VLImageProcessorPil(
            size={"shortest_edge": min_pixels, "longest_edge": max_pixels}
        )
        self._merge = int(self.processor.merge_size)
        self._open, self._pad, self._close = (
            _special(tokenizer, token)
            for token in ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
        )

    def pixels(self, image: Any) -> Pixels | None:
        width, height = image.size
        if max(width, height) >= self._most_stretched * min(width, height):
            return None
        out = self.processor(images=[image], return_tensors="pt")
        time, rows, columns = out["image_grid_thw"][0].tolist()
        return Pixels(out["pixel_values"], (time, rows, columns))

    def image_piece(self, item: int, grid: tuple[int, int, int]) -> Prompt:
        time, rows, columns = grid[0], grid[1] // self._merge, grid[2] // self._merge
        count = time * rows * columns
        positions = np.indices((time, rows, columns)).reshape(3, count).astype(np.int64)  # (3, n)
        image = Prompt(
            np.full(count, self._pad, dtype=np.int64),
            positions,
            max(time, rows, columns),
            (ImageSlot(item, 0, count),),
        )
        before, after = text_piece([self._open], self.axes), text_piece([self._close], self.axes)
        return join([before, image, after])

    def encode(self, model: nn.Module, images: Sequence[Pixels]) -> list[Tensor]:
        tower: Any = self.vision_tower(model)
        weight = next(tower.parameters())
        patches = torch.cat([image.values for image in images]).to(weight.device, weight.dtype)
        grids = torch.tensor([image.grid for image in images], device=weight.device)
        rows = tower(patches, grid_thw=grids).pooler_output  # (all tokens, D)
        return list(rows.split([_tokens(image.grid, self._merge) for image in images]))

    def language_model(self, model: Any) -> nn.Module:
        return model.model.language_model

    def vision_tower(self, model: Any) -> nn.Module:
        return model.model.visual


FAMILIES = {"qwen2_vl": Qwen2VL}


def _tokens(grid: tuple[int, int, int], merge: int) -> int:
    return grid[0] * grid[1] * grid[2] // merge**2


def _special(tokenizer: Any, token: str) -> int:
    found = tokenizer.get_added_vocab().get(token)
    if found is None:
        raise UserError(
            f"The backbone's tokenizer has no token {token}: is this a Qwen2-VL tokenizer?"
        )
    return int(found)

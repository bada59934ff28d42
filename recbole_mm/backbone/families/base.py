"""What a family of Hugging Face models does its own way, so that no other code knows a family.

A family says which classes it is made of, how a chat turn is written, which piece of a prompt
stands for an image and how pixels become feature rows. Everything else (prompts, letters, batches,
training) is the same for all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from recbole_mm.backbone.prompt import ImageSlot, Prompt, join, text_piece
from recbole_mm.errors import UserError

if TYPE_CHECKING:
    from recbole_mm.backbone.tiny import TinySizes

Grid = tuple[int, int, int]
POOLINGS = ("all", "cls")
_BLIND = "this family reads text alone: it has no pictures to show"


@dataclass(frozen=True)
class Pixels:
    """One image as the vision tower takes it.

    Attributes:
        values: normalised pixels of the image as the tower's batches hold them, along the first
            axis. Shape: (patches, D of a patch) for Qwen, (1, 3, height, width) for others.
        grid: patches in time, height and width.
    """

    values: Tensor
    grid: Grid


@dataclass(frozen=True)
class PictureSettings:
    """How a run takes pictures.

    Attributes:
        min_pixels: smallest picture after resizing.
        max_pixels: largest picture after resizing.
        pooling: ``all`` feature rows, or ``cls``: one row, see `PictureFamily`.
    """

    min_pixels: int
    max_pixels: int
    pooling: str = "all"


class Family(ABC):
    """A family that reads text; see `PictureFamily` for those that see.

    Args:
        tokenizer: its beginning-of-text token, where it has one, comes to stand before the chat.
        config: the model's configuration.
        pictures: how the run takes pictures.

    Attributes:
        chat_head: text before the user's words, special tokens included.
        chat_tail: text between the user's words and the answer, which is a letter without a space
            before it: the token that the letter also is inside its brackets.
        answer_end: special token that ends an answer.
        axes: axes of the rotary position embedding.
        frozen_parts: paths of the modules that LoRA and quantisation leave alone.
        sees: whether it takes pictures at all.
        asks_template: whether the tokenizer's own chat template writes its turns.
        special_tokens: those of the tokenizer of the tiny form, in their order.
        special_roles: which of them begins a text, ends one and pads, by the tokenizer's own words.
    """

    chat_head: str = ""
    chat_tail: str = ""
    answer_end: str = ""
    axes: ClassVar[int] = 1
    frozen_parts: ClassVar[tuple[str, ...]] = ("lm_head",)
    sees: ClassVar[bool] = False
    asks_template: ClassVar[bool] = False
    special_tokens: ClassVar[tuple[str, ...]] = ()
    special_roles: ClassVar[Mapping[str, str]] = {}

    def __init__(self, tokenizer: Any, config: Any, pictures: PictureSettings) -> None:
        self.chat_head = (tokenizer.bos_token or "") + type(self).chat_head

    @staticmethod
    @abstractmethod
    def model_class() -> Any:
        """The `transformers` class whose `from_pretrained` loads the family's weights."""

    @staticmethod
    @abstractmethod
    def tiny_model(sizes: TinySizes, tokenizer: Any, attention: str) -> Any:
        """A model of these sizes with random weights, fp32."""

    def speed_up(self, model: Any) -> None:  # noqa: B027 (a hook: most have nothing to change)
        """Changes how the model computes, and nothing of what."""

    @abstractmethod
    def language_model(self, model: Any) -> nn.Module:
        """The module that takes `inputs_embeds` and `position_ids`."""

    def vision_tower(self, model: Any) -> nn.Module | None:
        """The module whose features `encode` returns; None where the family sees nothing."""
        return None

    def pixels(self, image: Any) -> Pixels | None:
        """Resizes and normalises a PIL image; None where it has no form the tower can take."""
        return None

    def image_piece(self, item: int, grid: Grid) -> Prompt:
        """The piece that stands for the image of `item`, placeholder tokens and all."""
        raise ValueError(_BLIND)

    def largest_image_piece(self) -> Prompt:
        """The piece of a picture that takes as many tokens as any can."""
        raise ValueError(_BLIND)

    def encode(self, model: nn.Module, images: Sequence[Pixels]) -> list[Tensor]:
        """Feature rows of each image, one a placeholder token. Shapes: (n, D)."""
        raise ValueError(_BLIND)


class PictureFamily(Family):
    """A family with a vision tower: what all of those have in common.

    With `image_pooling: cls` a picture is one placeholder token (PRIME, section 4.2.4), whose row
    is the tower's CLS token where it has one and the mean of the picture's rows where it has none.

    Attributes:
        placeholder: special token that stands where a feature row goes.
        around: text before and after a picture's placeholders.
        largest: grid of a picture with as many tokens as any can have.
    """

    sees = True
    placeholder: ClassVar[str]
    around: ClassVar[tuple[str, str]] = ("", "")
    largest: Grid
    _most_stretched: ClassVar[int] = 200  # width to height; more is no picture of a product

    def __init__(self, tokenizer: Any, config: Any, pictures: PictureSettings) -> None:
        super().__init__(tokenizer, config, pictures)
        added = tokenizer.get_added_vocab()
        for token in self._needed():
            if token not in added:
                raise UserError(
                    f"The backbone's tokenizer has no token {token}: is this a tokenizer of the "
                    f"family {type(self).__name__}?"
                )
        self.pooled = pictures.pooling == "cls"
        self._pad = int(added[self.placeholder])
        self._before, self._after = (
            text_piece(tokenizer.encode(text, add_special_tokens=False) if text else [], self.axes)
            for text in self.around
        )

    def _needed(self) -> tuple[str, ...]:
        """Special tokens without which a picture cannot be shown."""
        return (self.placeholder,)

    def pixels(self, image: Any) -> Pixels | None:
        width, height = image.size
        if max(width, height) >= self._most_stretched * min(width, height):
            return None
        return self._take(image)

    def image_piece(self, item: int, grid: Grid) -> Prompt:
        shape = (1, 1, 1) if self.pooled else self.token_grid(grid)
        count = int(np.prod(shape))
        positions = np.arange(count, dtype=np.int64)[None]  # (1, n)
        if self.axes == 3:
            positions = np.indices(shape).reshape(3, count).astype(np.int64)  # (3, n)
        image = Prompt(
            np.full(count, self._pad, dtype=np.int64),
            positions,
            int(positions.max()) + 1,
            (ImageSlot(item, 0, count),),
        )
        return join([self._before, image, self._after])

    def largest_image_piece(self) -> Prompt:
        return self.image_piece(0, self.largest)

    def encode(self, model: nn.Module, images: Sequence[Pixels]) -> list[Tensor]:
        tower: Any = self.vision_tower(model)
        weight = next(tower.parameters())
        values = torch.cat([image.values for image in images]).to(weight.device, weight.dtype)
        grids = [image.grid for image in images]
        return (
            self._one_row(model, values, grids) if self.pooled else self._rows(model, values, grids)
        )

    # --- what a family fills in ------------------------------------------------------
    @abstractmethod
    def token_grid(self, grid: Grid) -> Grid:
        """Placeholder tokens in time, height and width of a picture of this patch grid."""

    @abstractmethod
    def _take(self, image: Any) -> Pixels:
        """The picture as the tower takes it."""

    @abstractmethod
    def _rows(self, model: Any, values: Tensor, grids: Sequence[Grid]) -> list[Tensor]:
        """All feature rows of each picture. Shapes: (n, D)."""

    def _one_row(self, model: Any, values: Tensor, grids: Sequence[Grid]) -> list[Tensor]:
        """One feature row of each picture: of a tower without a CLS token the mean. (1, D)."""
        return [rows.mean(dim=0, keepdim=True) for rows in self._rows(model, values, grids)]


class SquareFamily(PictureFamily):
    """A family whose tower takes squares of one size: `side` x `side` pixels."""

    def __init__(self, tokenizer: Any, config: Any, pictures: PictureSettings) -> None:
        super().__init__(tokenizer, config, pictures)
        vision = config.vision_config
        self.side, patches = int(vision.image_size), int(vision.image_size // vision.patch_size)
        self.largest = (1, patches, patches)
        if self.side**2 > pictures.max_pixels:
            raise UserError(
                f"max_pixels is {pictures.max_pixels}, but this backbone takes every picture at "
                f"{self.side} x {self.side} pixels: set max_pixels to {self.side**2} or take a "
                "backbone that resizes (qwen2-vl-2b); image_pooling: cls saves tokens."
            )

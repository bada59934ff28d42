"""Qwen2-VL and Qwen2.5-VL: pictures at their own resolution, rotary positions of three axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from recbole_mm.backbone.families.base import Grid, PictureFamily, PictureSettings, Pixels
from recbole_mm.backbone.tower import speed_up
from recbole_mm.errors import UserError

if TYPE_CHECKING:
    from recbole_mm.backbone.tiny import TinySizes


class Qwen2VL(PictureFamily):
    """Qwen2-VL (Wang et al. 2024, arXiv 2409.12191): native resolution, 2-D positions for images.

    One token stands for 28 x 28 pixels. An image is resized once, to sides that are multiples of
    28 with a product within the pixel budget.
    """

    chat_head = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    chat_tail = "<|im_end|>\n<|im_start|>assistant\n"
    answer_end = "<|im_end|>"
    axes = 3  # time, height, width
    frozen_parts = ("model.visual", "lm_head")
    placeholder = "<|image_pad|>"
    around = ("<|vision_start|>", "<|vision_end|>")
    special_tokens = (
        *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        *("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>"),
        *("<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>"),
        *("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
    )
    special_roles: ClassVar[Mapping[str, str]] = {"eos_token": "<|im_end|>"}

    def __init__(self, tokenizer: Any, config: Any, pictures: PictureSettings) -> None:
        from transformers import Qwen2VLImageProcessorPil

        super().__init__(tokenizer, config, pictures)
        least, most = pictures.min_pixels, pictures.max_pixels
        if not 28 * 28 <= least <= most:
            raise UserError(
                f"The backbone's pixel budget is min_pixels={least}, max_pixels={most}: "
                "set 784 (one token) <= min_pixels <= max_pixels."
            )
        self.processor = Qwen2VLImageProcessorPil(
            size={"shortest_edge": least, "longest_edge": most}
        )
        self._merge = int(self.processor.merge_size)
        self._most_tokens = most // (28 * 28)
        self.largest = (1, self._merge, self._merge * self._most_tokens)

    def _needed(self) -> tuple[str, ...]:
        return (*self.around, self.placeholder)

    @staticmethod
    def model_class() -> Any:
        from transformers import Qwen2VLForConditionalGeneration

        return Qwen2VLForConditionalGeneration

    @staticmethod
    def tiny_model(sizes: TinySizes, tokenizer: Any, attention: str) -> Any:
        from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

        vision = {
            "depth": sizes.vision_depth,
            "embed_dim": sizes.vision_dim,
            "hidden_size": sizes.hidden_size,
            "num_heads": sizes.vision_heads,
            "mlp_ratio": sizes.vision_mlp_ratio,
            "initializer_range": sizes.init_std,
        }
        shared = _tiny_shared(sizes, tokenizer, attention)
        return Qwen2VLForConditionalGeneration(Qwen2VLConfig(vision_config=vision, **shared))

    def token_grid(self, grid: Grid) -> Grid:
        return grid[0], grid[1] // self._merge, grid[2] // self._merge

    def _take(self, image: Any) -> Pixels:
        pixels = self._process(image)
        _, rows, columns = self.token_grid(pixels.grid)
        if rows * columns <= self._most_tokens:
            return pixels
        # The processor keeps the shape of a strip one token high, and with it passes the budget.
        long = 28 * self._most_tokens
        return self._process(image.resize((long, 28) if image.width > image.height else (28, long)))

    def _process(self, image: Any) -> Pixels:
        out = self.processor(images=[image], return_tensors="pt")
        time, rows, columns = out["image_grid_thw"][0].tolist()
        return Pixels(out["pixel_values"], (time, rows, columns))

    def _rows(self, model: Any, values: Tensor, grids: Sequence[Grid]) -> list[Tensor]:
        thw = torch.tensor(grids, device=values.device)
        rows = self.vision_tower(model)(values, grid_thw=thw).pooler_output  # (all tokens, D)
        return list(rows.split([t * h * w // self._merge**2 for t, h, w in grids]))

    def speed_up(self, model: Any) -> None:
        speed_up(self.vision_tower(model))

    def language_model(self, model: Any) -> nn.Module:
        return model.model.language_model

    def vision_tower(self, model: Any) -> nn.Module:
        return model.model.visual


class Qwen25VL(Qwen2VL):
    """Qwen2.5-VL (Bai et al. 2025, arXiv 2502.13923): Qwen2-VL with a windowed tower."""

    @staticmethod
    def model_class() -> Any:
        from transformers import Qwen2_5_VLForConditionalGeneration

        return Qwen2_5_VLForConditionalGeneration

    @staticmethod
    def tiny_model(sizes: TinySizes, tokenizer: Any, attention: str) -> Any:
        from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

        vision = {
            "depth": sizes.vision_depth,
            "hidden_size": sizes.vision_dim,
            "intermediate_size": sizes.vision_dim * sizes.vision_mlp_ratio,
            "out_hidden_size": sizes.hidden_size,
            "num_heads": sizes.vision_heads,
            "window_size": 56,  # pixels: four tokens a window
            "fullatt_block_indexes": [sizes.vision_depth - 1],
            "initializer_range": sizes.init_std,
        }
        shared = _tiny_shared(sizes, tokenizer, attention)
        return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(vision_config=vision, **shared))


def _tiny_shared(sizes: TinySizes, tokenizer: Any, attention: str) -> dict[str, Any]:
    """What the configurations of both tiny forms have in common."""
    ids = tokenizer.get_vocab()
    half_head = sizes.hidden_size // sizes.heads // 2
    height = 3 * half_head // 8  # Qwen's own share: 16, 24 and 24 of 64
    rope = {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [half_head - 2 * height, height, height],
    }
    return {
        "text_config": {**sizes.language_model(tokenizer), "rope_parameters": rope},
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": True,
        "attn_implementation": attention,
    }

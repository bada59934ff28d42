"""Our way through Qwen2-VL (cached pieces, spliced rows) against Hugging Face's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from recbole_mm.backbone.batch import collate
from recbole_mm.backbone.families import PictureSettings
from recbole_mm.backbone.families.qwen import Qwen2VL
from recbole_mm.backbone.load import Backbone
from recbole_mm.backbone.prompt import Prompt
from recbole_mm.errors import UserError
from tests.backbone.families import PROMPTS, our_logits, stock_inputs, stock_logits
from tests.backbone.shop import PICTURES, backbone_of, picture, writer_of


def prompts_of(backbone: Backbone, chosen: Sequence[int] = range(len(PROMPTS))) -> list[Prompt]:
    writer = writer_of(backbone)
    return [writer.write(*PROMPTS[i]) for i in chosen]


# --- pictures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("item", PICTURES)
def test_a_picture_has_as_many_tokens_as_its_grid_says(backbone: Backbone, item: int) -> None:
    family: Any = backbone.family
    pixels = family.pixels(picture(item))
    stock = family.processor(images=[picture(item)], return_tensors="pt")
    assert list(pixels.grid) == stock["image_grid_thw"][0].tolist()
    assert torch.equal(pixels.values, stock["pixel_values"])
    merge = family.processor.merge_size
    expected = int(np.prod(pixels.grid)) // merge**2
    piece = family.image_piece(item, pixels.grid)
    pad = backbone.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert (piece.ids == pad).sum() == expected == piece.slots[0].count
    (rows,) = family.encode(backbone.model, [pixels])
    assert rows.shape == (expected, 128)


SIDES = [(1, 1), (28, 28), (56, 56), (57, 55), (168, 168), (169, 168), (600, 400), (40, 1000),
         (3000, 2000), (1999, 10)]  # fmt: skip


@pytest.mark.parametrize(("width", "height"), SIDES)
def test_the_papers_pixel_budget(backbone: Backbone, width: int, height: int) -> None:
    """56 x 56 to 168 x 168: 4 to 36 tokens of 28 x 28 pixels, whatever the picture's size."""
    pixels = backbone.family.pixels(Image.new("RGB", (width, height), "red"))
    assert pixels is not None
    time, rows, columns = pixels.grid
    assert time == 1
    assert 56 * 56 <= rows * columns * 14 * 14 <= 168 * 168
    assert 4 <= rows * columns // 4 <= 36
    assert pixels.values.shape == (rows * columns, 3 * 2 * 14 * 14)


def test_the_budget_is_the_processors_alone(backbone: Backbone) -> None:
    """A picture that fits is not resized: the patches hold its very pixels."""
    family: Any = backbone.family
    image = picture(1)
    pixels = family.pixels(image)
    processor = family.processor
    mean, std = np.array(processor.image_mean), np.array(processor.image_std)
    expected = (np.asarray(image) / 255.0 - mean) / std  # (56, 56, 3)
    first = pixels.values[0].reshape(3, 2, 14, 14)[:, 0].permute(1, 2, 0)  # (14, 14, 3)
    torch.testing.assert_close(
        first.double(), torch.from_numpy(expected[:14, :14]), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize(("width", "height"), [(400, 1), (1, 200), (4000, 20)])
def test_a_picture_too_stretched_is_none(backbone: Backbone, width: int, height: int) -> None:
    assert backbone.family.pixels(Image.new("RGB", (width, height))) is None


def test_a_picture_just_short_of_that_is_taken(backbone: Backbone) -> None:
    assert backbone.family.pixels(Image.new("RGB", (1990, 10))) is not None


@pytest.mark.parametrize("size", [(1990, 10), (50, 5000), (4000, 500), (300, 40)])
@pytest.mark.parametrize("most", [784 * 4, 784 * 9, 784 * 36])
def test_a_strip_keeps_to_the_budget(backbone: Backbone, size: tuple[int, int], most: int) -> None:
    family = Qwen2VL(backbone.tokenizer, None, PictureSettings(784, most))
    pixels = family.pixels(Image.new("RGB", size))
    assert pixels is not None
    _, rows, columns = pixels.grid
    assert rows * columns // 4 <= most // 784
    assert (columns > rows) == (size[0] > size[1])
    piece = family.image_piece(1, pixels.grid)
    assert len(piece) <= len(family.largest_image_piece())


@pytest.mark.parametrize(("least", "most"), [(783, 28224), (6272, 3136), (0, 0)])
def test_an_impossible_budget_is_the_users_mistake(
    backbone: Backbone, least: int, most: int
) -> None:
    with pytest.raises(UserError, match="min_pixels"):
        Qwen2VL(backbone.tokenizer, None, PictureSettings(least, most))


def test_a_tokenizer_without_image_tokens_is_the_users_mistake() -> None:
    from transformers import Qwen2Tokenizer

    with pytest.raises(UserError, match="vision_start"):
        Qwen2VL(Qwen2Tokenizer(vocab={"a": 0}, merges=[]), None, PictureSettings(3136, 28224))


# --- positions ------------------------------------------------------------------------------------


def test_positions_are_hugging_faces(backbone: Backbone) -> None:
    for number in range(len(PROMPTS)):
        (prompt,) = prompts_of(backbone, [number])
        inputs = stock_inputs(backbone, [prompt])
        if "image_grid_thw" not in inputs:
            assert np.array_equal(prompt.positions, np.tile(np.arange(len(prompt)), (3, 1)))
            continue
        model: Any = backbone.model
        inputs.pop("pixel_values")
        positions, delta = model.model.get_rope_index(**inputs)
        assert np.array_equal(prompt.positions, positions[:, 0].numpy())
        assert prompt.span == len(prompt) + delta.item()


def test_positions_of_a_padded_batch(backbone: Backbone) -> None:
    prompts = prompts_of(backbone)
    inputs = stock_inputs(backbone, prompts)
    inputs.pop("pixel_values")
    model: Any = backbone.model
    expected, _ = model.model.get_rope_index(**inputs)
    batch = collate(prompts, backbone.pad_id)
    used = inputs["attention_mask"].bool()
    assert torch.equal(batch.positions[:, used], expected[:, used])
    assert torch.equal(batch.ids, inputs["input_ids"])


# --- the forward pass -----------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(len(PROMPTS)))
@torch.no_grad()
def test_forward_of_one_prompt_is_the_stock_models(backbone: Backbone, number: int) -> None:
    """At every position, for prompts of none to seven pictures."""
    prompts = prompts_of(backbone, [number])
    ours = our_logits(backbone, prompts, positions=len(prompts[0]))
    torch.testing.assert_close(ours, stock_logits(backbone, prompts), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_forward_of_a_padded_batch_is_the_stock_models(backbone: Backbone) -> None:
    prompts = prompts_of(backbone)
    assert len({len(prompt) for prompt in prompts}) == len(prompts)
    expected = stock_logits(backbone, prompts)
    ours = our_logits(backbone, prompts, positions=2)
    for row, prompt in enumerate(prompts):
        end = len(prompt)
        torch.testing.assert_close(ours[row], expected[row, end - 2 : end], atol=1e-5, rtol=1e-5)


def test_gradients_are_the_stock_models() -> None:
    """Of every parameter, the vision tower's too, though pictures are encoded once a batch."""
    backbone = backbone_of(seed=2)
    prompts = prompts_of(backbone)
    ends = torch.tensor([len(prompt) - 1 for prompt in prompts])
    weights = torch.randn(
        len(prompts), len(backbone.tokenizer), generator=torch.Generator().manual_seed(0)
    )
    found = []
    for logits in (
        our_logits(backbone, prompts)[:, 0],
        stock_logits(backbone, prompts)[torch.arange(len(prompts)), ends],
    ):
        backbone.zero_grad()
        (logits * weights).sum().backward()
        found.append({name: p.grad.clone() for name, p in backbone.model.named_parameters()})
    ours, stock = found
    assert ours.keys() == stock.keys()
    for name, gradient in stock.items():
        assert gradient.abs().max() > 0, name
        scale = gradient.abs().max().item()
        torch.testing.assert_close(
            ours[name], gradient, atol=1e-5 * scale, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@torch.no_grad()
def test_one_dimensional_positions_would_be_another_model(backbone: Backbone) -> None:
    """The parity above is not for want of an effect of the positions."""
    (prompt,) = prompts_of(backbone, [0])
    flat = replace(prompt, positions=np.tile(np.arange(len(prompt)), (3, 1)))
    difference = our_logits(backbone, [flat]) - our_logits(backbone, [prompt])
    assert difference.abs().max() > 1e-3


@torch.no_grad()
def test_each_picture_goes_to_its_own_item(backbone: Backbone) -> None:
    """Two items that say the same are told apart by their pictures alone."""
    plain = {item: {"title": "same"} for item in PICTURES}
    writer = writer_of(backbone, texts=plain)
    ab, ba = (writer.write([5], pair) for pair in ([1, 6], [6, 1]))
    assert np.array_equal(ab.ids, ba.ids)
    assert [slot.item for slot in ab.slots] == [5, 1, 6]
    one, other = our_logits(backbone, [ab]), our_logits(backbone, [ba])
    assert (one - other).abs().max() > 1e-4
    # the stock model given the pictures in the other order agrees
    torch.testing.assert_close(
        other[0, 0], stock_logits(backbone, [ba])[0, -1], atol=1e-5, rtol=1e-5
    )

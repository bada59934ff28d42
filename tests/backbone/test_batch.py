"""Prompts of different lengths as one batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recbole_mm.backbone.batch import by_length, collate
from recbole_mm.backbone.load import Backbone
from recbole_mm.backbone.prompt import text_piece
from tests.backbone.shop import images_of
from tests.backbone.test_families import prompts_of


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 120))
def test_by_length_takes_every_prompt_once_within_the_budget(lengths: list[int], most: int) -> None:
    batches = list(by_length(lengths, most))
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        padded = len(batch) * max(lengths[row] for row in batch)
        assert padded <= most or len(batch) == 1
    longest = [max(lengths[row] for row in batch) for batch in batches]
    assert longest == sorted(longest, reverse=True)


def test_padding_is_on_the_right_and_last_is_the_last_token(backbone: Backbone) -> None:
    prompts = prompts_of(backbone)
    batch = collate(prompts, pad_id=backbone.pad_id)
    for row, prompt in enumerate(prompts):
        end = len(prompt)
        assert batch.ids[row, :end].tolist() == prompt.ids.tolist()
        assert (batch.ids[row, end:] == backbone.pad_id).all()
        assert np.array_equal(batch.positions[:, row, :end].numpy(), prompt.positions)
        assert batch.last[row] == end - 1


@torch.no_grad()
def test_rows_of_a_picture_go_to_every_place_it_stands(backbone: Backbone) -> None:
    """Each distinct picture is in the batch once, and each slot gets its own item's rows."""
    prompts = prompts_of(backbone)
    batch = collate(prompts, backbone.pad_id)
    shown = [slot.item for prompt in prompts for slot in prompt.slots]
    assert len(set(shown)) < len(shown)
    assert batch.items == list(dict.fromkeys(shown))
    images = images_of(backbone)
    rows = images.rows(backbone.model, batch.items)
    embeds = backbone._embed(batch, images)  # (B, T, D)
    for b, prompt in enumerate(prompts):
        for slot in prompt.slots:
            there = embeds[b, slot.start : slot.start + slot.count]
            assert torch.equal(there, rows[batch.items.index(slot.item)])
    pad = backbone.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    words = batch.ids != pad
    table = backbone.model.get_input_embeddings()(batch.ids)
    assert torch.equal(embeds[words], table[words])


def test_prompts_without_pictures_need_none(backbone: Backbone) -> None:
    batch = collate([text_piece([1, 2, 3], 3), text_piece([4], 3)], 0)
    assert batch.items == []
    assert len(batch.image_at) == len(batch.image_row) == 0
    hidden = backbone.hidden(batch, images_of(backbone))
    assert hidden.shape == (2, 1, 128)


@pytest.mark.parametrize("extra", [1, 17])
@torch.no_grad()
def test_more_padding_changes_nothing(backbone: Backbone, extra: int) -> None:
    prompts = prompts_of(backbone)
    longer = text_piece([backbone.pad_id] * (max(map(len, prompts)) + extra), 3)
    plain = backbone.hidden(collate(prompts, backbone.pad_id), images_of(backbone))
    padded = backbone.hidden(collate([*prompts, longer], backbone.pad_id), images_of(backbone))
    torch.testing.assert_close(padded[:-1], plain, atol=1e-5, rtol=0)

"""The mended vision towers against `transformers`' own: outputs and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from recbole_mm.backbone.tower import _PatchProjection, segment_attention, speed_up
from tests.backbone.families import family_backbone

GRIDS = [(1, 4, 4), (1, 2, 6), (1, 4, 4), (1, 6, 2), (1, 8, 4)]


@pytest.mark.parametrize("lengths", [[4, 4, 4], [5], [3, 1, 7, 1, 3], [2, 2, 9]])
def test_attention_is_that_of_each_segment_alone(lengths: list[int]) -> None:
    torch.manual_seed(0)
    parts = [torch.randn(1, 3, sum(lengths), 8, dtype=torch.float64) for _ in range(3)]
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    results = []
    for ours in (True, False):
        query, key, value = (part.clone().requires_grad_() for part in parts)
        if ours:
            out, _ = segment_attention(
                nn.Identity(), query, key, value, None, 0.3, cu_seq_lens_q=ends
            )
        else:
            each = zip(*(part.split(lengths, dim=2) for part in (query, key, value)), strict=True)
            seen = [F.softmax(q @ k.mT * 0.3, dim=-1) @ v for q, k, v in each]
            out = torch.cat(seen, dim=2).transpose(1, 2)
        (out * torch.arange(out.numel()).view_as(out)).sum().backward()
        results.append([out, query.grad, key.grad, value.grad])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_a_convolution_of_one_patch_is_a_product() -> None:
    torch.manual_seed(0)
    plain = nn.Conv3d(3, 5, (2, 4, 4), (2, 4, 4), bias=False)
    mended = nn.Conv3d(3, 5, (2, 4, 4), (2, 4, 4), bias=False)
    mended.load_state_dict(plain.state_dict())
    mended.__class__ = _PatchProjection
    patches = torch.randn(7, 3, 2, 4, 4)
    torch.testing.assert_close(mended(patches), plain(patches))
    for module in (plain, mended):
        module(patches).square().sum().backward()
    torch.testing.assert_close(mended.weight.grad, plain.weight.grad)
    larger = torch.randn(2, 3, 4, 8, 4)
    torch.testing.assert_close(mended(larger), plain(larger))


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_a_tower_is_the_stock_one(name: str) -> None:
    """Pictures of one size and of several, with gradients."""
    backbone = family_backbone(name)
    family: Any = backbone.family
    towers: list[Any] = [family.vision_tower(backbone.model)]
    stock = type(backbone.model)(type(backbone.model.config)(**backbone.model.config.to_dict()))
    stock.config.vision_config._attn_implementation = "sdpa"
    towers.append(family.vision_tower(stock))
    towers[1].load_state_dict(towers[0].state_dict())
    assert "flash" in towers[0].config._attn_implementation
    assert type(towers[1].patch_embed.proj) is nn.Conv3d
    for grids in (GRIDS, [GRIDS[0]] * 3):
        thw = torch.tensor(grids)
        torch.manual_seed(0)
        patches = torch.randn(int(thw.prod(1).sum()), 3 * 2 * 14 * 14)
        found, expected = (tower(patches, grid_thw=thw).pooler_output for tower in towers)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        for tower, out in zip(towers, (found, expected), strict=True):
            tower.zero_grad()
            out.square().sum().backward()
        theirs = dict(towers[1].named_parameters())
        for key, parameter in towers[0].named_parameters():
            torch.testing.assert_close(parameter.grad, theirs[key].grad, rtol=1e-3, atol=1e-4)


def test_flash_attention_is_left_alone() -> None:
    backbone = family_backbone("qwen2_vl")
    tower: Any = backbone.family.vision_tower(backbone.model)
    tower.config._attn_implementation = "flash_attention_2"
    speed_up(tower)
    assert tower.config._attn_implementation == "flash_attention_2"

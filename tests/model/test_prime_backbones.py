"""PRIME on backbones of other families, and prompts that a backbone cannot read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from recbole_mm.errors import UserError
from tests.model.prime_world import world_of

SHORT = {"n_candidates": 8, "max_history_items": 3, "max_attr_tokens": 8}


def with_context(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    monkeypatch.setattr("recbole_mm.backbone.tiny._CONTEXT", tokens)


def test_prompts_longer_than_the_context_are_one_sentence(
    mini: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = (
        r"history items and 8 candidates takes up to \d+ tokens, but backbone 'tiny' reads 300"
    )
    with_context(monkeypatch, 300)
    with pytest.raises(UserError, match=longest) as caught:
        world_of(mini, **SHORT)
    assert "lower max_history_items, n_candidates or max_attr_tokens" in str(caught.value)
    assert "image_pooling: cls makes one token of a picture" in str(caught.value)
    with pytest.raises(UserError) as again:
        world_of(mini, **{**SHORT, "n_candidates": 26, "attributes": ["title", "price", "brand"]})
    assert "image_pooling" not in str(again.value)
    world_of(mini, **{**SHORT, "n_candidates": 2, "max_history_items": 1})


def test_the_longest_prompt_there_is_fits_exactly(
    mini: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts are shorter than their budget, which alone is no reason to refuse."""
    roomy = {**SHORT, "max_attr_tokens": 500}
    with_context(monkeypatch, 100)
    with pytest.raises(UserError) as caught:
        world_of(mini, **roomy)
    found = re.search(r"up to (\d+) tokens", str(caught.value))
    assert found is not None
    with_context(monkeypatch, int(found[1]) + 1)
    world = world_of(mini, **roomy)
    writer, items = world.model.ranker.writer, range(1, world.model.n_items)
    lines = sorted(items, key=lambda item: -len(writer.line(item)))[:11]
    assert len(writer.write(lines[8:], lines[:8])) <= int(found[1])
    with_context(monkeypatch, int(found[1]))
    with pytest.raises(UserError, match="takes up to"):
        world_of(mini, **roomy)


@pytest.mark.parametrize("backbone", ["tiny-llava", "tiny-smolvlm", "tiny-qwen2.5-vl"])
def test_other_backbones_rank_with_one_token_a_picture_too(mini: Path, backbone: str) -> None:
    scores = []
    for pooling in ("all", "cls"):
        world = world_of(mini, backbone=backbone, image_pooling=pooling)
        rows = world.rows()[:4]
        world.model.enter("ranker")
        world.model.only_hits = False
        with torch.no_grad():
            scores.append(world.model.full_sort_predict(rows))
        counts = {
            slot.count for i in range(1, 9) for slot in world.model.ranker.writer.line(i).slots
        }
        assert counts == ({4} if pooling == "all" else {1})
    assert not torch.equal(*scores)

"""Several candidate sets behind one history, against a prompt of its own for each."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recbole_mm.backbone import ranker as ranker_module
from recbole_mm.backbone.batch import collate
from recbole_mm.backbone.load import Backbone
from recbole_mm.backbone.prompt import text_piece
from tests.backbone.shop import CANDIDATES, HISTORIES, backbone_of, ranker_of, writer_of

SETS = np.stack([CANDIDATES, CANDIDATES[::-1, ::-1], CANDIDATES[[2, 3, 0, 1]]], axis=1)  # (4, 3, 4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("max_tokens", [1, 16_384])
def test_sets_of_one_history_score_as_prompts_of_their_own(attention: str, max_tokens: int) -> None:
    backbone = backbone_of(attention=attention)
    found = ranker_of(backbone, max_tokens=max_tokens).set_log_probs(HISTORIES, SETS)
    assert found.shape == SETS.shape
    alone = ranker_of(backbone)
    for column in range(SETS.shape[1]):
        expected = alone.log_probs(HISTORIES, SETS[:, column])
        torch.testing.assert_close(found[:, column], expected, atol=1e-5, rtol=0)
    assert not torch.allclose(found[:, 0], found[:, 2], atol=1e-3)


def test_short_histories_are_read_again_for_each_set(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranker = ranker_of(backbone)
    shared = ranker.set_log_probs(HISTORIES, SETS)
    monkeypatch.setattr(ranker_module, "_WORTH_SHARING", 1e9)
    monkeypatch.setattr(type(backbone), "branch_hidden", None)
    torch.testing.assert_close(ranker.set_log_probs(HISTORIES, SETS), shared, atol=1e-5, rtol=0)


def test_a_fork_is_its_prompts_with_the_history_once(backbone: Backbone) -> None:
    writer = writer_of(backbone)
    sets = SETS[0].tolist()
    forked = writer.write_fork(HISTORIES[0], sets)
    apart = [writer.write(HISTORIES[0], candidates) for candidates in sets]
    assert len(forked) == sum(map(len, apart)) - 2 * len(forked.trunk)
    for prompt, branch in zip(apart, forked.branches, strict=True):
        ids = [*forked.trunk.ids, *branch.ids]
        assert ids == prompt.ids.tolist()
        positions = np.concatenate([forked.trunk.positions, branch.positions], axis=1)
        assert np.array_equal(positions, prompt.positions)


def test_padding_on_the_left_moves_pictures_too(backbone: Backbone) -> None:
    prompts = [text_piece([7, 8], 3), writer_of(backbone).write([1, 3], [4])]
    batch = collate(prompts, backbone.pad_id, left=True)
    T = batch.ids.shape[1]
    assert batch.ids[0].tolist() == [backbone.pad_id] * (T - 2) + [7, 8]
    assert batch.last.tolist() == [T - 1, T - 1]
    wide = collate([*prompts, text_piece([1] * (T + 5), 3)], backbone.pad_id, left=True)
    assert torch.equal(wide.ids[1, 5:], batch.ids[1])
    pad = backbone.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    for some in (batch, wide):
        assert torch.equal(some.image_at, (some.ids.flatten() == pad).nonzero()[:, 0])


@torch.no_grad()
def test_half_precision_forks_are_as_close_as_half_precision_is(backbone: Backbone) -> None:
    exact = ranker_of(backbone).set_log_probs(HISTORIES, SETS)
    half = ranker_of(backbone_of())
    half.backbone.model.to(torch.bfloat16)
    forked = half.set_log_probs(HISTORIES, SETS)
    apart = torch.stack([half.log_probs(HISTORIES, SETS[:, column]) for column in range(3)], 1)
    assert (forked - apart).abs().max() <= 2 * (apart - exact).abs().max() + 1e-3

"""Several candidate sets behind one history, against a prompt of its own for each."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recbole_mm.backbone.batch import branch_mask, collate_forks
from recbole_mm.backbone.load import Backbone
from recbole_mm.backbone.prompt import fork, text_piece
from tests.backbone.shop import CANDIDATES, HISTORIES, backbone_of, images_of, ranker_of, writer_of

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


def test_without_masks_each_set_has_its_prompt(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    forked = ranker_of(backbone).set_log_probs(HISTORIES, SETS)
    monkeypatch.setattr(type(backbone), "can_fork", False)
    monkeypatch.setattr(type(writer_of(backbone)), "write_fork", None)
    apart = ranker_of(backbone).set_log_probs(HISTORIES, SETS)
    torch.testing.assert_close(apart, forked, atol=1e-5, rtol=0)


def test_the_history_stands_there_once(backbone: Backbone) -> None:
    writer = writer_of(backbone)
    sets = SETS[0].tolist()
    forked = writer.write_fork(HISTORIES[0], sets)
    apart = [writer.write(HISTORIES[0], candidates) for candidates in sets]
    trunk = forked.starts[0]
    assert len(forked) == sum(map(len, apart)) - 2 * trunk
    ends = (*forked.starts[1:], len(forked))
    for prompt, start, end in zip(apart, forked.starts, ends, strict=True):
        mine = [*range(trunk), *range(start, end)]
        assert forked.prompt.ids[mine].tolist() == prompt.ids.tolist()
        assert np.array_equal(forked.prompt.positions[:, mine], prompt.positions)


def test_a_branch_sees_the_trunk_and_itself() -> None:
    short = fork(text_piece([1, 2], 3), [text_piece([3], 3), text_piece([4, 5], 3)])
    long = fork(text_piece([1], 3), [text_piece([3, 4], 3), text_piece([5, 6, 7], 3)])
    batch = collate_forks([short, long], pad_id=0)
    assert batch.last.tolist() == [[2, 4], [2, 5]]
    assert batch.branch is not None
    seen = branch_mask(batch.branch, torch.float32)[:, 0] == 0  # (B, T, T)
    assert seen[0, :5, :5].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 1, 0, 1, 1],
    ]
    assert seen[1].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 0, 0, 1, 0, 0],
        [1, 0, 0, 1, 1, 0],
        [1, 0, 0, 1, 1, 1],
    ]


@torch.no_grad()
def test_half_precision_forks_are_as_close_as_half_precision_is(backbone: Backbone) -> None:
    exact = ranker_of(backbone).set_log_probs(HISTORIES, SETS)
    half = ranker_of(backbone_of())
    half.backbone.model.to(torch.bfloat16)
    forked = half.set_log_probs(HISTORIES, SETS)
    apart = torch.stack([half.log_probs(HISTORIES, SETS[:, column]) for column in range(3)], 1)
    assert (forked - apart).abs().max() <= 2 * (apart - exact).abs().max() + 1e-3


@torch.no_grad()
def test_every_token_of_a_fork_attends_to_something(backbone: Backbone) -> None:
    """Padding behind a short fork must not make numbers that are none."""
    writer = writer_of(backbone)
    forks = [writer.write_fork([1], [[2, 3], [4, 5]]), writer.write_fork([], [[6, 7], [8, 1]])]
    hidden = backbone.hidden(collate_forks(forks, backbone.pad_id), images_of(backbone))
    assert hidden.shape == (2, 2, 128)
    assert hidden.isfinite().all()

"""Preference optimisation of PRIME's retriever against the paper, position by position."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recbole.data.interaction import Interaction
from safetensors.torch import load_file
from torch import Tensor, nn

from recbole_mm.data.sequences import TARGETS, collate
from recbole_mm.errors import UserError
from recbole_mm.model.layers.preference_stage import Positions, PreferenceStage, positions_of
from recbole_mm.stage import StageContext
from recbole_mm.trainer.checkpoint import Checkpoint, write_checkpoint
from recbole_mm.trainer.run import Run
from recbole_mm.trainer.staged import StagedTrainer
from tests.model.prime_world import HISTORY, K, Trained, World, world_of


def stage_of(mini: Path, **changes: Any) -> PreferenceStage:
    """A stage at its beginning, without dropout; the retriever is spread out, so that sets vary."""
    world = world_of(mini, preference_dropout_prob=0.0, **changes)
    with torch.no_grad():
        for parameter in world.model.retriever.parameters():
            parameter.mul_(3.0)
    stage = world.stage("preference")
    stage.prepare(context_of(world))
    return stage


def context_of(world: World) -> StageContext:
    return StageContext(world.rows("valid"), Path(), 0, torch.device("cpu"))


def batch_of(stage: PreferenceStage) -> Interaction:
    return collate(stage.rows, stage.plan(0)[0].rows)


def parts(rows: Interaction) -> tuple[Tensor, Tensor]:
    return rows["item_id_list"], rows[TARGETS]


def prefixes_of(item_seq: Tensor, targets: Tensor) -> list[tuple[list[int], int]]:
    """Every prefix of a batch and the item that follows it, in the order of rows and places."""
    found = []
    for items, nexts in zip(item_seq.tolist(), targets.tolist(), strict=True):
        found += [(items[: t + 1], nexts[t]) for t in range(len(items)) if nexts[t]]
    return found


def scores_of(stage: PreferenceStage, prefix: list[int]) -> Tensor:
    """The policy's scores after one prefix, which is a row of its own. Shape: (V,)."""
    row = {"item_id_list": torch.tensor([prefix]), "item_length": torch.tensor([len(prefix)])}
    return stage.policy.full_sort_predict(Interaction(row))[0]


# --- positions ---
def test_every_position_with_a_target_is_a_prefix(mini: Path) -> None:
    item_seq, targets = parts(batch_of(stage_of(mini)))
    positions = positions_of(item_seq, targets)
    expected = prefixes_of(item_seq, targets)
    assert positions.targets.tolist() == [target for _, target in expected]
    assert [h.tolist() for h in positions.histories(99)] == [items for items, _ in expected]
    short = [items[-HISTORY:] for items, _ in expected]
    assert [h.tolist() for h in positions.histories(HISTORY)] == short
    assert len({len(items) for items, _ in expected}) > 3


def test_positions_are_of_training_items_alone(mini: Path) -> None:
    """From each user's items but the last two: what is held out is no target and in no history."""
    world = world_of(mini)
    stage = world.stage("preference")
    rows = collate(stage.rows, np.arange(len(stage.rows)))
    whole: dict[int, list[int]] = {}  # the longest prefix of each row, with its target
    for items, nexts, user in zip(
        *(p.tolist() for p in (*parts(rows), rows["user_id"])), strict=True
    ):
        for prefix, target in prefixes_of(torch.tensor([items]), torch.tensor([nexts])):
            whole[user] = [*prefix, target]
    assert sorted(whole.values()) == sorted(items[:-2] for items in world.raw())


def test_one_pass_scores_every_prefix(mini: Path) -> None:
    stage = stage_of(mini)
    stage.policy.eval()
    rows = batch_of(stage)
    found = stage._scores(rows)
    expected = [scores_of(stage, items) for items, _ in prefixes_of(*parts(rows))]
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=1e-5)


def test_the_plan_has_every_user_once_an_epoch_and_new_draws_each_time(mini: Path) -> None:
    stage = stage_of(mini)
    for epoch in range(2):
        rows = np.concatenate([batch.rows for batch in stage.plan(epoch)])
        assert sorted(rows.tolist()) == list(range(len(stage.rows)))
    seeds = [batch.seed for epoch in range(2) for batch in stage.plan(epoch)]
    assert len(set(seeds)) == len(seeds)
    assert [b.seed for b in stage.plan(1)] == [b.seed for b in stage.plan(1)]


# --- pairs ---
def naive_preference(stage: PreferenceStage, prefix: list[int], target: int, sets: Tensor) -> int:
    """0 where the first set is preferred, 1 the second, -1 neither (section 3.2.4, in words)."""
    held = [target in items for items in sets.tolist()]
    if sum(held) < 2:
        return held.index(True) if any(held) else -1
    scores, places = scores_of(stage, prefix), []
    for items in sets.tolist():
        shown = sorted(items, key=lambda item: -float(scores[item]))
        said = stage.model.the_ranker().log_probs([np.array(prefix[-HISTORY:])], np.array([shown]))[
            0
        ]
        own = float(said[shown.index(target)])
        places.append((int((said > own).sum()), -own))
    return 0 if places[0] <= places[1] else 1


@torch.no_grad()
def test_pairs_are_those_of_the_paper(mini: Path) -> None:
    stage = stage_of(mini, set_temperature=0.5, neither="skip")
    rows = batch_of(stage)
    item_seq, targets = parts(rows)
    prefixes, positions = prefixes_of(item_seq, targets), positions_of(item_seq, targets)
    stage.policy.eval()
    stage.model.the_ranker().eval()
    scores = stage._scores(rows)
    sets = stage._draw(scores, positions, torch.Generator().manual_seed(3))
    pairs = stage._pairs(rows, torch.Generator().manual_seed(3))
    drawn = list(zip(prefixes, sets, strict=True))
    wins = [naive_preference(stage, *prefix, two) for prefix, two in drawn]
    assert {-1, 0, 1} == set(wins)
    both = sum((two == target).sum() == 2 for (_, target), two in drawn)
    assert both > 3
    assert stage.ranker_calls == 2 * both
    assert pairs is not None
    assert pairs.at.tolist() == [row for row, win in enumerate(wins) if win >= 0]
    for row, winner, loser in zip(pairs.at.tolist(), pairs.winner, pairs.loser, strict=True):
        assert torch.equal(winner, sets[row, wins[row]])
        assert torch.equal(loser, sets[row, 1 - wins[row]])


@pytest.mark.parametrize("neither", ["force", "resample", "skip"])
@torch.no_grad()
def test_sets_without_the_target(mini: Path, neither: str) -> None:
    stage = stage_of(mini, neither=neither, n_candidates=3, set_temperature=3.0)
    rows = batch_of(stage)
    item_seq, targets = parts(rows)
    positions = positions_of(item_seq, targets)
    scores = stage._scores(rows)
    drawn = stage_of(mini, neither="skip", n_candidates=3, set_temperature=3.0)._draw(
        scores, positions, torch.Generator().manual_seed(1)
    )
    sets = stage._draw(scores, positions, torch.Generator().manual_seed(1))
    bare = (drawn != positions.targets[:, None, None]).flatten(1).all(1)
    assert 5 < bare.sum() < len(bare)
    assert torch.equal(sets[~bare], drawn[~bare])
    assert all(len(set(items)) == 3 for items in sets.flatten(0, 1).tolist())
    if neither == "force":
        assert torch.equal(sets[bare, 0, 0], positions.targets[bare])
        assert torch.equal(sets[bare, 0, 1:], drawn[bare, 0, 1:])
        assert torch.equal(sets[bare, 1], drawn[bare, 1])
    still = (sets != positions.targets[:, None, None]).flatten(1).all(1)
    assert {"force": still.sum() == 0, "skip": torch.equal(still, bare)}.get(neither, True)
    if neither == "resample":
        assert still.sum() < 0.2 * bare.sum()


@pytest.mark.parametrize("labeler", ["truth", "random", "none"])
def test_other_labelers_never_ask_the_ranker(mini: Path, labeler: str) -> None:
    stage = stage_of(mini, labeler=labeler, set_temperature=0.5)
    asking = stage_of(mini, set_temperature=0.5)
    rows = batch_of(stage)
    item_seq, targets = parts(rows)
    pairs, every = (s._pairs(rows, torch.Generator().manual_seed(3)) for s in (stage, asking))
    assert stage.ranker_calls == 0 < asking.ranker_calls
    assert every is not None
    if labeler == "none":
        assert pairs is None
        return
    assert pairs is not None
    if labeler == "truth":
        assert len(pairs.at) == len(every.at) - asking.ranker_calls // 2
        wanted = positions_of(item_seq, targets).targets[pairs.at]
        assert (pairs.winner == wanted[:, None]).any(1).all()
        assert not (pairs.loser == wanted[:, None]).any()
        return
    assert torch.equal(pairs.at, every.at)
    changed = (pairs.winner != every.winner).any(1).sum()
    assert 0 < changed < asking.ranker_calls // 2


def test_masked_candidates_are_in_no_set(mini: Path) -> None:
    stage = stage_of(mini, candidate_mask_history=True, neither="skip")
    rows = batch_of(stage)
    item_seq, targets = parts(rows)
    positions = positions_of(item_seq, targets)
    with torch.no_grad():
        scores = stage._scores(rows)
    sets = stage._draw(scores, positions, torch.Generator().manual_seed(0)).flatten(1)
    for items, history in zip(sets.tolist(), positions.histories(99), strict=True):
        assert not set(items) & set(history.tolist())


# --- the loss ---
@pytest.mark.parametrize("set_prob", ["mean", "product"])
def test_the_loss_and_its_gradient_are_those_of_equation_8(mini: Path, set_prob: str) -> None:
    stage = stage_of(mini, beta=0.7, set_prob=set_prob, set_temperature=0.5)
    stage.policy.double().train()
    batch = stage.plan(0)[1]
    loss = stage.loss(batch)
    loss.backward()
    found = {n: p.grad.clone() for n, p in stage.policy.named_parameters() if p.grad is not None}
    stage.policy.zero_grad()

    rows = collate(stage.rows, batch.rows)
    item_seq, targets = parts(rows)
    prefixes = prefixes_of(item_seq, targets)
    pairs = stage._pairs(rows, torch.Generator().manual_seed(batch.seed))
    assert pairs is not None
    p = [scores_of(stage, items).softmax(0) for items, _ in prefixes]
    cross_entropy = -sum(p[row][target].log() for row, (_, target) in enumerate(prefixes))
    preference = torch.zeros(())
    for row, winner, loser in zip(pairs.at.tolist(), pairs.winner, pairs.loser, strict=True):
        odds = []
        for items in (winner, loser):
            likelihood = p[row][items].mean() if set_prob == "mean" else p[row][items].prod()
            odds.append(likelihood / (1 - likelihood))
        preference = preference - torch.sigmoid((odds[0] / odds[1]).log()).log()
    expected = cross_entropy / len(prefixes) + 0.7 * preference / len(pairs.at)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    for name, parameter in stage.policy.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("changes", [{"labeler": "none"}, {"beta": 0.0}])
def test_without_preferences_it_is_cross_entropy(mini: Path, changes: dict[str, Any]) -> None:
    stage = stage_of(mini, **changes)
    stage.policy.train()
    batch = stage.plan(0)[0]
    rows = collate(stage.rows, batch.rows)
    plain = stage.policy.encoder.loss(rows["item_id_list"], rows["item_length"], rows[TARGETS])
    torch.testing.assert_close(stage.loss(batch), plain)
    assert stage.ranker_calls == 0


def test_it_learns_what_the_labels_say(mini: Path) -> None:
    """By the preferences alone, sets that hold the target become likelier."""
    stage = stage_of(mini, labeler="truth", beta=1e4)  # beside it cross entropy is nothing
    rows = batch_of(stage)
    item_seq, targets = parts(rows)
    optimizer = torch.optim.AdamW(stage.param_groups(), lr=5e-3)

    def share() -> float:
        """Of positions whose target is in a drawn set, over ten draws."""
        stage.policy.eval()
        with torch.no_grad():
            positions, scores = positions_of(item_seq, targets), stage._scores(rows)
            skip = stage_of(mini, neither="skip")
            draws = [
                skip._draw(scores, positions, torch.Generator().manual_seed(seed))
                for seed in range(10)
            ]
        held = [(sets == positions.targets[:, None, None]).any(2).float().mean() for sets in draws]
        return float(torch.stack(held).mean())

    before = share()
    torch.manual_seed(0)
    for _ in range(60):
        stage.policy.train()
        optimizer.zero_grad()
        stage.loss(stage.plan(0)[0]).backward()
        optimizer.step()
    assert share() > before + 0.1


def test_draws_are_made_without_dropout_and_training_with_it(mini: Path) -> None:
    world = world_of(mini, dropout_prob=0.5, preference_dropout_prob=0.3)
    stage = world.stage("preference")
    stage.prepare(context_of(world))
    dropouts = [m.p for m in stage.policy.modules() if isinstance(m, nn.Dropout)]
    assert set(dropouts) == {0.3}
    assert {m.p for m in world.model.retriever.modules() if isinstance(m, nn.Dropout)} != {0.3}
    stage.policy.train()
    rows = batch_of(stage)
    _item_seq, _targets = parts(rows)
    one, other = (stage._pairs(rows, torch.Generator().manual_seed(0)) for _ in range(2))
    assert one is not None
    assert other is not None
    assert torch.equal(one.winner, other.winner)
    assert stage.policy.training


# --- in a run ---
def test_the_policy_begins_as_the_retriever_which_stays(trained: Trained) -> None:
    """The retriever's own rows are those of before the stage."""
    model = trained.world.model
    model.enter("retriever")
    assert model.scoring is model.retriever
    weights = model.retriever.state_dict()
    last = load_file(trained.run.folder / "preference/last/model.safetensors")
    assert any(not torch.equal(value, last[name]) for name, value in weights.items())
    record = trained.run.stage("ranker")
    assert trained.test("ranker") == pytest.approx(record["test"], abs=1e-9)
    assert trained.test("preference") == pytest.approx(
        trained.run.stage("preference")["test"], abs=1e-9
    )


def test_the_start_is_validated_and_may_stay_the_best(mini: Path, in_folder: Path) -> None:
    world = world_of(mini, preference_learning_rate=1e-12, stages=["preference"])
    run = Run.start(in_folder, world.config)
    for name in ("retriever", "ranker"):
        stage = world.stage(name)
        settings = world.config.settings()
        tensors = {k: v.clone() for k, v in stage.state().items()}
        write_checkpoint(
            run.folder / name / "best", Checkpoint(tensors, {}, settings, world.items())
        )
    trainer = StagedTrainer(world.config, world.model, run)
    trainer.fit(world.data.train, world.data.valid, world.data.test)
    record = run.stage("preference")
    assert (record["best_step"], record["steps"]) == (0, 2)
    weights = world.model.retriever.state_dict()
    assert all(torch.equal(weights[k], v) for k, v in world.model.policy.state_dict().items())


def test_the_record_says_what_was_asked_and_what_changed(trained: Trained) -> None:
    finished = trained.run.stage("preference")["finished"]
    assert finished["ranker_calls"] > 0
    assert finished["ranker_calls"] % 2 == 0
    rows = trained.world.rows("valid")
    for name, source in (("before", "retriever"), ("after", "preference")):
        trained.world.model.read(source, "retriever")
        with torch.no_grad():
            scores = trained.world.model.full_sort_predict(rows)
        scores[:, 0] = -torch.inf
        own = scores.gather(1, rows["item_id"][:, None])
        rank = (scores > own).sum(1)  # 0 is the top
        assert finished[name] == pytest.approx(
            {
                "retrieval_rate": (rank < K).float().mean().item(),
                "recall@8": (rank < K).float().mean().item(),
                "ndcg@8": ((rank < K) / (rank + 2.0).log2()).mean().item(),
            },
            abs=1e-5,
        )
    assert finished["retrieval_rate"] == finished["after"]["retrieval_rate"]


def test_rows_without_a_ranker_are_what_their_names_say(trained: Trained) -> None:
    """History at the end of all items, and at the end of the K best."""
    world = trained.world
    rows = world.rows()
    world.model.read("retriever", "retriever")
    with torch.no_grad():
        plain = world.model.full_sort_predict(rows)
        lists = {}
        for active in ("masked", "demoted"):
            world.model.read("retriever", active)
            lists[active] = world.model.full_sort_predict(rows)[:, 1:]
    for row, history in enumerate(rows["item_id_list"].tolist()):
        order = sorted(range(1, world.model.n_items), key=lambda i: -float(plain[row, i]))
        fresh = [item for item in order if item not in history]
        found = (lists["masked"][row].argsort(descending=True) + 1).tolist()
        assert found[: len(fresh)] == fresh
        head = order[:K]
        expected = [i for i in head if i not in history] + [i for i in head if i in history]
        found = (lists["demoted"][row].argsort(descending=True) + 1).tolist()
        assert found == expected + order[K:]


# --- mistakes ---
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"set_prob": "median"}, "set_prob is 'median': use mean, geomean, product"),
        ({"neither": "drop"}, "neither is 'drop': use force, resample, skip"),
        ({"labeler": "me"}, "labeler is 'me': use ranker, truth, random, none"),
        ({"set_temperature": 0.0}, "set_temperature is 0.0"),
        ({"beta": -1.0}, "beta is -1.0"),
        ({"preference_dropout_prob": 1.0}, "preference_dropout_prob: a probability"),
    ],
)
def test_wrong_values_are_told_before_training(
    mini: Path, changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError, match=told):
        world_of(mini, **changes)


def test_positions_of_rows_without_targets_are_none() -> None:
    positions = positions_of(torch.tensor([[3, 0]]), torch.tensor([[0, 0]]))
    assert isinstance(positions, Positions)
    assert len(positions.targets) == 0

"""PRIME's final lists: candidates, ranks and metrics against lists written out in full."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from recbole.data.interaction import Interaction
from torch import Tensor

from recbole_mm.model.layers.ranking import ALPHAS
from recbole_mm.model.prime import PRIME
from recbole_mm.stage import StageContext
from tests.model.prime_world import (
    HISTORY,
    METRICS,
    SMALL,
    USERS,
    K,
    Trained,
    World,
    retriever_lists,
    world_of,
)

# --- what is ranked -------------------------------------------------------------------------------


def test_candidates_are_the_retrievers_best_and_the_target_is_never_put_in(
    trained: Trained,
) -> None:
    world = trained.world
    rows = world.rows()
    lists = retriever_lists(world, rows)
    with torch.no_grad():
        found = world.model.candidates(rows, world.model.retriever.full_sort_predict(rows))
    assert found.tolist() == [items[:K] for items in lists]
    hits = (found == rows["item_id"][:, None]).any(dim=1).sum()
    assert 0 < hits < USERS


def test_prompts_show_what_came_before_the_target_and_no_more(world: World) -> None:
    raw = world.raw()
    for phase, left in (("valid", 2), ("test", 1)):
        rows = world.rows(phase)
        histories = [history.tolist() for history in world.model._histories(rows)]
        targets = rows["item_id"].tolist()
        expected = [(items[:-left][-HISTORY:], items[-left]) for items in raw]
        assert sorted(zip(histories, targets, strict=True)) == sorted(expected)


@dataclass
class Naive:
    """The paper's final list, piece by piece: head in the ranker's order, tail as retrieved."""

    lists: list[list[int]]  # all items of each row in the retriever's order
    ranking: Tensor  # the ranker's log-probabilities of the first K. (B, K)
    retrieval: Tensor  # the retriever's log-probabilities. (B, V)

    def final(self, alpha: float) -> list[list[int]]:
        return [self._one(row, items, alpha) for row, items in enumerate(self.lists)]

    def _one(self, row: int, items: list[int], alpha: float) -> list[int]:
        head = items[:K]
        own = self.retrieval[row, head].double()
        score = own if np.isinf(alpha) else self.ranking[row].double() + alpha * own
        order = sorted(range(K), key=lambda place: -float(score[place]))
        return [head[place] for place in order] + items[K:]


@torch.no_grad()
def naive_of(world: World, rows: Interaction) -> Naive:
    model, lists = world.model, retriever_lists(world, rows)
    seen = zip(rows["item_id_list"].numpy(), rows["item_length"].tolist(), strict=True)
    histories = [items[:length][-HISTORY:] for items, length in seen]
    ranking = model.the_ranker().log_probs(histories, np.array([items[:K] for items in lists]))
    retrieval = model.retriever.full_sort_predict(rows).log_softmax(dim=1)
    return Naive(lists, ranking, retrieval)


def metrics_by_hand(lists: list[list[int]], targets: list[int]) -> dict[str, float]:
    """With one target a user."""
    found: dict[str, list[float]] = {}
    for items, target in zip(lists, targets, strict=True):
        rank = items.index(target) + 1
        for k in SMALL["topk"]:
            hit = float(rank <= k)
            values = (hit, hit / rank, hit / np.log2(rank + 1), hit)
            for metric, value in zip(METRICS, values, strict=True):
                found.setdefault(f"{metric}@{k}", []).append(value)
    return {name: float(np.mean(values)) for name, values in found.items()}


READOUTS: list[tuple[str, Callable[[PRIME], float]]] = [
    ("retriever", lambda model: float("inf")),
    ("ranker", lambda model: 0.0),
    ("ranker+fusion", lambda model: model.alphas["retriever"]),
]


@pytest.mark.parametrize("only_hits", [True, False])
@pytest.mark.parametrize(("readout", "alpha"), READOUTS, ids=[name for name, _ in READOUTS])
def test_metrics_are_those_of_complete_lists_of_all_users(
    trained: Trained, readout: str, alpha: Callable[[PRIME], float], only_hits: bool
) -> None:
    world = trained.world
    lists = naive_of(world, world.rows()).final(alpha(world.model))
    expected = metrics_by_hand(lists, world.rows()["item_id"].tolist())
    assert trained.test(readout, only_hits) == pytest.approx(expected, abs=1e-6)


def test_scoring_only_hits_asks_less_and_gives_the_same(trained: Trained) -> None:
    model = trained.world.model
    asked_of = {}
    results = {}
    for only_hits in (True, False):
        model.forget()
        results[only_hits] = trained.test("ranker", only_hits)
        asked_of[only_hits] = len(model._kept)
    assert results[True] == results[False]
    assert 0 < asked_of[True] < asked_of[False] <= USERS  # users may have the same prompt


def test_a_target_that_is_masked_as_a_candidate_is_passed_by_them_all(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An item taken again is no candidate then, and stands behind the K however well it scored."""
    world, model = trained.world, trained.world.model
    monkeypatch.setattr(model, "mask_candidates", True)
    rows = copy(world.rows())
    rows.update(Interaction({"item_id": rows["item_id_list"][:, 0]}))
    model.enter("ranker")
    final = []
    for only_hits in (True, False):
        model.only_hits = only_hits
        with torch.no_grad():
            scores = model.full_sort_predict(rows)
        own = scores.gather(1, rows["item_id"][:, None])
        final.append((scores > own).sum(1))
    assert torch.equal(*final)
    assert (final[0] >= K).all()


def test_only_metrics_of_the_targets_place_allow_that(mini: Path) -> None:
    assert world_of(mini, stages=["retriever"]).model.only_hits
    beyond = world_of(mini, stages=["retriever"], metrics=["Recall", "NDCG", "ItemCoverage"])
    assert not beyond.model.only_hits


def test_a_target_that_was_not_retrieved_keeps_its_rank(trained: Trained) -> None:
    world, model = trained.world, trained.world.model
    rows = world.rows()
    model.only_hits = False
    model.enter("ranker")
    with torch.no_grad():
        final = model.full_sort_predict(rows)
    checked = 0
    for items, scores, target in zip(
        retriever_lists(world, rows), final, rows["item_id"].tolist(), strict=True
    ):
        rank = int((scores[1:] > scores[target]).sum())
        if items.index(target) >= K:
            assert rank == items.index(target)
            checked += 1
        else:
            assert rank < K
    assert checked


def test_alpha_zero_is_the_ranker_and_infinity_the_retriever(trained: Trained) -> None:
    world, model = trained.world, trained.world.model
    rows, kept = world.rows(), model.alphas["retriever"]
    lists = {}
    try:
        for name, alpha in (("fusion", 0.0), ("ranker", 0.0), ("fusion", float("inf"))):
            model.enter(name)
            model.alpha, model.only_hits = alpha, False
            with torch.no_grad():
                order = model.full_sort_predict(rows)[:, 1:].argsort(dim=1, descending=True) + 1
            lists[name, alpha] = order.tolist()
    finally:
        model.alphas["retriever"] = kept
    assert lists["fusion", 0.0] == lists["ranker", 0.0]
    assert lists["fusion", float("inf")] == retriever_lists(world, rows)
    assert lists["ranker", 0.0] != lists["fusion", float("inf")]


def test_one_user_at_a_time_gives_what_all_together_give(trained: Trained) -> None:
    world, model = trained.world, trained.world.model
    rows = world.rows()
    model.only_hits = False
    for active in ("ranker", "fusion"):
        model.enter(active)
        model.forget()
        with torch.no_grad():
            together = model.full_sort_predict(rows)
            candidates = model.candidates(rows, model.retriever.full_sort_predict(rows))
            scores = model.rank(rows, candidates)
        for row in range(0, USERS, 6):
            model.forget()
            one = rows[row : row + 1]
            with torch.no_grad():
                alone = model.full_sort_predict(one)
                single = model.rank(one, candidates[row : row + 1])
            torch.testing.assert_close(single[0], scores[row], atol=1e-5, rtol=0)
            torch.testing.assert_close(alone[0], together[row], atol=1e-5, rtol=0)


def test_predict_is_the_score_of_one_item(trained: Trained) -> None:
    model, rows = trained.world.model, trained.world.rows()
    model.enter("ranker")
    with torch.no_grad():
        scores, one = model.full_sort_predict(rows), model.predict(rows)
    assert torch.equal(one, scores[torch.arange(len(rows)), rows["item_id"]])


def test_scores_are_kept_until_the_weights_change(mini: Path) -> None:
    world = world_of(mini)
    model, rows = world.model, world.rows()
    model.only_hits = False
    model.enter("ranker")
    passes: list[int] = []
    language_model = model.ranker.backbone.family.language_model(model.ranker.backbone.model)
    language_model.register_forward_hook(lambda *_: passes.append(1))
    with torch.no_grad():
        first = model.full_sort_predict(rows)
        once = len(passes)
        model.enter("fusion")
        model.full_sort_predict(rows)
        model.enter("ranker")
        assert torch.equal(model.full_sort_predict(rows), first)
        assert len(passes) == once > 0
        for parameter in language_model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        model.forget()
        assert not torch.equal(model.full_sort_predict(rows), first)
    assert len(passes) == 2 * once


def test_shuffled_candidates_are_scored_in_another_order_and_come_back_in_theirs(
    mini: Path,
) -> None:
    world = world_of(mini, candidate_order="shuffled")
    model, rows = world.model, world.rows()
    with torch.no_grad():
        candidates = model.candidates(rows, model.retriever.full_sort_predict(rows))
        found = model.rank(rows, candidates)
        shown, back = model.in_prompt_order(candidates.numpy())
        assert np.array_equal(np.take_along_axis(shown, back, axis=1), candidates.numpy())
        assert (shown != candidates.numpy()).any(axis=1).mean() > 0.9
        scored = model.the_ranker().log_probs(model._histories(rows), shown)
    for row in range(USERS):
        of_item = dict(zip(shown[row].tolist(), scored[row].tolist(), strict=True))
        expected = [of_item[item] for item in candidates[row].tolist()]
        assert found[row].tolist() == pytest.approx(expected, abs=1e-5)
    again, _ = world_of(mini, candidate_order="shuffled").model.in_prompt_order(candidates.numpy())
    assert np.array_equal(again, shown)


def test_history_can_be_kept_out_of_the_candidates(mini: Path) -> None:
    masked = world_of(mini, candidate_mask_history=True)
    rows = masked.rows()
    with torch.no_grad():
        found = masked.model.candidates(rows, masked.model.retriever.full_sort_predict(rows))
    for items, history, best in zip(
        found.tolist(), rows["item_id_list"].tolist(), retriever_lists(masked, rows), strict=True
    ):
        assert items == [item for item in best if item not in history][:K]


# --- validation and fusion ------------------------------------------------------------------------


def context_of(world: World, tmp_path: Path) -> StageContext:
    return StageContext(world.rows("valid"), tmp_path, 2020, torch.device("cpu"))


def test_validation_asks_about_users_whose_target_was_retrieved(
    trained: Trained, mini: Path, tmp_path: Path
) -> None:
    world = trained.world
    rows = world.rows("valid")
    targets = rows["item_id"].tolist()
    lists = retriever_lists(world, rows)
    hits = [row for row in range(USERS) if targets[row] in lists[row][:K]]
    stage = world.stage()
    found = stage.valid_rows(context_of(world, tmp_path))
    assert found is not None
    assert found.tolist() == hits
    few = world_of(mini, ranker_valid_users=2)
    few.model.load_state_dict(world.model.state_dict())
    sample = few.stage().valid_rows(context_of(few, tmp_path))
    assert sample is not None
    assert len(sample) == 2
    assert set(sample.tolist()) <= set(hits)
    again = few.stage().valid_rows(context_of(few, tmp_path))
    assert torch.equal(again, sample)


def test_the_chosen_alpha_is_the_best_on_validation_and_is_stored(trained: Trained) -> None:
    world, model = trained.world, trained.world.model
    rows = world.rows("valid")
    targets = rows["item_id"].tolist()
    finished = trained.run.stage("ranker")["finished"]
    assert float(finished["fusion_alpha"]) == model.alphas["retriever"]
    naive = naive_of(world, rows)
    hits = [row for row in range(USERS) if targets[row] in naive.lists[row][:K]]
    assert finished["validation_hits"] == len(hits)
    values = {}
    for alpha in ALPHAS:
        lists = naive.final(alpha)
        found = metrics_by_hand([lists[row] for row in hits], [targets[row] for row in hits])
        values[alpha] = found["ndcg@10"]
        assert finished["hits_ndcg@10"][str(alpha)] == pytest.approx(values[alpha], abs=1e-5)
    best = max(values.values())
    assert model.alphas["retriever"] == max(a for a, value in values.items() if value > best - 1e-9)


def test_a_finished_stage_restores_its_alpha(world: World) -> None:
    kept = world.model.alpha
    try:
        for text, alpha in (("0.2", 0.2), ("inf", float("inf"))):
            world.stage().restore({"fusion_alpha": text})
            assert world.model.alpha == alpha
    finally:
        world.model.alpha = kept


@pytest.mark.parametrize(("fusion", "chosen"), [("none", "ranker"), ("valid", "ranker+fusion")])
def test_all_rows_are_read_out_and_the_configured_one_is_the_result(
    mini: Path, fusion: str, chosen: str
) -> None:
    model = world_of(mini, fusion=fusion).model
    rows = model.readouts("ranker")
    always = ["retriever", "retriever masked", "demoted history", "ranker", "ranker+fusion"]
    assert [row.name for row in rows] == always
    assert [row.name for row in rows if row.chosen] == [chosen]
    rows = model.readouts("preference")
    assert [row.name for row in rows] == [*always, "preference", "preference+fusion"]
    assert [row.name for row in rows if row.chosen] == [chosen.replace("ranker", "preference")]
    (only,) = model.readouts("retriever")
    assert only.chosen

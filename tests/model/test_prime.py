"""PRIME on a small generated shop: what it trains on, what it ranks, and that ranks are exact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recbole.data.interaction import Interaction
from safetensors.torch import load_file, save_file
from torch import Tensor

from recbole_mm.config import MMConfig
from recbole_mm.data.demo import Sizes, make_demo
from recbole_mm.errors import UserError
from recbole_mm.model.layers.ranker_stage import RankerStage
from recbole_mm.model.layers.ranking import ALPHAS
from recbole_mm.model.prime import PRIME
from recbole_mm.quick_start import Data, build_model, prepare_data
from recbole_mm.stage import StageContext
from recbole_mm.trainer.run import Run
from recbole_mm.trainer.settings import stage_settings
from recbole_mm.trainer.staged import StagedTrainer
from tests.backbone.conftest import saved_folder  # noqa: F401 (a fixture)

K, HISTORY, USERS = 8, 3, 30
SMALL = {
    "backbone": "tiny",
    "n_candidates": K,
    "max_history_items": HISTORY,
    "epochs": 3,
    "train_batch_size": 8,
    "hidden_size": 16,
    "inner_size": 16,
    "dropout_prob": 0.0,
    "attn_dropout_prob": 0.0,
    "topk": [1, 5, 10, 20],
    "retriever_valid_metric": "Recall@20",
    "ranker_max_steps": 2,
    "ranker_warmup_steps": 0,
    "ranker_batch_size": 8,
    "ranker_valid_users": 0,
    "show_progress": False,
}
METRICS = ("recall", "mrr", "ndcg", "hit")


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the dataset `mini`: 30 users, 48 products."""
    root = tmp_path_factory.mktemp("data")
    make_demo(root / "mini", sizes=Sizes(users=USERS, shelves=6, items_a_shelf=8))
    return root


@dataclass
class World:
    """A model and all it was made of."""

    config: MMConfig
    data: Data
    model: PRIME

    def stage(self) -> RankerStage:
        """A ranker stage, prepared as the trainer does."""
        settings = stage_settings(self.config, PRIME.stage_names)
        stage: Any = self.model.make_stages(settings, self.data.train._dataset)[1]
        return stage

    def rows(self, phase: str = "test") -> Interaction:
        """All rows of a phase: history and target."""
        return getattr(self.data, phase)._dataset.inter_feat

    def raw(self) -> list[list[int]]:
        """Every user's items from the file, oldest first."""
        dataset = self.data.dataset
        path = Path(self.config["data_path"]) / "mini.inter"
        users: dict[str, list[tuple[float, int]]] = {}
        for line in path.read_text().splitlines()[1:]:
            user, item, time = line.split("\t")
            item_id = int(dataset.token2id(dataset.iid_field, item))
            users.setdefault(user, []).append((float(time), item_id))
        return [[item for _, item in sorted(rows)] for rows in users.values()]


def world_of(mini: Path, **changes: Any) -> World:
    """An untrained model; every call gives the same weights."""
    config = MMConfig(
        "PRIME", "mini", (), {**SMALL, "data_path": str(mini), "cache_dir": str(mini), **changes}
    )
    data = prepare_data(config)
    model = build_model(config, data)
    model.eval()
    return World(config, data, model)


@pytest.fixture(scope="module")
def world(mini: Path) -> World:
    """Untrained; tests leave its weights alone."""
    return world_of(mini)


@dataclass
class Trained:
    world: World
    trainer: StagedTrainer
    run: Run

    def test(self, readout: str, only_hits: bool = True) -> dict[str, float]:
        """The test metrics of one row of the result."""
        model = self.world.model
        model.only_hits = only_hits
        next(r for r in model.readouts("ranker") if r.name == readout).use()
        return self.trainer.evaluate(self.world.data.test, load_best_model=False)


@pytest.fixture(scope="module")
def trained(mini: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Both stages trained a little, through the trainer."""
    world = world_of(mini)
    saved = tmp_path_factory.mktemp("saved")
    run = Run.start(saved, world.config)
    trainer = StagedTrainer(world.config, world.model, run)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(saved)  # RecBole writes its event files below the working directory
        trainer.fit(world.data.train, world.data.valid, world.data.test)
    return Trained(world, trainer, run)


def retriever_lists(world: World, rows: Interaction) -> list[list[int]]:
    """All items of each row in the retriever's order."""
    with torch.no_grad():
        scores = world.model.retriever.eval().full_sort_predict(rows)
    items = range(1, world.model.n_items)
    return [sorted(items, key=lambda item, row=row: -row[item]) for row in scores]


# --- training samples -----------------------------------------------------------------------------


def test_samples_are_of_training_items_alone(world: World) -> None:
    """From each user's items but the last two: one sample, or the prefixes of 5 to n items."""
    expected = []
    for items in world.raw():
        known = items[:-2]
        for cut in [len(known)] if len(known) < 5 else range(5, len(known) + 1):
            expected.append((known[: cut - 1][-HISTORY:], known[cut - 1]))
    samples = world.stage().samples
    found = [
        (samples.history(row, HISTORY).tolist(), int(samples.labels(np.array([row]))[0]))
        for row in range(len(samples))
    ]
    assert sorted(found) == sorted(expected)


def test_popularity_counts_training_items_alone(world: World) -> None:
    counts = np.zeros(world.model.n_items)
    for items in world.raw():
        np.add.at(counts, items[:-2], 1)
    assert counts.sum() < sum(map(len, world.raw()))
    assert np.array_equal(world.stage().sampler._weights, 1.0 + counts)


def asked(world: World, stage: RankerStage, epoch: int, number: int) -> list[Any]:
    """What the ranker is asked in one entry of the plan: histories, candidates, places."""
    seen: list[Any] = []

    class Listener(torch.nn.Module):
        def loss(self, histories: Any, candidates: Any, places: Any) -> Tensor:
            seen.extend([[h.tolist() for h in histories], candidates.tolist(), places.tolist()])
            return torch.zeros(())

    own, stage.ranker = stage.ranker, Listener()
    try:
        stage.loss(stage.plan(epoch)[number])
    finally:
        stage.ranker = own
    return seen


@pytest.mark.parametrize("source", ["popularity", "uniform", "retriever", "mixed"])
def test_what_is_asked_depends_on_seed_epoch_and_place_alone(mini: Path, source: str) -> None:
    world, again = world_of(mini, neg_source=source), world_of(mini, neg_source=source)
    stage = world.stage()
    first = asked(world, stage, epoch=2, number=1)
    torch.manual_seed(77)
    np.random.seed(77)
    asked(world, stage, epoch=0, number=0)
    assert asked(world, stage, epoch=2, number=1) == first
    assert asked(again, again.stage(), epoch=2, number=1) == first
    assert asked(world, stage, epoch=3, number=1) != first
    other = world_of(mini, neg_source=source, seed=7)
    assert asked(other, other.stage(), epoch=2, number=1) != first


@pytest.mark.parametrize("source", ["popularity", "mixed"])
def test_labels_stand_among_distinct_candidates_after_their_own_history(
    mini: Path, source: str
) -> None:
    world = world_of(mini, neg_source=source)
    stage = world.stage()
    known = [items[:-2] for items in world.raw()]
    entries = [asked(world, stage, 0, number) for number in range(len(stage.plan(0)))]
    total = 0
    for histories, candidates, places in entries:
        for history, items, place in zip(histories, candidates, places, strict=True):
            assert len(set(items)) == K
            assert 0 not in items
            whole = [*history, items[place]]
            assert any(
                whole == user[i : i + len(whole)] for user in known for i in range(len(user))
            )
            total += 1
    assert total == len(stage.samples)
    assert len({place for _, _, places in entries for place in places}) > 1


def test_an_epoch_takes_every_sample_once(world: World) -> None:
    stage = world.stage()
    for epoch in range(2):
        rows = np.concatenate([entry.samples for entry in stage.plan(epoch)])
        assert sorted(rows.tolist()) == list(range(len(stage.samples)))


def test_retriever_negatives_are_its_best_after_the_history(mini: Path) -> None:
    world = world_of(mini, neg_source="retriever")
    stage = world.stage()
    (histories, candidates, places) = asked(world, stage, 0, 0)
    sample = stage.plan(0)[0].samples[0]
    whole = stage.samples.history(int(sample), 50)
    row = Interaction(
        {
            "item_id_list": torch.zeros(1, 50, dtype=torch.int64),
            "item_length": torch.tensor([len(whole)]),
        }
    )
    row["item_id_list"][0, : len(whole)] = torch.from_numpy(whole)
    label = candidates[0][places[0]]
    best = [item for item in retriever_lists(world, row)[0] if item != label][: K - 1]
    assert set(candidates[0]) == {label, *best}
    assert histories[0] == whole[-HISTORY:].tolist()


def test_it_overfits_a_handful_of_prompts(mini: Path) -> None:
    """The same prompts again and again: down from chance."""
    world = world_of(mini)
    stage = world.stage()
    entry = stage.plan(0)[0]
    optimizer = torch.optim.AdamW(stage.param_groups(), lr=1e-3)
    losses = []
    for _ in range(20):
        stage.module.train()
        optimizer.zero_grad()
        loss = stage.loss(entry)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(np.log(K), abs=1.0)
    assert losses[-1] < 0.3 * losses[0]


def test_a_step_changes_every_weight_of_the_ranker_and_none_of_the_retriever(mini: Path) -> None:
    world = world_of(mini)
    stage = world.stage()
    before = {name: p.detach().clone() for name, p in world.model.named_parameters()}
    stage.module.train()
    optimizer = torch.optim.AdamW(stage.param_groups(), lr=1e-3)
    stage.loss(stage.plan(0)[0]).backward()
    optimizer.step()
    for name, parameter in world.model.named_parameters():
        changed = not torch.equal(parameter, before[name])
        assert changed == name.startswith("ranker."), name


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
    ("ranker+fusion", lambda model: model.alpha),
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
    assert 0 < asked_of[True] < asked_of[False] == USERS


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
    rows, kept = world.rows(), model.alpha
    lists = {}
    try:
        for name, alpha in (("fusion", 0.0), ("ranker", 0.0), ("fusion", float("inf"))):
            model.alpha, model.only_hits = alpha, False
            model.enter(name)
            with torch.no_grad():
                order = model.full_sort_predict(rows)[:, 1:].argsort(dim=1, descending=True) + 1
            lists[name, alpha] = order.tolist()
    finally:
        model.alpha = kept
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
        shown, back = model._in_prompt_order(candidates.numpy())
        assert np.array_equal(np.take_along_axis(shown, back, axis=1), candidates.numpy())
        assert (shown != candidates.numpy()).any(axis=1).mean() > 0.9
        scored = model.the_ranker().log_probs(model._histories(rows), shown)
    for row in range(USERS):
        of_item = dict(zip(shown[row].tolist(), scored[row].tolist(), strict=True))
        expected = [of_item[item] for item in candidates[row].tolist()]
        assert found[row].tolist() == pytest.approx(expected, abs=1e-5)
    again, _ = world_of(mini, candidate_order="shuffled").model._in_prompt_order(candidates.numpy())
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
    assert float(finished["fusion_alpha"]) == model.alpha
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
    assert model.alpha == max(a for a, value in values.items() if value > best - 1e-9)


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
    assert [row.name for row in rows] == ["retriever", "ranker", "ranker+fusion"]
    assert [row.name for row in rows if row.chosen] == [chosen]
    (only,) = model.readouts("retriever")
    assert only.chosen


# --- what is saved --------------------------------------------------------------------------------


def test_a_tiny_ranker_is_saved_whole_and_restored(trained: Trained, mini: Path) -> None:
    fresh = world_of(mini)
    rows = fresh.rows()
    fresh.model.retriever.load_state_dict(trained.world.model.retriever.state_dict())
    state = trained.world.stage().state()
    names = {name for name, _ in trained.world.model.ranker.named_parameters()}
    assert set(state) == names | {"tokenizer_fingerprint"}
    scores = []
    for world in (trained.world, fresh):
        if world is fresh:
            world.stage().load_state(state)
        world.model.only_hits = False
        world.model.enter("ranker")
        with torch.no_grad():
            scores.append(world.model.full_sort_predict(rows))
    assert torch.equal(*scores)


def adapted(mini: Path, folder: Path, **changes: Any) -> World:
    return world_of(
        mini,
        backbone=str(folder),
        attributes=["image", "title"],
        instruction="Next?",
        max_attr_tokens=4,
        max_pixels=3136,
        ranker_batch_size=2,
        **changes,
    )


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_a_checkpoint_holds_adapters_alone_and_restores_the_scores(
    mini: Path,
    saved_folder: Path,  # noqa: F811
    tmp_path: Path,
    quantize: str,
) -> None:
    torch.manual_seed(0)
    world = adapted(mini, saved_folder, quantize=quantize)
    stage = world.stage()
    optimizer = torch.optim.AdamW(stage.param_groups(), lr=1e-2)
    for entry in stage.plan(0)[:2]:
        optimizer.zero_grad()
        stage.loss(entry).backward()
        optimizer.step()
    state = stage.state()
    mark = state["tokenizer_fingerprint"]
    assert mark.shape == (32,)
    assert mark.dtype == torch.uint8
    trained_names = {name for name, p in world.model.ranker.named_parameters() if p.requires_grad}
    assert set(state) - {"tokenizer_fingerprint"} == trained_names
    assert all("lora_" in name for name in trained_names)
    save_file(state, tmp_path / "model.safetensors")

    def scores(of: World) -> Tensor:
        of.model.eval()
        of.model.forget()
        rows = of.rows()[:6]
        candidates = torch.arange(1, K + 1).repeat(6, 1)
        return of.model.rank(rows, candidates)

    expected = scores(world)
    fresh = adapted(mini, saved_folder, quantize=quantize)
    assert (scores(fresh) - expected).abs().max() > 1e-3
    fresh.stage().load_state(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(scores(fresh), expected)


def test_checkpoints_of_others_are_the_users_mistake(
    mini: Path,
    world: World,
    saved_folder: Path,  # noqa: F811
) -> None:
    stage = adapted(mini, saved_folder).stage()
    with pytest.raises(UserError, match="another tokenizer"):
        stage.load_state(world.stage().state())
    with pytest.raises(UserError, match="does not fit this backbone"):
        stage.load_state(adapted(mini, saved_folder, lora_r=2).stage().state())
    state = stage.state()
    state.pop("tokenizer_fingerprint")
    with pytest.raises(UserError, match="another tokenizer"):
        stage.load_state(state)


def test_vectors_do_not_decay(world: World) -> None:
    stage = world.stage()
    decayed, kept = stage.param_groups()
    assert kept["weight_decay"] == 0.0
    assert all(p.ndim == 1 for p in kept["params"])
    assert all(p.ndim > 1 for p in decayed["params"])
    total = sum(1 for p in stage.module.parameters() if p.requires_grad)
    assert len(decayed["params"]) + len(kept["params"]) == total


# --- mistakes of the user -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"n_candidates": 27}, "between 2 and 26"),
        ({"n_candidates": 1}, "between 2 and 26"),
        ({"n_candidates": 500}, r"n_candidates is 500, but the dataset has \d+ items"),
        ({"fusion": "always"}, "none or valid"),
        ({"candidate_order": "random"}, "retriever or shuffled"),
        ({"supervise": "all"}, "letter or letter_eos"),
        ({"attributes": ["colour", "weight"]}, "reads colour, weight"),
        ({"backbone": "qwen9"}, "no backbone 'qwen9'"),
        ({"min_pixels": 5}, "pixel budget"),
    ],
)
def test_wrong_values_are_one_sentence(mini: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        world_of(mini, **changes)


def test_a_retriever_alone_needs_no_backbone(mini: Path) -> None:
    world = world_of(mini, stages=["retriever"], backbone="qwen2-vl-2b")
    assert world.model.ranker is None
    assert world.model.backbone_name is None
    with pytest.raises(UserError, match="add ranker to stages"):
        world.model.the_ranker()
    scores = world.model.full_sort_predict(world.rows())
    assert torch.equal(scores, world.model.retriever.full_sort_predict(world.rows()))


def test_attributes_the_dataset_lacks_are_left_out(mini: Path) -> None:
    world = world_of(mini, attributes=["title", "colour", "image"])
    assert world.model.ranker.writer.style.attributes == ("title", "image")

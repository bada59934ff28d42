"""PRIME: what its ranker trains on, what is saved of it, and mistakes in its keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recbole.data.interaction import Interaction
from safetensors.torch import load_file, save_file
from torch import Tensor

from recbole_mm.data.demo import Sizes, make_demo
from recbole_mm.errors import UserError
from recbole_mm.model.layers.ranker_stage import RankerStage
from recbole_mm.stage import StageContext, UnfitWeightsError
from tests.backbone.conftest import saved_folder  # noqa: F401 (a fixture)
from tests.model.prime_world import (
    HISTORY,
    K,
    Trained,
    World,
    retriever_lists,
    world_of,
)

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


def test_a_frozen_tower_has_seen_every_picture_before_training(
    mini: Path,
    saved_folder: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    world = adapted(mini, saved_folder, cache_dir=str(tmp_path))
    stage, backbone = world.stage(), world.model.ranker.backbone
    passes: list[int] = []
    tower = backbone.family.vision_tower(backbone.model)
    tower.register_forward_hook(lambda *_: passes.append(1))
    context = StageContext(world.rows("valid"), tmp_path, 0, torch.device("cpu"))
    stage.prepare(context)
    assert len(passes) == 1  # all pictures of the small shop together
    stage.loss(stage.plan(0)[0]).backward()
    world.model.eval()
    world.model.rank(world.rows()[:3], torch.arange(1, K + 1).repeat(3, 1))
    assert len(passes) == 1
    fresh = adapted(mini, saved_folder, cache_dir=str(tmp_path))
    again = fresh.model.ranker.backbone
    again.family.vision_tower(again.model).register_forward_hook(lambda *_: passes.append(1))
    fresh.stage().prepare(context)
    assert len(passes) == 1


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
    with pytest.raises(UnfitWeightsError, match="another tokenizer"):
        stage.load_state(world.stage().state())
    with pytest.raises(UnfitWeightsError, match="do not fit this backbone"):
        stage.load_state(adapted(mini, saved_folder, lora_r=2).stage().state())
    state = stage.state()
    state.pop("tokenizer_fingerprint")
    with pytest.raises(UnfitWeightsError, match="another tokenizer"):
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
        ({"n_candidates": 500}, "between 2 and 26"),
        ({"fusion": "always"}, "use none, valid"),
        ({"candidate_order": "random"}, "use retriever, shuffled"),
        ({"supervise": "all"}, "use letter, letter_eos"),
        ({"attributes": ["colour", "weight"]}, "reads colour, weight"),
        ({"attributes": []}, "reads nothing"),
        ({"backbone": "qwen9"}, "no backbone 'qwen9'"),
        ({"min_pixels": 5}, "pixel budget"),
        ({"backbone": "tiny-llama"}, r"backbone 'tiny-llama' reads text alone: set attributes to"),
        ({"backbone": "tiny-llava", "max_pixels": 3135}, "56 x 56 pixels: set max_pixels to 3136"),
        ({"image_pooling": "mean"}, "image_pooling is 'mean': it is one of all, cls"),
    ],
)
def test_wrong_values_are_one_sentence(mini: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        world_of(mini, **changes)


def test_more_candidates_than_items(tmp_path: Path) -> None:
    shop = Sizes(12, (6, 6), aisles=1, shelves=4, staples=1, novelties=1, trials=1)
    make_demo(tmp_path / "mini", sizes=shop)
    with pytest.raises(UserError, match=r"n_candidates is 26, but the dataset has 2\d items"):
        world_of(tmp_path, n_candidates=26)


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

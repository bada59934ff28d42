"""MLLM-MSR on weights from a folder, plain and in 4 bits, and on a dataset without pictures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from recbole_mm.errors import UserError
from tests.backbone.families import family_backbone
from tests.model.msr_world import MsrWorld, msr_world

LANGUAGE = "backbone.model.model.language_model.layers."


@pytest.fixture(scope="module")
def folder(mini: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the hub's: weights and tokenizer of a tiny LLaVA-1.6."""
    path = tmp_path_factory.mktemp("llava-next")
    backbone: Any = msr_world(mini).model.scorer.backbone
    backbone.model.save_pretrained(path)
    backbone.tokenizer.save_pretrained(path)
    return path


def adapted(mini: Path, folder: Path, cache: Path, **changes: Any) -> MsrWorld:
    keys = {"max_pixels": 3136, "text_backbone": "tiny", "cache_dir": str(cache), **changes}
    return msr_world(mini, backbone=str(folder), sft_learning_rate=1e-2, **keys)


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_adapters_on_the_language_model_alone_are_trained_and_kept(
    mini: Path, folder: Path, tmp_path: Path, quantize: str
) -> None:
    world = adapted(mini, folder, tmp_path, quantize=quantize, text_backbone=str(folder))
    assert world.model.summaries.speaker.source.spec.quantize == quantize
    scorer = world.model.scorer
    assert scorer.backbone.family.placeholder == "<image>"
    assert not scorer.backbone.trains_vision
    context = world.context(tmp_path)
    stages = world.stages()
    for stage in stages:
        stage.prepare(context)
        if stage.name == "user_summary":  # made by weights of as many bits
            kinds = {type(m).__name__ for m in world.model.summaries.speaker.source.get().modules()}
            assert ("Linear4bit" in kinds) == (quantize == "nf4")
            assert all(world.model.summaries.preferences.values())
    assert list(tmp_path.glob("vision-*")), "pictures are encoded once, before training"
    sft = stages[2]
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(sft.param_groups(), lr=1e-2)
    for _ in range(2):  # one half of an adapter is zero at first
        optimizer.zero_grad()
        sft.loss(sft.plan(0)[0]).backward()
        optimizer.step()
    state = sft.state()
    trained = {name for name, p in scorer.named_parameters() if p.requires_grad}
    assert {*state} - {"tokenizer_fingerprint"} == trained
    assert all(name.startswith(LANGUAGE) and "lora_" in name for name in trained)
    save_file(state, tmp_path / "model.safetensors")

    def scores(of: MsrWorld) -> torch.Tensor:
        of.model.eval()
        of.model.forget()
        items = torch.arange(1, 7).expand(3, -1)
        return of.model.candidate_scores(of.rows()[:3], items)

    expected = scores(world)
    fresh = adapted(mini, folder, tmp_path, quantize=quantize, text_backbone=str(folder))
    fresh.model.summaries.preferences |= world.model.summaries.preferences
    assert (scores(fresh) - expected).abs().max() > 1e-2
    fresh.stages()[2].load_state(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(scores(fresh), expected)


def test_a_dataset_without_pictures(mini: Path, tmp_path: Path) -> None:
    """Items are described by their words and shown as none; it trains and ranks."""
    shop = tmp_path / "mini"
    shutil.copytree(mini / "mini", shop, ignore=shutil.ignore_patterns("images", "*.image"))
    world = msr_world(tmp_path)
    model = world.model
    for stage in world.stages():
        stage.prepare(world.context(tmp_path))
    summaries = model.summaries
    assert not summaries.pictured
    assert summaries.descriptions == {i: summaries.titles[i] for i in range(1, model.n_items)}
    prompt = model.prompt((1, 2), 3)
    assert not prompt.slots
    assert "Its picture: none" in model.scorer.backbone.tokenizer.decode(prompt.ids)
    sft = world.stages()[2]
    sft.loss(sft.plan(0)[0]).backward()
    assert model.full_sort_predict(world.rows()[:2])[:, 1:].isfinite().all()


def test_a_broken_picture_is_none(mini: Path, tmp_path: Path) -> None:
    """Its item is described by its words and shown as none; others are as before."""
    shop = tmp_path / "mini"
    shutil.copytree(mini / "mini", shop)
    plain = msr_world(mini, item_text="image")
    broken, other = 3, 5
    path = plain.model.scorer.images._source(broken)
    assert path is not None
    here = shop / path.relative_to((mini / "mini").resolve())
    here.write_bytes(path.read_bytes()[:-200])  # its header is whole
    world = msr_world(tmp_path, item_text="image")
    model = world.model
    world.stages()[0].prepare(world.context(tmp_path))
    plain.stages()[0].prepare(plain.context(tmp_path / "plain"))
    summaries = model.summaries
    assert summaries.descriptions[broken] == summaries.titles[broken]
    assert plain.model.summaries.descriptions[broken] != summaries.titles[broken]
    assert summaries.descriptions[other] == plain.model.summaries.descriptions[other]
    about = world.stages()[0].finish(world.context(tmp_path))
    assert about["without_picture"] == 1
    prompt = model.prompt((1, 2), broken)
    assert not prompt.slots
    assert "Its picture: none" in model.scorer.backbone.tokenizer.decode(prompt.ids)


def test_a_text_backbone_without_a_chat_template_is_told_at_once(
    mini: Path, tmp_path: Path
) -> None:
    """Its weights are not even there: nothing but its tokenizer is read."""
    chat: Any = family_backbone("chat_lm")
    chat.tokenizer.save_pretrained(tmp_path)
    chat.model.config.save_pretrained(tmp_path)
    for file in tmp_path.glob("chat_template*"):
        file.unlink()
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(
        UserError, match=rf"^The tokenizer of {tmp_path} has no chat template: take"
    ):
        msr_world(mini, text_backbone=str(tmp_path))
    assert msr_world(mini, text_backbone=str(tmp_path), pref_mode="none")  # which needs none

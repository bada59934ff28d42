"""Weights of every family from a local folder: real NF4 and LoRA on its language model alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from recbole_mm.backbone.load import Backbone, load_backbone
from recbole_mm.errors import UserError
from tests.backbone.families import SEEING, family_backbone
from tests.backbone.shop import CANDIDATES, HISTORIES, PLACES, ranker_of, spec_of

LANGUAGE = {
    "qwen2_5_vl": "model.language_model.",
    "llava": "model.language_model.",
    "llava_next": "model.language_model.",
    "idefics3": "model.text_model.",
    "causal_lm": "model.",
}
LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(scope="module", params=LANGUAGE)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A family's name and a folder as the hub's."""
    folder = tmp_path_factory.mktemp(request.param)
    backbone: Any = family_backbone(request.param, seed=3)
    backbone.model.save_pretrained(folder)
    backbone.tokenizer.save_pretrained(folder)
    return request.param, folder


def loaded(saved: tuple[str, Path], **changes: Any) -> Backbone:
    name, folder = saved
    sizes = {key: value for key, value in SEEING.get(name, {}).items() if key != "tiny"}
    spec = spec_of(family=name, is_tiny=False, model=str(folder), **sizes, **changes)
    return load_backbone(spec, [], [], seed=0)


def test_a_folder_gives_the_model_that_was_saved_there(saved: tuple[str, Path]) -> None:
    expected = ranker_of(family_backbone(saved[0], seed=3)).log_probs(HISTORIES, CANDIDATES)
    backbone = loaded(saved, dtype="float32")
    found = ranker_of(backbone.eval()).log_probs(HISTORIES, CANDIDATES)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_four_bits_and_adapters_are_of_the_language_model_alone(saved: tuple[str, Path]) -> None:
    from bitsandbytes.nn import Linear4bit

    backbone = loaded(saved, quantize="nf4", lora_r=2)
    model: Any = backbone.model
    language = LANGUAGE[saved[0]]
    packed = {n for n, m in model.named_modules() if isinstance(m, Linear4bit)}
    assert len(packed) == 2 * len(LINEARS)
    assert {name.removesuffix(".base_layer").rpartition(".")[2] for name in packed} == LINEARS
    assert all(name.startswith(f"{language}layers.") for name in packed)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(packed)
    assert all(name.startswith(f"{language}layers.") and "lora_" in name for name in trained)
    others = [p for n, p in model.named_parameters() if not n.startswith(language)]
    assert all(p.dtype == torch.bfloat16 for p in others)
    assert type(backbone.head) is nn.Linear
    assert not backbone.trains_vision


def test_a_step_on_four_bits_moves_the_adapters_alone(saved: tuple[str, Path]) -> None:
    torch.manual_seed(0)
    ranker = ranker_of(loaded(saved, quantize="nf4")).train()
    before = {name: p.detach().clone() for name, p in ranker.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in ranker.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):  # B is zero at first: the first step moves B alone, the second A as well
        optimizer.zero_grad()
        ranker.loss(HISTORIES, CANDIDATES, PLACES).backward()
        optimizer.step()
    for name, parameter in ranker.named_parameters():
        assert torch.equal(parameter, before[name]) == ("lora_" not in name), name


def test_adapters_on_linears_by_name(saved: tuple[str, Path]) -> None:
    backbone = loaded(saved, lora_targets=["q_proj", "v_proj"])
    trained = [n for n, p in backbone.model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 2
    assert all("q_proj" in name or "v_proj" in name for name in trained)
    for wrong in (["q_proj", "fc1"], ["query"], []):
        with pytest.raises(UserError, match=r"lora_targets: .*all or some of down_proj, gate_proj"):
            loaded(saved, lora_targets=wrong)


def test_a_frozen_towers_rows_are_kept_by_pooling(saved: tuple[str, Path], tmp_path: Path) -> None:
    logs = [loaded(saved, image_pooling=way).vision_log(tmp_path) for way in ("all", "cls")]
    if saved[0] == "causal_lm":
        assert logs == [None, None]
    else:
        assert len({log.folder for log in logs if log is not None}) == 2

"""The real bitsandbytes NF4 and peft LoRA, on a tiny Qwen2-VL read from a local folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from recbole_mm.backbone.load import Backbone, BackboneSpec, load_backbone
from recbole_mm.backbone.ranker import LetterRanker
from recbole_mm.errors import UserError
from recbole_mm.paths import properties_dir
from tests.backbone.shop import CANDIDATES, HISTORIES, PLACES, backbone_of, ranker_of, spec_of
from tests.conftest import REPO

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LAYERS = 2


def folder_backbone(folder: Path, **changes: Any) -> Backbone:
    return load_backbone(spec_of(is_tiny=False, model=str(folder), **changes), [], [], seed=0)


@pytest.fixture(scope="module", params=["none", "nf4"])
def quantize(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def adapters_of(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if "lora_" in name}


# --- a local folder -------------------------------------------------------------------------------


def test_a_local_folder_gives_the_model_that_was_saved_there(saved_folder: Path) -> None:
    """Adapters start at zero: the scores are the saved model's."""
    saved = backbone_of(seed=3)
    loaded = folder_backbone(saved_folder, dtype="float32")
    assert loaded.tokenizer_fingerprint == saved.tokenizer_fingerprint
    expected = ranker_of(saved).eval().log_probs(HISTORIES, CANDIDATES)
    found = ranker_of(loaded).eval().log_probs(HISTORIES, CANDIDATES)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_lora_rank_zero_trains_all_weights(saved_folder: Path) -> None:
    backbone = folder_backbone(saved_folder, dtype="float32", lora_r=0)
    assert all(p.requires_grad for p in backbone.model.parameters())
    assert backbone.trains_vision
    assert adapters_of(backbone) == {}


def test_quantised_weights_cannot_be_trained(saved_folder: Path) -> None:
    with pytest.raises(UserError, match="lora_r is 0"):
        folder_backbone(saved_folder, quantize="nf4", lora_r=0)


# --- what is adapted, what is quantised -----------------------------------------------------------


def test_every_language_linear_is_adapted_and_nothing_else(
    saved_folder: Path, quantize: str
) -> None:
    backbone = folder_backbone(saved_folder, quantize=quantize, lora_r=3)
    found = sorted(
        name for name in adapters_of(backbone.model) if name.endswith("A.default.weight")
    )
    assert len(found) == len(LINEARS) * LAYERS
    for layer in range(LAYERS):
        for linear in LINEARS:
            owned = [name for name in found if f"layers.{layer}." in name and linear in name]
            assert len(owned) == 1
    for name, parameter in adapters_of(backbone.model).items():
        assert name.startswith("model.language_model.layers."), name
        assert parameter.dtype == torch.float32
        assert 3 in parameter.shape
    trained = {name for name, p in backbone.model.named_parameters() if p.requires_grad}
    assert trained == set(adapters_of(backbone.model))
    assert not backbone.trains_vision


def test_every_language_linear_is_in_four_bits_and_nothing_else(saved_folder: Path) -> None:
    from bitsandbytes.nn import Linear4bit

    backbone = folder_backbone(saved_folder, quantize="nf4")
    model: Any = backbone.model
    packed = {n: m for n, m in model.named_modules() if isinstance(m, Linear4bit)}
    bases = {name.removesuffix(".base_layer") for name in packed}
    assert {name.rsplit(".", 1)[1] for name in bases} == set(LINEARS)
    for name, module in packed.items():
        assert name.startswith("model.language_model.layers."), name
        assert module.weight.dtype == torch.uint8
        assert module.weight.quant_type == "nf4"
        assert module.weight.quant_state.nested  # double quantisation
        rows, columns = module.out_features, module.in_features
        assert module.weight.numel() == rows * columns // 2
    for part in (model.model.visual, model.lm_head, model.get_input_embeddings()):
        assert not any(isinstance(m, Linear4bit) for m in part.modules())
        assert all(p.dtype == torch.bfloat16 for p in part.parameters())
    assert type(model.lm_head) is nn.Linear


def test_four_bits_are_near_the_full_weights(saved_folder: Path) -> None:
    scores = [
        ranker_of(folder_backbone(saved_folder, quantize=quantize, dtype="float32"))
        .eval()
        .log_probs(HISTORIES, CANDIDATES)
        for quantize in ("none", "nf4")
    ]
    difference = (scores[0] - scores[1]).abs()
    assert difference.max() > 1e-3
    assert difference.mean() < 0.5 * scores[0].std()


def test_same_seed_same_adapters_and_the_global_random_state_stays(saved_folder: Path) -> None:
    torch.manual_seed(9)
    expected = torch.rand(2)
    torch.manual_seed(9)
    one, other = (adapters_of(folder_backbone(saved_folder)) for _ in range(2))
    assert torch.equal(torch.rand(2), expected)
    for name, parameter in one.items():
        assert torch.equal(parameter, other[name])
        assert bool(parameter.any()) == ("lora_A" in name)  # Gaussian A, zero B


# --- training -------------------------------------------------------------------------------------


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def steps(ranker: LetterRanker, number: int) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in ranker.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(number):
        optimizer.zero_grad()
        loss = ranker.train().loss(HISTORIES, CANDIDATES, PLACES)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("dtype", "checkpointing"), [("float32", False), ("bfloat16", True)])
def test_training_changes_every_adapter_and_nothing_else(
    saved_folder: Path, quantize: str, dtype: str, checkpointing: bool
) -> None:
    """B is zero at first: the first step moves B alone, the second A as well."""
    torch.manual_seed(0)
    backbone = folder_backbone(
        saved_folder, quantize=quantize, dtype=dtype, gradient_checkpointing=checkpointing
    )
    ranker = ranker_of(backbone)
    before = snapshot(ranker)
    steps(ranker, 2)
    for name, parameter in ranker.named_parameters():
        changed = not torch.equal(parameter, before[name])
        assert changed == ("lora_" in name), name
        assert torch.isfinite(parameter.float()).all()
        assert (parameter.grad is None) == ("lora_" not in name), name


def test_gradient_checkpointing_changes_no_number(saved_folder: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        backbone = folder_backbone(
            saved_folder, dtype="float32", lora_dropout=0.0, gradient_checkpointing=checkpointing
        )
        ranker = ranker_of(backbone).train()
        ranker.loss(HISTORIES, CANDIDATES, PLACES).backward()
        gradients.append({n: p.grad for n, p in adapters_of(ranker).items() if "lora_B" in n})
    for name, gradient in gradients[0].items():
        assert gradient is not None
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-6, rtol=1e-4)


def test_adapters_on_four_bits_learn(saved_folder: Path) -> None:
    torch.manual_seed(0)
    backbone = folder_backbone(saved_folder, quantize="nf4", dtype="float32", lora_dropout=0.0)
    losses = steps(ranker_of(backbone), 15)
    assert losses[-1] < 0.5 * losses[0]


# --- weights that are not there -------------------------------------------------------------------


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def cut_off(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def one_tensor_less(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(next(name for name in tensors if "q_proj.weight" in name))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def another_shape(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "q_proj.weight" in name)
    tensors[name] = tensors[name][:4].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def a_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    without_weights(folder)


def emptied(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    "damage", [without_weights, cut_off, one_tensor_less, another_shape, a_pickle, emptied]
)
def test_damaged_weights_are_one_sentence_and_never_random_numbers(
    saved_folder: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(saved_folder, folder)
    damage(folder)
    with pytest.raises(UserError, match=r"--backbone=tiny.*local folder") as caught:
        folder_backbone(folder)
    assert str(folder) in str(caught.value)


def test_a_folder_without_a_tokenizer_is_the_users_mistake(
    saved_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(saved_folder, folder)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(UserError, match="tokenizer"):
        folder_backbone(folder)


ABSENT = """
from recbole_mm.backbone.load import load_backbone
from recbole_mm.errors import UserError
from recbole_mm.paths import properties_dir
from tests.backbone.shop import spec_of
try:
    load_backbone(spec_of(name="qwen2-vl-2b", is_tiny=False), [], [], 0)
except UserError as error:
    print(error)
"""


def test_weights_neither_cached_nor_reachable_are_one_sentence(tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run(
        [sys.executable, "-c", ABSENT],
        cwd=REPO,
        env={**environment, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (sentence,) = done.stdout.splitlines()
    assert "Qwen/Qwen2-VL-2B-Instruct" in sentence
    assert "--backbone=tiny" in sentence
    assert "a local folder" in sentence


# --- descriptions ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"quantise": "nf4"}, "quantize"),
        ({"quantize": "int3"}, "none, nf4"),
        ({"dtype": "float8"}, "bfloat16"),
        ({"family": "mantis"}, "qwen2_vl"),
        ({"image_pooling": "mean"}, "all, cls"),
        ({"attention": "flash"}, "flash_attention_2"),
    ],
)
def test_an_unknown_key_or_value_names_the_known_ones(change: dict[str, str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        spec_of(**change)


def test_flash_attention_on_a_cpu_is_the_users_mistake() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match="auto or sdpa"):
        backbone_of(attention="flash_attention_2")


def test_attentions_agree() -> None:
    scores = [
        ranker_of(backbone_of(attention=name)).log_probs(HISTORIES, CANDIDATES)
        for name in ("auto", "sdpa", "eager")
    ]
    assert torch.equal(scores[0], scores[1])
    torch.testing.assert_close(scores[1], scores[2], atol=1e-5, rtol=0)


def test_the_shipped_descriptions_are_read() -> None:
    from recbole_mm.config import resolve_backbone

    files = [path.stem for path in (properties_dir() / "backbone").glob("*.yaml")]
    assert len(files) >= 5
    for name in ("tiny", *files, *(f"tiny-{stem}" for stem in files)):
        mapping, settings = resolve_backbone(name, "qwen2-vl-2b")
        if mapping["family"] == "text":  # see test_text_model.py
            continue
        own = {k: v for k, v in settings.items() if k in BackboneSpec.__annotations__}
        spec = BackboneSpec.from_mapping({**mapping, **own})
        assert spec.name == name
        assert spec.is_tiny == name.startswith("tiny")
        of_illmrec = "sheared" in name or "vicuna" in name
        size = (4 if spec.is_tiny else 64) if of_illmrec else 8
        assert settings["max_attr_tokens" if spec.is_tiny else "lora_r"] == size

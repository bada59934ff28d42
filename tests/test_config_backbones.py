"""Names of backbones, and of models that are a variant of another."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from recbole_mm.config import MMConfig, resolve_backbone
from recbole_mm.errors import UserError
from recbole_mm.paths import properties_dir

TINY = {
    "tiny": "qwen2_vl",
    "tiny-qwen2-vl": "qwen2_vl",
    "tiny-qwen2-vl-2b": "qwen2_vl",
    "tiny-qwen2.5-vl": "qwen2_5_vl",
    "tiny-llava": "llava",
    "tiny-smolvlm": "idefics3",
    "tiny-llama": "causal_lm",
}


@pytest.mark.parametrize(("name", "family"), TINY.items())
def test_the_tiny_form_of_another_family_goes_by_its_name(name: str, family: str) -> None:
    spec, settings = resolve_backbone(name, "qwen2-vl-2b")
    assert (spec["name"], spec["family"], spec["is_tiny"]) == (name, family, True)
    assert spec["tiny"]["layers"] == 2
    assert settings["ranker_learning_rate"] == 1e-3  # of the tiny form
    own, _ = resolve_backbone("tiny", "llava-1.5-7b")
    assert own["family"] == "llava"


@pytest.mark.parametrize("name", ["tiny-lava", "llava", "tiny-llav"])
def test_an_unknown_backbone_names_the_nearest(name: str) -> None:
    with pytest.raises(UserError, match=rf"no backbone '{name}' \(did you mean 'tiny-llava'\?\)"):
        resolve_backbone(name, "qwen2-vl-2b")


def test_every_description_names_a_model() -> None:
    """A comment too near to a value would be part of it."""
    for path in (properties_dir() / "backbone").glob("*.yaml"):
        model = resolve_backbone(path.stem, "minilm")[0]["model"]
        assert re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model), path.name


def test_a_folder_says_what_family_it_is_of(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    spec, settings = resolve_backbone(str(tmp_path), "qwen2-vl-2b")
    assert (spec["family"], spec["model"]) == ("llava", str(tmp_path))
    assert settings["image_pooling"] == "cls"
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    assert resolve_backbone(str(tmp_path), "llama-2-7b")[0]["family"] == "causal_lm"


def test_an_aliass_yaml_stands_above_that_of_its_model() -> None:
    prime, llamarec = MMConfig("PRIME", "ml-100k"), MMConfig("LlamaRec", "ml-100k")
    assert llamarec["model"] == "LlamaRec"
    assert llamarec["attributes"] == ["title"]
    assert llamarec["backbone_spec"]["family"] == "causal_lm"
    assert llamarec["ranker_learning_rate"] == prime["ranker_learning_rate"]
    with pytest.raises(UserError, match="LlamaRec has no key 'atributes'"):
        MMConfig("LlamaRec", "ml-100k", overrides={"atributes": "[title]"})

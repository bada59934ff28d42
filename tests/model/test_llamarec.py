"""LlamaRec: PRIME with a language model that reads titles alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from recbole_mm.cli import main
from recbole_mm.config import read_yaml
from recbole_mm.errors import UserError
from recbole_mm.paths import property_file
from tests.model.prime_world import SMALL, World, world_of


@pytest.fixture(scope="module")
def llamarec(mini: Path) -> World:
    return world_of(mini, "LlamaRec")


def test_its_prompts_hold_titles_alone(llamarec: World) -> None:
    ranker = llamarec.model.ranker
    assert type(ranker.backbone.model).__name__ == "LlamaForCausalLM"
    prompt = ranker.writer.write([1, 2], list(range(1, 9)))
    text = ranker.backbone.tokenizer.decode(prompt.ids, clean_up_tokenization_spaces=False)
    assert prompt.slots == ()
    assert text.count('{"title": "') == 10
    assert text.startswith("<s>### Instruction:\n")
    assert text.endswith("\n### Response:\n")
    assert not any(word in text for word in ('"image"', '"price"', '"brand"'))


def test_items_of_the_history_are_no_candidates(llamarec: World) -> None:
    rows = llamarec.rows()
    with torch.no_grad():
        scores = llamarec.model.retriever.eval().full_sort_predict(rows)
    candidates = llamarec.model.candidates(rows, scores)
    for history, row in zip(rows["item_id_list"].tolist(), candidates.tolist(), strict=True):
        assert not set(history) & set(row)


def test_it_has_two_stages(llamarec: World) -> None:
    assert llamarec.model.policy is None
    assert list(llamarec.config["stages"]) == ["retriever", "ranker"]
    assert llamarec.model.readouts("ranker")[-2].name == "ranker"


def test_a_run_ends_with_both_stages_and_its_own_name(mini: Path, in_folder: Path) -> None:
    changes = {**SMALL, "epochs": 1, "data_path": mini, "cache_dir": in_folder}
    flags = [f"--{key}={value}" for key, value in changes.items()]
    assert main(["--model=LlamaRec", "--dataset=mini", "--result_file=r.json", *flags]) == 0
    result = json.loads((in_folder / "r.json").read_text())
    assert result["model"] == "LlamaRec"
    assert result["backbone"] == "tiny"
    assert list(result["stages"]) == ["retriever", "ranker"]
    (folder,) = (in_folder / "saved").glob("LlamaRec-mini-*")
    assert 0 < result["test"]["ndcg@20"] < 1
    assert main([f"--load={folder}", "--result_file=again.json"]) == 0
    assert json.loads((in_folder / "again.json").read_text())["test"] == result["test"]


def test_pictures_for_a_model_that_sees_nothing_are_the_users_mistake(mini: Path) -> None:
    says = r"attributes has image in it, but backbone 'tiny' reads text alone: set .* to \[title\]"
    with pytest.raises(UserError, match=says):
        world_of(mini, "LlamaRec", attributes=["image", "title"])


def test_what_it_sets_is_prime_s_too() -> None:
    own, prime = (read_yaml(property_file("model", n) or Path()) for n in ("LlamaRec", "PRIME"))
    assert own.keys() <= prime.keys()

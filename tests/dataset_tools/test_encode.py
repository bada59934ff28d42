"""Features of all items of a dataset, made by tiny encoders of the real classes."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dataset_tools.__main__ import main
from dataset_tools.encode import nearest_rows
from recbole_mm.backbone.encode import load_encoder
from recbole_mm.backbone.encode_items import encode_images, encode_texts, open_log
from recbole_mm.backbone.encoder_source import find_encoder
from recbole_mm.data.atomic import write_images, write_table, write_text
from recbole_mm.data.content import ItemContent
from recbole_mm.data.features import FeatureStore, feature_paths, hash_inputs
from recbole_mm.data.images import DIGEST, decode, digest
from recbole_mm.errors import UserError
from tests.backbone import encoders
from tests.conftest import REPO

TITLES: dict[str, str | None] = {
    "i1": "red nail polish",
    "i2": "a shampoo for dry hair",
    "i3": "red nail polish",
    "i4": None,
    "i5": "  ",
    "i6": "soap",
}
BRANDS = {"i1": "opi", "i4": "dove"}


def shop(
    place: Path,
    titles: Mapping[str, str | None] = TITLES,
    brands: Mapping[str, str] = BRANDS,
    pictures: Mapping[str, bytes] | None = None,
    order: Sequence[str] = (),
) -> Path:
    """A dataset of these items; `order` is that of their first purchases."""
    folder = place / "shop"
    (folder / "images").mkdir(parents=True, exist_ok=True)
    header = ("user_id:token", "item_id:token", "timestamp:float")
    write_table(folder / "shop.inter", header, [("u", item, "1") for item in order or titles] * 2)
    values = [(item, (title, brands.get(item))) for item, title in titles.items()]
    write_text(folder / "shop.text", ["title", "brand"], values)
    if pictures is not None:
        for name, data in pictures.items():
            (folder / "images" / name).write_bytes(data)
        write_images(folder / "shop.image", [(name.partition("-")[0], name) for name in pictures])
    return folder


def png(seed: int, width: int = 40, height: int = 30) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def encode(folder: Path, encoder: Path | str, field: str = "text", *flags: str) -> int:
    where = ["--data_path", str(folder.parent), "--device", "cpu"]
    return main(
        ["encode", folder.name, "--encoder", str(encoder), "--field", field, *where, *flags]
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoders.sentence_transformer(tmp_path_factory.mktemp("encoders") / "tiny")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoders.clip(tmp_path_factory.mktemp("encoders") / "my clip")


def by_item(store: FeatureStore) -> dict[str, Any]:
    return dict(zip(store.info.items, np.asarray(store.matrix), strict=True))


def test_every_item_with_a_text_has_a_row(
    tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shop(tmp_path)
    assert encode(folder, tiny) == 0
    said = capsys.readouterr().out
    assert "6 items, 4 rows of 16 (float32), 2 without; 3 encoded in" in said
    assert "on cpu (float32)" in said
    store = FeatureStore.open_fresh(folder, "shop", "tiny")
    assert store.info.items == ["i1", "i2", "i3", "i6"]
    assert store.info.without == ["i4", "i5"]
    assert (store.info.encoder, store.info.pooling) == ("tiny", "mean, normalized")
    assert store.info.revision == find_encoder(str(tiny)).revision
    assert (store.info.dtype, store.info.fields) == ("float32", ["title"])
    assert str(tmp_path) not in (folder / "shop.tiny.json").read_text()
    reference = load_encoder(find_encoder(str(tiny)), "cpu")
    for item, row in by_item(store).items():
        np.testing.assert_allclose(row, reference.texts([TITLES[item] or ""])[0], atol=1e-6)
    names = {path.name for path in folder.iterdir()}
    assert names == {"images", "shop.inter", "shop.text", "shop.tiny.json", "shop.tiny.npy"}


def test_attributes_are_joined_in_their_order(tmp_path: Path, tiny: Path) -> None:
    folder = shop(tmp_path)
    flags = ["--attributes", "brand, title", "--name", "both"]
    assert encode(folder, tiny, "text", *flags) == 0
    rows = by_item(FeatureStore.open_fresh(folder, "shop", "both"))
    said = {"i1": "opi. red nail polish", "i3": "red nail polish", "i4": "dove"}
    reference = load_encoder(find_encoder(str(tiny)), "cpu")
    for item, text in said.items():
        np.testing.assert_allclose(rows[item], reference.texts([text])[0], atol=1e-6)
    assert "i5" not in rows


def test_batches_and_order_change_nothing(tmp_path: Path, tiny: Path) -> None:
    one = shop(tmp_path / "one")
    many = shop(tmp_path / "many", order=[*TITLES][::-1])
    assert encode(one, tiny, "text", "--batch", "1") == encode(many, tiny) == 0
    rows, others = (by_item(FeatureStore.open(f, "shop", "tiny")) for f in (one, many))
    assert rows.keys() == others.keys()
    assert [*rows] == [*others][::-1]
    for item, row in rows.items():
        np.testing.assert_allclose(row, others[item], atol=1e-6)


def test_what_sellers_write_is_cleaned(tmp_path: Path, tiny: Path) -> None:
    hostile = {
        "a": "soap",
        "b": "\u202es\u200boa\x00p\u2028",
        "c": "soap [SEP] [CLS]",
        "d": "x " * 1_000_000,
        "e": "\u200b\x07",
        "f": '"\\t\t\n',
    }
    folder = shop(tmp_path, hostile, {})
    assert encode(folder, tiny) == 0
    rows = by_item(FeatureStore.open_fresh(folder, "shop", "tiny"))
    assert [*rows] == ["a", "b", "c", "d", "f"]
    np.testing.assert_array_equal(rows["a"], rows["b"])
    assert not np.allclose(rows["a"], rows["c"])


def test_pictures_that_can_be_used_have_rows(
    tmp_path: Path, clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = {
        "i1-1.png": png(1),
        "i2-1.png": b"no picture",
        "i2-2.png": png(2),
        "i3-1.png": png(1),
        "i4-1.png": png(3)[:200],
        "i5-1.png": png(4, 2000, 2),
    }
    folder = shop(tmp_path, pictures=pictures)
    assert encode(folder, clip, "image", "--batch", "2") == 0
    said = capsys.readouterr().out
    assert "6 items, 3 rows of 12 (float32), 3 without; 2 encoded in" in said
    for reason in ("broken file: 1", "no image: 1", "200 times as long as wide: 1"):
        assert f"without a row, {reason}" in said
    store = FeatureStore.open_fresh(folder, "shop", "my-clip-image")
    assert (store.info.items, store.info.fields) == (["i1", "i2", "i3"], ["image"])
    reference = load_encoder(find_encoder(str(clip)), "cpu")
    for item, name in {"i1": "i1-1.png", "i2": "i2-2.png", "i3": "i1-1.png"}.items():
        with Image.open(folder / "images" / name) as image:
            np.testing.assert_allclose(
                by_item(store)[item], reference.images([image.convert("RGB")])[0], atol=1e-5
            )
    assert encode(folder, clip, "text") == 0
    assert FeatureStore.open_fresh(folder, "shop", "my-clip-text").matrix.shape == (4, 12)


def test_features_that_stand_are_not_touched(
    tmp_path: Path, tiny: Path, clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shop(tmp_path)
    assert encode(folder, tiny) == 0
    matrix = feature_paths(folder, "shop", "tiny")[0]
    before = matrix.stat().st_mtime_ns
    assert encode(folder, tiny) == 0
    assert "up to date" in capsys.readouterr().out
    for encoder, flags in ((clip, []), (tiny, ["--attributes", "brand"])):
        assert encode(folder, encoder, "text", "--name", "tiny", *flags) == 1
        assert "--force replaces it" in capsys.readouterr().err
    assert matrix.stat().st_mtime_ns == before
    assert encode(folder, tiny, "text", "--attributes", "brand", "--force") == 0
    assert FeatureStore.open_fresh(folder, "shop", "tiny").info.fields == ["brand"]


@pytest.mark.parametrize("change", ["changed", "gained", "lost"])
def test_other_texts_make_features_stale(
    tmp_path: Path, tiny: Path, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert encode(shop(tmp_path), tiny) == 0
    new: dict[str, dict[str, str | None]] = {
        "changed": {"i2": "a shampoo"},
        "gained": {"i4": "a comb"},
        "lost": {"i6": None},
    }
    folder = shop(tmp_path, {**TITLES, **new[change]})
    with pytest.raises(UserError, match="is stale"):
        FeatureStore.open_fresh(folder, "shop", "tiny")
    assert encode(folder, tiny) == 1
    assert re.search(r"is stale.*--force encodes it again", capsys.readouterr().err)
    assert encode(folder, tiny, "text", "--force") == 0
    FeatureStore.open_fresh(folder, "shop", "tiny")


def test_new_items_and_pictures_are_noticed(
    tmp_path: Path, tiny: Path, clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shop(tmp_path, pictures={"i1-1.png": png(1)})
    assert encode(folder, tiny) == encode(folder, clip, "image") == 0
    shop(tmp_path, {**TITLES, "i7": "a comb"}, pictures={"i1-1.png": png(2)})
    FeatureStore.open_fresh(folder, "shop", "tiny")  # what it has is still right
    assert encode(folder, tiny) == 1
    assert "or items" in capsys.readouterr().err
    with pytest.raises(UserError, match="is stale"):
        FeatureStore.open_fresh(folder, "shop", "my-clip-image")


def test_a_reader_needs_no_order_of_its_own(tmp_path: Path, tiny: Path) -> None:
    """The hash is over the items as the JSON has them, with and without a row."""
    folder = shop(tmp_path, order=["i6", "i4", "i1", "i2", "i5", "i3"])
    assert encode(folder, tiny) == 0
    info = FeatureStore.open(folder, "shop", "tiny").info
    assert (info.items, info.without) == (["i6", "i1", "i2", "i3"], ["i4", "i5"])
    now = hash_inputs(folder, "shop", info.items, info.without, ["title"])
    FeatureStore.open(folder, "shop", "tiny", inputs=now)
    shop(tmp_path)
    FeatureStore.open_fresh(folder, "shop", "tiny")


def lines_of(logs: Path) -> list[str]:
    """Keys that were recorded whole."""
    found = []
    for index in logs.rglob("*.jsonl"):
        text = index.read_text(encoding="utf-8")
        found += [json.loads(line)["key"] for line in text[: text.rfind("\n") + 1].splitlines()]
    return found


def test_a_killed_run_goes_on_and_makes_nothing_twice(
    tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    titles = {f"i{n}": f"soap number {n}" for n in range(4000)}
    folder, whole = shop(tmp_path / "a", titles, {}), shop(tmp_path / "b", titles, {})
    words = [sys.executable, "-m", "dataset_tools", "encode", "shop", "--encoder", str(tiny)]
    words += ["--field", "text", "--batch", "4", "--device", "cpu"]
    with subprocess.Popen(
        [*words, "--data_path", str(folder.parent)],
        cwd=REPO,
        env={**os.environ, "PYTHONPATH": str(REPO)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as child:
        logs = folder / ".shop.tiny.rows"
        while len(lines_of(logs)) < 200 and child.poll() is None:
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
    recorded = lines_of(logs)
    assert 200 <= len(recorded) < 4000, "it was not killed in the middle"
    assert not feature_paths(folder, "shop", "tiny")[0].exists()
    assert encode(folder, tiny, "text", "--batch", "4") == 0
    said = capsys.readouterr().out
    assert f"{4000 - len(recorded):,} encoded in" in said
    assert f"{len(recorded):,} kept of an earlier run" in said
    assert not logs.exists()
    assert encode(whole, tiny, "text", "--batch", "4") == 0
    stores = [FeatureStore.open_fresh(place, "shop", "tiny") for place in (folder, whole)]
    assert stores[0].info == stores[1].info
    np.testing.assert_allclose(stores[0].matrix, stores[1].matrix, atol=1e-6)


def test_rows_of_another_encoder_or_precision_are_not_taken(tmp_path: Path, tiny: Path) -> None:
    other = encoders.sentence_transformer(tmp_path / "tiny", "cls_token")
    loaded = [
        load_encoder(find_encoder(str(tiny)), "cpu"),
        load_encoder(find_encoder(str(other)), "cpu"),
        load_encoder(find_encoder(str(tiny)), "cpu", "bfloat16"),
    ]
    for encoder in loaded:
        log = open_log(tmp_path / "logs", encoder, "text")
        assert encode_texts(encoder, ["a", "b", "a"], log, 2).encoded == 2
    assert len([*(tmp_path / "logs").iterdir()]) == 3
    log = open_log(tmp_path / "logs", loaded[0], "text")
    found = encode_texts(loaded[0], ["b", None, "c"], log, 2)
    assert (found.rows, found.encoded, found.recalled) == ([0, 2], 1, 1)


def test_pictures_that_have_vectors_are_not_opened(tmp_path: Path, clip: Path) -> None:
    """Unless the first file cannot be used, and only its reading tells."""
    data = {1: [png(1)], 2: [b"no picture", png(2)], 3: [png(1)], 4: []}
    paths = {item: [tmp_path / f"{item}-{i}" for i in range(len(x))] for item, x in data.items()}
    for item, files in paths.items():
        for path, content in zip(files, data[item], strict=True):
            path.write_bytes(content)
    opened: list[int] = []

    def load(item: int) -> Image.Image | None:
        opened.append(item)
        for content in data[item][-1:]:
            image = decode(content)
            image.info[DIGEST] = digest(content)
            return image
        return None

    encoder = load_encoder(find_encoder(str(clip)), "cpu")
    results = []
    for again in range(2):
        opened.clear()
        log = open_log(tmp_path / "logs", encoder, "image")
        first = {item: files[0] for item, files in paths.items() if files}
        results.append(encode_images(encoder, [1, 2, 3, 4], load, first.get, log, 1))
        assert opened == ([2, 4] if again else [1, 2, 4])
    assert [(r.rows, r.encoded, r.recalled) for r in results] == [
        ([0, 1, 2], n, 2 - n) for n in (2, 0)
    ]
    np.testing.assert_array_equal(results[0].matrix, results[1].matrix)
    np.testing.assert_array_equal(results[0].matrix[0], results[0].matrix[2])


def test_long_texts_come_first_and_equal_ones_once(tmp_path: Path, tiny: Path) -> None:
    encoder = load_encoder(find_encoder(str(tiny)), "cpu")
    seen: list[list[str]] = []
    texts = encoder.texts
    encoder.texts = lambda part: seen.append([*part]) or texts(part)  # type: ignore[method-assign, func-returns-value]
    log = open_log(tmp_path, encoder, "text")
    seen.clear()
    encode_texts(encoder, ["aa", "a", "aaaa", "a", "aaa", ""], log, 2)
    assert seen == [["aaaa", "aaa"], ["aa", "a"]]


def test_interrupting_says_how_to_go_on(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from recbole_mm.backbone.encode import TextModel

    folder, texts, calls = shop(tmp_path), TextModel.texts, []

    def ctrl_c(self: TextModel, part: Sequence[str]) -> Any:
        calls.append(part)
        if len(calls) == 3:  # the first measures the width
            raise KeyboardInterrupt
        return texts(self, part)

    monkeypatch.setattr(TextModel, "texts", ctrl_c)
    assert encode(folder, tiny, "text", "--batch", "1") == 130
    assert "the same command goes on where it was" in capsys.readouterr().err
    assert encode(folder, tiny, "text", "--batch", "1") == 0
    assert "2 encoded in" in (said := capsys.readouterr().out)
    assert "1 kept of an earlier run" in said


def test_too_large_a_batch_says_what_to_lower(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from recbole_mm.backbone.encode import TextModel

    def full(self: TextModel, part: Sequence[str]) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(TextModel, "texts", full)
    assert encode(shop(tmp_path), tiny, "text", "--batch", "999") == 1
    assert "999 at once take more memory" in (said := capsys.readouterr().err)
    assert "lower --batch goes on where it was" in said


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--field", "image"], "is a text encoder (bert): --field image takes siglip, clip"),
        (["--attributes", "titel"], "has no 'titel' (did you mean 'title'?); it has: title, brand"),
        (["--attributes", ","], "--attributes names none"),
        (["--batch", "0"], "--batch is 0: it is 1 or more"),
        (["--name", "../out"], "Feature name '../out'"),
        (["--device", "nonsense"], "Device 'nonsense' is not there"),
        (["--data_path", "nowhere"], "shop.inter cannot be read"),
        (["--encoder", "./nothing"], "encoder './nothing'"),
    ],
)
def test_mistakes_are_one_sentence(
    tmp_path: Path,
    tiny: Path,
    flags: list[str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folder = shop(tmp_path, pictures={"i1-1.png": png(1)})
    before = sorted(folder.iterdir())
    assert encode(folder, tiny, "text", *flags) == 1
    said = capsys.readouterr().err
    assert says in said
    assert "Traceback" not in said
    assert sorted(folder.iterdir()) == before


def test_nothing_to_encode_is_one_sentence(
    tmp_path: Path, tiny: Path, clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shop(tmp_path, dict.fromkeys(TITLES), {})
    assert encode(folder, tiny) == 1
    assert "No item of" in capsys.readouterr().err
    assert encode(folder, clip, "image") == 1
    assert "the dataset has no pictures" in capsys.readouterr().err


def test_short_names_come_from_the_hubs_cache(tmp_path: Path) -> None:
    """With no network; the revision is the commit."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "hub" / "models--openai--clip-vit-base-patch32"
    encoders.clip(cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    folder = shop(tmp_path, pictures={"i1-1.png": png(1)})
    words = ["encode", "shop", "--encoder", "clip", "--field", "image", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "dataset_tools", *words, "--data_path", str(tmp_path)],
        cwd=REPO,
        env={
            **os.environ,
            "HF_HOME": str(tmp_path),
            "HF_HUB_CACHE": str(tmp_path / "hub"),
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(REPO),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    info = FeatureStore.open_fresh(folder, "shop", "clip-image").info
    assert (info.encoder, info.revision) == ("openai/clip-vit-base-patch32", commit)
    assert info.pooling == "pooler"


def test_neighbours_are_shown(
    tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shop(tmp_path)
    for _ in range(2):  # of new features, and of those that stand
        assert encode(folder, tiny, "text", "--neighbours", "2") == 0
        lines = capsys.readouterr().out.splitlines()
        first = lines.index("red nail polish")
        assert [line[9:] for line in lines[first + 1 : first + 3]] != ["red nail polish"] * 2
        assert all(re.fullmatch(r"  -?\d\.\d{3}  .+", line) for line in lines[first + 1 :][:2])


def test_nearest_rows_are_those_of_the_highest_cosine() -> None:
    matrix = np.array([[1, 0], [2, 0.1], [0, 1], [-1, 0], [9, 0.2], [0, 0]], dtype=np.float32)
    labels = ["a", "b", "c", "d", "b", "e"]
    found = nearest_rows(matrix, 0, labels, 3)
    assert [row for row, _ in found] == [4, 2, 5]
    cosines = [9 / np.hypot(9, 0.2), 0, 0]
    np.testing.assert_allclose([cosine for _, cosine in found], cosines, atol=1e-6)


@pytest.mark.slow
def test_real_beauty_by_the_real_minilm(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Minutes of one core."""
    source = shared_data / "amazon-beauty"
    files = ["--sequences", str(source / "sequences.tsv"), "--items", str(source / "items.tsv")]
    assert main(["table", "--name", "amazon-beauty", *files, "--out", str(tmp_path)]) == 0
    folder = tmp_path / "amazon-beauty"
    assert encode(folder, "minilm") == 0
    assert "12,101 items, 12,101 rows of 384" in capsys.readouterr().out
    store = FeatureStore.open_fresh(folder, "amazon-beauty", "minilm")
    np.testing.assert_allclose(np.linalg.norm(store.matrix, axis=1), 1, atol=1e-5)
    content = ItemContent(folder, folder.name, ["[PAD]", *store.info.items])
    labels = [content.text(i, "title") or "" for i in range(1, len(store.info.items) + 1)]
    polish = [row for row, title in enumerate(labels) if "nail lacquer" in title.lower()][:50]
    matrix = np.asarray(store.matrix)
    near = [labels[other] for row in polish for other, _ in nearest_rows(matrix, row, labels, 3)]
    assert len(near) == 150
    assert sum(bool(re.search("nail|lacquer|polish", title, re.I)) for title in near) > 135

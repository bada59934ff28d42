"""Feature rows: kept ones equal live ones, are keyed by content and outlive the process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from recbole_mm.backbone.batch import collate
from recbole_mm.backbone.load import Backbone
from recbole_mm.backbone.vision import FeatureLog, ItemImages
from recbole_mm.data.atomic import write_images
from recbole_mm.data.content import ItemContent
from recbole_mm.data.images import ImageStore
from tests.backbone.shop import PICTURES, backbone_of, images_of, picture
from tests.backbone.test_families import prompts_of

WIDTH = 128


@contextmanager
def encoded(backbone: Backbone) -> Iterator[list[int]]:
    """Fills a list with the number of pictures of each pass of the vision tower."""
    passes: list[int] = []

    def note(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        passes.append(len(kwargs["grid_thw"]))

    tower = backbone.family.vision_tower(backbone.model)
    handle = tower.register_forward_hook(note, with_kwargs=True)
    try:
        yield passes
    finally:
        handle.remove()


def frozen_of(
    backbone: Backbone, folder: Path | None = None, log: FeatureLog | None = None
) -> ItemImages:
    """Of a frozen tower; with `folder`, of the files in it."""
    if folder is None:
        return images_of(backbone, frozen=True, log=log)

    def path(item: int) -> Path:
        return folder / f"{item}.png"

    def load(item: int) -> Image.Image | None:
        return Image.open(path(item)).convert("RGB") if path(item).is_file() else None

    return images_of(backbone, load, path, frozen=True, log=log)


def log_of(folder: Path) -> FeatureLog:
    return FeatureLog(folder, WIDTH, torch.float32)


@torch.no_grad()
def live_rows(backbone: Backbone, items: list[int]) -> list[Tensor]:
    pixels = [backbone.family.pixels(picture(item)) for item in items]
    return [backbone.family.encode(backbone.model, [one])[0] for one in pixels if one is not None]


# --- a frozen tower -------------------------------------------------------------------------------


@pytest.mark.parametrize("on_disk", [False, True])
def test_kept_rows_equal_live_rows(
    backbone: Backbone, tmp_path: Path, picture_files: Path, on_disk: bool
) -> None:
    items = list(PICTURES)
    images = frozen_of(backbone, picture_files, log_of(tmp_path) if on_disk else None)
    for _ in range(2):  # the second time from memory
        for mine, live in zip(
            images.rows(backbone.model, items), live_rows(backbone, items), strict=True
        ):
            torch.testing.assert_close(mine, live, atol=1e-5, rtol=1e-5)
    if on_disk:
        again = frozen_of(backbone, picture_files, log_of(tmp_path))
        kept, first = again.rows(backbone.model, items), images.rows(backbone.model, items)
        assert all(torch.equal(a, b) for a, b in zip(kept, first, strict=True))


def test_a_frozen_tower_encodes_each_picture_once_for_ever(
    backbone: Backbone, tmp_path: Path, picture_files: Path
) -> None:
    with encoded(backbone) as passes:
        images = frozen_of(backbone, picture_files, log_of(tmp_path))
        images.rows(backbone.model, [1, 3, 4])
        images.rows(backbone.model, [4, 5, 1])
        images.forget()  # means nothing where weights do not change
        images.rows(backbone.model, [1, 3, 4, 5])
        frozen_of(backbone, picture_files, log_of(tmp_path)).rows(backbone.model, [1, 3, 4, 5])
    assert passes == [3, 1]


@pytest.mark.parametrize("on_disk", [False, True])
def test_all_pictures_are_encoded_at_once_and_what_is_there_is_not(
    backbone: Backbone, tmp_path: Path, picture_files: Path, on_disk: bool
) -> None:
    """Items without a picture are passed over; a killed one goes on where it was."""
    items = [1, 2, 3, 4, 5, 6, 7, 8]
    log = log_of(tmp_path) if on_disk else None
    with encoded(backbone) as passes:
        images = frozen_of(backbone, picture_files, log)
        images.encode_all(backbone.model, items[:3], show_progress=False)
        images.encode_all(backbone.model, items, show_progress=False)
        assert passes == [2, 4]
        found = images.rows(backbone.model, list(PICTURES))
        if on_disk:
            again = frozen_of(backbone, picture_files, log_of(tmp_path))
            again.encode_all(backbone.model, items, show_progress=False)
    assert sum(passes) == len(PICTURES)
    for mine, live in zip(found, live_rows(backbone, list(PICTURES)), strict=True):
        torch.testing.assert_close(mine, live, atol=1e-5, rtol=1e-5)


def test_a_bar_counts_the_items(
    backbone: Backbone, picture_files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frozen_of(backbone, picture_files).encode_all(backbone.model, [1, 2, 3], show_progress=True)
    said = capsys.readouterr().err
    assert "Pictures: 100%" in said
    assert "3/3" in said


def test_rows_on_disk_are_mapped_and_not_held(
    backbone: Backbone, tmp_path: Path, picture_files: Path
) -> None:
    images = frozen_of(backbone, picture_files, log_of(tmp_path))
    first = [rows.clone() for rows in images.rows(backbone.model, [1, 3])]
    images.rows(backbone.model, [4, 5])  # the file has grown since it was mapped
    assert images._rows == {}
    assert images._pixels == {}
    assert all(map(torch.equal, images.rows(backbone.model, [1, 3]), first))
    images.rows(backbone.model, [1])[0].zero_()  # a caller's mistake must not reach the file
    (again,) = frozen_of(backbone, picture_files, log_of(tmp_path)).rows(backbone.model, [1])
    assert torch.equal(again, first[0])


def test_gradients_or_not_a_frozen_tower_has_no_graph(backbone: Backbone) -> None:
    (rows,) = frozen_of(backbone).rows(backbone.model, [1])
    assert torch.is_grad_enabled()
    assert not rows.requires_grad


def test_what_another_process_kept_is_used_without_its_pictures(
    backbone: Backbone, second_process: dict[str, Any], picture_files: Path
) -> None:
    """Neither decoded nor encoded here: the grid and the rows both come from the disk."""
    (folder,) = second_process["cache"].iterdir()

    def refuse(item: int) -> Any:
        raise AssertionError(f"the picture of {item} was opened")

    def source(item: int) -> Path:
        return picture_files / f"{item}.png"

    images = images_of(backbone, refuse, source, frozen=True, log=log_of(folder))
    with encoded(backbone) as passes:
        rows = images.rows(backbone.model, list(PICTURES))
        pieces = [images.piece(item) for item in PICTURES]
    assert passes == []
    for mine, live in zip(rows, live_rows(backbone, list(PICTURES)), strict=True):
        torch.testing.assert_close(mine, live, atol=1e-5, rtol=1e-5)
    assert [len(piece.slots) for piece in pieces if piece] == [1] * len(PICTURES)


def test_other_bytes_are_another_picture(
    backbone: Backbone, tmp_path: Path, picture_files: Path
) -> None:
    folder, cache = tmp_path / "pictures", tmp_path / "cache"
    shutil.copytree(picture_files, folder)
    (old,) = frozen_of(backbone, folder, log_of(cache)).rows(backbone.model, [1])
    Image.new("RGB", (56, 56), "green").save(folder / "1.png")
    (new,) = frozen_of(backbone, folder, log_of(cache)).rows(backbone.model, [1])
    pixels = backbone.family.pixels(Image.new("RGB", (56, 56), "green"))
    assert pixels is not None
    with torch.no_grad():
        (live,) = backbone.family.encode(backbone.model, [pixels])
    torch.testing.assert_close(new, live, atol=1e-5, rtol=1e-5)
    assert (new - old).abs().max() > 1e-3


def test_the_same_bytes_of_another_item_are_the_same_picture(
    backbone: Backbone, tmp_path: Path, picture_files: Path
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    shutil.copy(picture_files / "3.png", folder / "8.png")
    frozen_of(backbone, picture_files, log_of(tmp_path / "cache")).rows(backbone.model, [3])
    with encoded(backbone) as passes:
        frozen_of(backbone, folder, log_of(tmp_path / "cache")).rows(backbone.model, [8])
    assert passes == []


# What the first file of an item may be, before one that can be used.
UNUSABLE = {"empty": b"", "page": b"<html>404</html>", "half": None, "absent": None}


def shop_of_two(folder: Path, kind: str) -> tuple[ImageStore, Callable[[int], Path | None]]:
    """Items 1 and 2, whose first file is the same unusable one and whose second are their own."""
    (folder / "images").mkdir(parents=True)
    for item, colour in ((1, "red"), (2, "blue")):
        Image.new("RGB", (56, 56), colour).save(folder / "images" / f"{item}.png")
    data = (folder / "images" / "1.png").read_bytes()[:-30] if kind == "half" else UNUSABLE[kind]
    if data is not None:
        (folder / "images" / "bad.png").write_bytes(data)
    rows = [("a", "bad.png"), ("a", "1.png"), ("b", "bad.png"), ("b", "2.png")]
    write_images(folder / "shop.image", rows)
    content = ItemContent(folder, "shop", ["[PAD]", "a", "b"])
    return ImageStore(content), lambda item: content.image_paths(item)[0]


@pytest.mark.parametrize("kind", UNUSABLE)
def test_items_share_no_picture_because_of_a_first_file_that_cannot_be_used(
    backbone: Backbone, tmp_path: Path, kind: str
) -> None:
    store, source = shop_of_two(tmp_path / "shop", kind)
    pixels = [backbone.family.pixels(Image.new("RGB", (56, 56), c)) for c in ("red", "blue")]
    with torch.no_grad():
        live = backbone.family.encode(backbone.model, [one for one in pixels if one is not None])
    cache = tmp_path / "cache"
    with encoded(backbone) as passes:
        for _ in range(2):  # each item in a run of its own, then again from the disk
            for item in (1, 2):
                images = images_of(backbone, store.get, source, frozen=True, log=log_of(cache))
                assert images.piece(item) is not None
                (mine,) = images.rows(backbone.model, [item])
                torch.testing.assert_close(mine, live[item - 1], atol=1e-5, rtol=1e-5)
    assert passes == [1, 1]


def test_many_pictures_do_not_go_through_the_tower_at_once(backbone: Backbone) -> None:
    images = images_of(backbone, lambda item: picture(1), frozen=True)
    with encoded(backbone) as passes:
        rows = images.rows(backbone.model, range(150))
    assert passes == [64, 64, 22]
    assert all(torch.allclose(row, rows[0], atol=1e-5) for row in rows)


def test_an_item_without_a_picture_has_no_piece_and_no_rows(backbone: Backbone) -> None:
    images = frozen_of(backbone)
    assert images.piece(2) is None
    with pytest.raises(ValueError, match="item 2 has no picture"):
        images.rows(backbone.model, [2])


def test_a_kept_piece_is_the_piece_of_a_live_picture(
    backbone: Backbone, second_process: dict[str, Any], picture_files: Path
) -> None:
    (folder,) = second_process["cache"].iterdir()
    kept = frozen_of(backbone, picture_files, log_of(folder))
    live = images_of(backbone)
    for item in PICTURES:
        one, other = kept.piece(item), live.piece(item)
        assert one is not None
        assert other is not None
        assert one.ids.tolist() == other.ids.tolist()
        assert one.positions.tolist() == other.positions.tolist()
        assert one.slots == other.slots


# --- where the cache is ---------------------------------------------------------------------------


def test_the_cache_of_a_trained_tower_is_none(backbone: Backbone, tmp_path: Path) -> None:
    assert backbone.trains_vision
    assert backbone.vision_log(tmp_path) is None


def test_pixel_budget_and_weights_have_caches_of_their_own(
    saved_folder: Path, tmp_path: Path
) -> None:
    def folder_of(**changes: Any) -> Path:
        backbone = backbone_of(is_tiny=False, model=str(saved_folder), **changes)
        log = backbone.vision_log(tmp_path)
        assert log is not None
        return log.folder

    plain = folder_of(dtype="float32")
    assert folder_of(dtype="float32") == plain
    assert folder_of(dtype="bfloat16") != plain
    assert folder_of(dtype="float32", max_pixels=6272) != plain
    weights = saved_folder / "model.safetensors"
    shutil.copy(weights, tmp_path / "copy")
    shutil.move(tmp_path / "copy", weights)  # another file in the same place
    assert folder_of(dtype="float32") != plain


# --- the log itself -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_come_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    rows = {key: torch.randn(n, 8).to(dtype) for n, key in enumerate("abc", start=1)}
    for key, value in rows.items():
        FeatureLog(tmp_path, 8, dtype).append(key, (1, 2, 4), value)  # three writers
    log = FeatureLog(tmp_path, 8, dtype)
    for key, value in rows.items():
        found = log.read(key)
        assert found is not None
        assert found.dtype == dtype
        assert torch.equal(found, value)
        assert log.grid(key) == (1, 2, 4)
    assert log.read("d") is None
    assert log.grid("d") is None


def test_a_record_cut_off_is_passed_over_and_those_before_it_stay(tmp_path: Path) -> None:
    log = log_of(tmp_path)
    rows = {key: torch.randn(2, WIDTH) for key in "ab"}
    for key, value in rows.items():
        log.append(key, (1, 4, 2), value)
    (index,), (numbers,) = tmp_path.glob("*.jsonl"), tmp_path.glob("*.bin")
    text, data = index.read_text(), numbers.read_bytes()
    for cut in (2, len(text.splitlines()[1]) // 2, len(text.splitlines()[1]) + 1):
        index.write_text(text[:-cut])
        again = log_of(tmp_path)
        assert again.read("b") is None
        assert torch.equal(again.read("a"), rows["a"])
    index.write_text(text)
    numbers.write_bytes(data[:-1])
    assert log_of(tmp_path).read("b") is None
    assert torch.equal(log_of(tmp_path).read("a"), rows["a"])
    numbers.unlink()
    assert log_of(tmp_path).read("a") is None


@pytest.mark.parametrize(
    "line",
    ["", "null", "[]", "{}", "3", '{"key": "x", "offset": 0, "rows": "many", "grid": [1, 2, 2]}',
     '{"key": "x", "offset": 0, "rows": 1, "grid": [1, 2]}',
     '{"key": "x", "offset": 0, "rows": 999999, "grid": [1, 2, 2]}'],
)  # fmt: skip
def test_a_broken_index_line_is_passed_over(tmp_path: Path, line: str) -> None:
    log_of(tmp_path).append("a", (1, 2, 2), torch.ones(1, WIDTH))
    (index,) = tmp_path.glob("*.jsonl")
    index.write_text(line + "\n" + index.read_text())
    log = log_of(tmp_path)
    assert log.read("x") is None
    assert torch.equal(log.read("a"), torch.ones(1, WIDTH))


def test_the_index_is_plain_json_lines(tmp_path: Path) -> None:
    log_of(tmp_path).append("a", (1, 2, 2), torch.ones(1, WIDTH))
    (index,) = tmp_path.glob("*.jsonl")
    (record,) = map(json.loads, index.read_text().splitlines())
    assert record == {"key": "a", "offset": 0, "rows": 1, "grid": [1, 2, 2]}


# --- a trained tower ------------------------------------------------------------------------------


def test_a_trained_tower_gets_gradients_and_sees_each_distinct_picture_once() -> None:
    backbone = backbone_of(seed=5)
    prompts = prompts_of(backbone)
    batch = collate(prompts, backbone.pad_id)
    shown = [slot.item for prompt in prompts for slot in prompt.slots]
    images = images_of(backbone)
    with encoded(backbone) as passes:
        hidden = backbone.hidden(batch, images)
        hidden.square().sum().backward()
        backbone.hidden(batch, images)  # gradients are on: encoded anew
    assert passes == [len(set(shown))] * 2
    for name, parameter in backbone.family.vision_tower(backbone.model).named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_a_trained_towers_rows_are_kept_without_gradients_until_weights_change() -> None:
    backbone = backbone_of(seed=5)
    images = images_of(backbone, log=None)
    with encoded(backbone) as passes, torch.no_grad():
        (old,) = images.rows(backbone.model, [1])
        images.rows(backbone.model, [1])
        next(backbone.family.vision_tower(backbone.model).parameters()).mul_(2)
        images.forget()
        (new,) = images.rows(backbone.model, [1])
    assert passes == [1, 1]
    assert (new - old).abs().max() > 1e-4


def test_a_trained_tower_writes_nothing_to_disk(
    backbone: Backbone, tmp_path: Path, picture_files: Path
) -> None:
    images = images_of(backbone, source=lambda item: picture_files / "1.png", log=log_of(tmp_path))
    with torch.no_grad():
        images.rows(backbone.model, [1])
    assert list(tmp_path.iterdir()) == []

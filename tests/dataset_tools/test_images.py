"""Fetching pictures from a real server with faults, on this machine."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

from dataset_tools import images
from dataset_tools.__main__ import main
from dataset_tools.images import MANIFEST, Manifest
from recbole_mm.data.atomic import read_images, write_images, write_table, write_urls
from recbole_mm.data.content import ItemContent
from recbole_mm.data.images import ImageStore
from tests.dataset_tools.shop_server import Shop, cut_off, in_turn, open_shop, picture, says

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def shop() -> Iterator[Shop]:
    with open_shop() as shop:
        yield shop


def make_dataset(place: Path, urls: list[tuple[str, str]], name: str = "shop") -> Path:
    folder = place / name
    folder.mkdir(parents=True)
    items = dict.fromkeys(item for item, _ in urls)
    header = ["user_id:token", "item_id:token", "timestamp:float"]
    write_table(folder / f"{name}.inter", header, [("u", item, "1") for item in items])
    write_urls(folder / f"{name}.urls", urls)
    return folder


def fetch(folder: Path, *flags: str) -> int:
    words = ["images", folder.name, f"--data_path={folder.parent}", "--rate=0", "--allow_local"]
    return main([*words, *flags])


def shown(folder: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for item, file in read_images(folder / f"{folder.name}.image"):
        found.setdefault(item, []).append(file)
    return found


def test_a_picture_is_bounded_named_by_its_content_and_read_by_the_models(
    shop: Shop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shop.answers = {"/a.png": picture(1, (800, 400)), "/b": picture(1, (800, 400))}
    folder = make_dataset(tmp_path, [("a", shop.url("/a.png")), ("../b", shop.url("/b"))])
    assert fetch(folder, "--max_side=100") == 0
    files = shown(folder)
    assert list(files) == ["a", "../b"]
    assert files["a"] == files["../b"]  # equal content, one file
    assert Image.open(folder / "images" / files["a"][0]).size == (100, 50)
    assert Image.open(folder / "images" / files["a"][0]).format == "JPEG"
    image = ImageStore(ItemContent(folder, "shop", ["[PAD]", "a"])).get(1)
    assert image is not None
    assert image.size == (100, 50)
    assert "items with addresses: 2, with a picture: 2" in capsys.readouterr().out


def test_nothing_is_asked_for_twice(shop: Shop, tmp_path: Path) -> None:
    shop.answers = {"/a": picture(1), "/text": b"no picture", "/b": picture(2)}
    paths = [("a", "/a"), ("a2", "/a"), ("gone", "/gone"), ("text", "/text"), ("b", "/b")]
    folder = make_dataset(tmp_path, [(item, shop.url(path)) for item, path in paths])
    for _ in range(2):
        assert fetch(folder) == 0
        assert list(shown(folder)) == ["a", "a2", "b"]
        assert dict(shop.asked) == {"/a": 1, "/gone": 1, "/text": 1, "/b": 1}
    assert fetch(folder, "--again") == 0
    assert dict(shop.asked) == {"/a": 1, "/gone": 2, "/text": 2, "/b": 1}


def test_a_picture_that_was_deleted_is_fetched_again(shop: Shop, tmp_path: Path) -> None:
    shop.answers = {"/a": picture(1)}
    folder = make_dataset(tmp_path, [("a", shop.url("/a"))])
    assert fetch(folder) == 0
    (folder / "images" / shown(folder)["a"][0]).unlink()
    assert fetch(folder) == 0
    assert shop.asked["/a"] == 2
    assert (folder / "images" / shown(folder)["a"][0]).is_file()


def test_the_next_address_is_asked_where_one_is_gone_and_not_where_it_failed(
    shop: Shop, tmp_path: Path
) -> None:
    shop.answers = {"/a2": picture(1), "/b1": says(500), "/b2": picture(2)}
    paths = [("a", "/a1"), ("a", "/a2"), ("a", "/a3"), ("b", "/b1"), ("b", "/b2")]
    folder = make_dataset(tmp_path, [(item, shop.url(path)) for item, path in paths])
    assert fetch(folder, "--tries=1") == 0
    assert list(shown(folder)) == ["a"]
    assert set(shop.asked) == {"/a1", "/a2", "/b1"}
    shop.answers["/b1"] = picture(3)
    assert fetch(folder, "--tries=1") == 0
    assert list(shown(folder)) == ["a", "b"]
    assert "/b2" not in shop.asked


def test_several_pictures_an_item_keep_their_order(shop: Shop, tmp_path: Path) -> None:
    shop.answers = {f"/{n}": picture(n) for n in range(5)}
    folder = make_dataset(tmp_path, [("a", shop.url(f"/{n}")) for n in (3, 1, 0, 2)])
    assert fetch(folder, "--per_item=3") == 0
    assert len(shown(folder)["a"]) == 3
    assert set(shop.asked) == {"/3", "/1", "/0"}
    first = Image.open(folder / "images" / shown(folder)["a"][0]).getpixel((0, 0))
    alone = make_dataset(tmp_path / "alone", [("a", shop.url("/3"))])
    assert fetch(alone) == 0
    assert Image.open(alone / "images" / shown(alone)["a"][0]).getpixel((0, 0)) == first


def test_pictures_from_elsewhere_stay_and_come_first(shop: Shop, tmp_path: Path) -> None:
    shop.answers = {"/a": picture(1)}
    folder = make_dataset(tmp_path, [("a", shop.url("/a")), ("gone", shop.url("/gone"))])
    (folder / "images").mkdir()
    (folder / "images" / "mine.jpg").write_bytes(picture(5))
    rows = [("other", "mine.jpg"), ("a", "absent.jpg"), ("gone", "mine.jpg"), ("a", "mine.jpg")]
    write_images(folder / "shop.image", rows)
    for _ in range(2):
        assert fetch(folder) == 0
        assert shown(folder)["other"] == ["mine.jpg"]
        assert shown(folder)["gone"] == ["mine.jpg"]  # whose address is dead
        assert shown(folder)["a"][0] == "mine.jpg"
        assert len(shown(folder)["a"]) == 2


def test_what_fails_for_the_moment_is_tried_again(shop: Shop, tmp_path: Path) -> None:
    good = picture(1)
    shop.answers = {
        "/busy": in_turn([says(503, Retry_After="1"), says(200, good)]),
        "/cut": in_turn([cut_off(good), says(200, good)]),
        "/down": says(500),
    }
    paths = ["/busy", "/cut", "/down"]
    folder = make_dataset(tmp_path, [(path[1:], shop.url(path)) for path in paths])
    started = time.monotonic()
    assert fetch(folder, "--tries=2") == 0
    assert time.monotonic() - started >= 1  # as long as Retry-After asks
    assert list(shown(folder)) == ["busy", "cut"]
    assert dict(shop.asked) == {"/busy": 2, "/cut": 2, "/down": 2}
    shop.answers["/down"] = good
    assert fetch(folder, "--tries=2") == 0  # and by the next run
    assert list(shown(folder)) == ["busy", "cut", "down"]
    assert shop.asked["/busy"] == 1 + 1


def png_that_claims(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(kind + data).to_bytes(4, "big")
        return len(data).to_bytes(4, "big") + kind + data + crc

    size = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    body = chunk(b"IHDR", size + b"\x08\x02\0\0\0") + chunk(b"IDAT", zlib.compress(b"\0" * 60))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def test_bombs_and_endless_answers_are_refused_for_good(
    shop: Shop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def endless(handler: object) -> None:
        handler.send_response(200)  # type: ignore[attr-defined]
        handler.end_headers()  # type: ignore[attr-defined]
        while True:
            handler.wfile.write(b"x" * 65536)  # type: ignore[attr-defined]

    shop.answers = {"/bomb": png_that_claims(50_000, 50_000), "/endless": endless}
    paths = ["/bomb", "/endless"]
    folder = make_dataset(tmp_path, [(path[1:], shop.url(path)) for path in paths])
    assert fetch(folder) == 0
    assert shown(folder) == {}
    out = capsys.readouterr().out
    assert "for good, more than 10,000,000 bytes: 1" in out
    assert "for good, more than 16,000,000 pixels: 1" in out
    assert fetch(folder) == 0
    assert dict(shop.asked) == {"/bomb": 1, "/endless": 1}


@pytest.mark.parametrize("comment", ["secret", "x" * 70_000, "é" * 40_000])
def test_what_is_written_in_a_picture_is_left_out(shop: Shop, tmp_path: Path, comment: str) -> None:
    """Pillow would write it into the JPEG: too long a one is an error there, or has no end."""
    info, out = PngImagePlugin.PngInfo(), io.BytesIO()
    info.add_text("comment", comment)
    Image.new("RGB", (10, 10)).save(out, "PNG", pnginfo=info)
    shop.answers = {"/a": out.getvalue()}
    folder = make_dataset(tmp_path, [("a", shop.url("/a"))])
    assert fetch(folder) == 0
    saved = (folder / "images" / shown(folder)["a"][0]).read_bytes()
    assert b"secret" not in saved
    assert len(saved) < 2000


FAULTS = (  # of every twentieth picture, in turn
    lambda good: says(404),
    lambda good: in_turn([says(500), says(200, good)]),
    lambda good: in_turn([says(429, Retry_After="0"), says(200, good)]),
    lambda good: says(200, b"<html>no picture</html>"),
    lambda good: in_turn([cut_off(good), says(200, good)]),
)


def start(folder: Path) -> subprocess.Popen[bytes]:
    words = ["images", folder.name, f"--data_path={folder.parent}", "--rate=0", "--allow_local"]
    return subprocess.Popen(
        [sys.executable, "-m", "dataset_tools", *words, "--workers=8"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def kill_after(shop: Shop, folder: Path, requests: int, number: signal.Signals) -> int:
    """Starts the command, sends it a signal once it has asked so often; returns its exit code."""
    child = start(folder)
    while sum(shop.asked.values()) < requests:
        assert child.poll() is None
        time.sleep(0.005)
    child.send_signal(number)
    return child.wait(30)


def test_a_thousand_pictures_with_faults_and_two_kills(shop: Shop, tmp_path: Path) -> None:
    good = {f"/{n}.png": picture(n) for n in range(1000)}
    shop.answers = {**good}
    faulty = random.Random(7).sample(sorted(good), 50)
    for place, path in enumerate(faulty):
        shop.answers[path] = FAULTS[place % len(FAULTS)](good[path])
    lost = {path for place, path in enumerate(faulty) if place % len(FAULTS) in (0, 3)}
    shop.delay_s = 0.005
    folder = make_dataset(tmp_path, [(f"i{path}", shop.url(path)) for path in good])

    # Asked to end, it finishes what is under way and keeps it.
    assert kill_after(shop, folder, 250, signal.SIGTERM) == 130
    assert unrecorded(shop, folder) <= set(faulty)
    # Killed, it loses the requests under way, of which there are eight at most.
    assert kill_after(shop, folder, 600, signal.SIGKILL) == -signal.SIGKILL
    under_way = unrecorded(shop, folder) - set(faulty)
    assert len(under_way) <= 8
    assert fetch(folder) == 0

    assert set(shown(folder)) == {f"i{path}" for path in good if path not in lost}
    twice = {path for path in good if shop.asked[path] > 1}
    assert twice <= under_way | set(faulty)
    assert set(shop.asked) == set(good)
    before = dict(shop.asked)
    assert fetch(folder) == 0  # nothing is left to ask for
    assert dict(shop.asked) == before


def unrecorded(shop: Shop, folder: Path) -> set[str]:
    """What was asked for and does not stand in the manifest."""
    known = Manifest(folder / "images" / MANIFEST, folder / "images")
    return set(shop.asked) - {url[url.rindex("/") :] for url in (*known.files, *known.gone)}


def test_a_manifest_that_was_cut_off_goes_on(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    a, b, empty = (f"{name * 2}/{name * 32}.jpg" for name in "abc")
    for file in (a, b, empty):
        (images / file).parent.mkdir()
        (images / file).write_bytes(b"" if file == empty else picture(1))
    path = images / MANIFEST
    whole = "\n".join(
        json.dumps(record)
        for record in (
            {"url": "https://x/a", "why": "status 404"},  # until somebody asked --again
            {"url": "https://x/a", "file": a},
            {"url": "https://x/empty", "file": empty},
        )
    )
    odd = [{"url": "https://x/e", "file": file} for file in ("../e.jpg", MANIFEST, "x" * 5000)]
    lines = [whole, "[]", "[" * 100_000, *map(json.dumps, odd), '{"url": "ht']
    path.write_text("\n".join(lines))
    with Manifest(path, images) as manifest:
        assert manifest.files == {"https://x/a": a}
        assert manifest.gone == {}
        manifest.fetched("https://x/b", b)
        manifest.lost("https://x/c", "status 404")
    again = Manifest(path, images)
    assert again.files == {"https://x/a": a, "https://x/b": b}
    assert again.gone == {"https://x/c": "status 404"}
    assert again.failed == {}


def test_mistakes_get_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "shop"
    folder.mkdir()
    assert fetch(folder) == 1
    assert "make the dataset with a converter" in capsys.readouterr().err
    write_urls(folder / "shop.urls", [])
    assert fetch(folder, "--per_item=0") == 1
    assert "--per_item is 0: give 1 or more." in capsys.readouterr().err
    assert fetch(folder, "--rate=nan") == 1
    assert "--rate is nan" in capsys.readouterr().err
    assert fetch(folder, "--max_side=100000") == 1
    assert "--max_side is 100000: give 16384 or less." in capsys.readouterr().err
    assert fetch(folder, "--quality=100") == 1
    assert "--quality is 100" in capsys.readouterr().err


def test_without_the_flag_this_machine_is_not_asked(
    shop: Shop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shop.answers = {"/a": picture(1)}
    make_dataset(tmp_path, [("a", shop.url("/a"))])
    assert main(["images", "shop", f"--data_path={tmp_path}"]) == 0
    assert not shop.asked
    out = capsys.readouterr().out
    assert "without a picture, refused: no known host (see --hosts): 1" in out
    assert "refused are of 1 hosts: 127.0.0.1 1" in out
    assert "again later" not in out


def test_a_refused_address_gives_way_to_the_next(shop: Shop, tmp_path: Path) -> None:
    shop.answers = {"/a": picture(1), "/b": says(403), "/b2": picture(2)}
    refused = [("a", f"https://blocked{n}.example/a") for n in range(300)]
    paths = [("a", "/a"), ("b", "/b"), ("b", "/b2")]
    urls = [*refused, *((item, shop.url(path)) for item, path in paths)]
    folder = make_dataset(tmp_path, urls)
    started = time.monotonic()
    assert fetch(folder, "--rate=20") == 0
    assert time.monotonic() - started < 10  # what is not asked for takes no turn
    assert list(shown(folder)) == ["a", "b"]


def test_what_came_counts_whatever_goes_wrong(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop.answers = {f"/{n}": picture(n) for n in range(40)}
    folder = make_dataset(tmp_path, [(f"i{n}", shop.url(f"/{n}")) for n in range(40)])
    real, saved = images._save, []

    def save(data: bytes, place: Path) -> str:
        saved.append(data)
        if len(saved) > 20:
            raise OSError(28, "No space left on device")
        return real(data, place)

    monkeypatch.setattr(images, "_save", save)
    assert fetch(folder) == 1
    assert len(shown(folder)) == 20
    monkeypatch.undo()
    assert fetch(folder) == 0
    assert len(shown(folder)) == 40

"""Pictures from anywhere: hostile, broken, odd."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from recbole_mm.data import images
from recbole_mm.data.atomic import write_images
from recbole_mm.data.content import ItemContent
from recbole_mm.data.images import BadImageError, ImageStore, decode, open_header, read_bytes


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture(width: int = 40, height: int = 20, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png_claiming(width: int, height: int) -> bytes:
    """A few dozen bytes whose header promises any size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(b"\0" * 100)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [chunk(b"IHDR", header), chunk(b"IDAT", body), chunk(b"IEND", b"")]
    )


@pytest.mark.parametrize("kind", images.FORMATS)
def test_every_format_is_read(kind: str) -> None:
    image = decode(encoded(picture(), kind))
    assert (image.mode, image.size) == ("RGB", (40, 20))


def test_lossless_pixels_are_untouched() -> None:
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True})):
        out = decode(encoded(picture(), kind, **options))
        np.testing.assert_array_equal(np.asarray(out), np.asarray(picture()))


@pytest.mark.parametrize("size", [(50_000, 50_000), (16_001, 1_000), (15_000, 15_000)])
def test_a_pixel_bomb_is_never_decoded(size: tuple[int, int]) -> None:
    data = png_claiming(*size)
    assert len(data) < 200
    for reading in (open_header, decode):
        with pytest.raises(BadImageError, match="16,000,000 pixels"):
            reading(data)


def test_the_largest_size_is_allowed() -> None:
    assert open_header(png_claiming(16_000, 1_000)).size == (16_000, 1_000)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_truncated_file_is_broken(kind: str) -> None:
    data = encoded(picture(200, 200), kind)
    for length in (len(data) // 2, len(data) - 200):
        with pytest.raises(BadImageError):
            decode(data[:length])


@pytest.mark.parametrize("kind", images.FORMATS)
def test_no_flipped_byte_raises_anything_else(kind: str) -> None:
    data, rng = encoded(picture(), kind), np.random.default_rng(1)
    usable = 0
    for place in rng.integers(0, len(data), 150):
        broken = bytearray(data)
        broken[place] ^= int(rng.integers(1, 256))
        try:
            decode(bytes(broken))
            usable += 1
        except BadImageError:
            pass
    assert usable < 150


@pytest.mark.parametrize(
    "data",
    [
        encoded(picture(), "BMP"),
        encoded(picture(), "TIFF"),
        encoded(picture(), "EPS"),
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"<html>404</html>",
        b"",
        b"\0" * 1000,
    ],
)
def test_other_formats_are_refused(data: bytes) -> None:
    with pytest.raises(BadImageError, match="not one of JPEG, PNG, WEBP, GIF"):
        decode(data)


def test_a_gif_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(data).getpixel((4, 4)) == (255, 0, 0)


@pytest.mark.parametrize(("orientation", "red_at"), [(1, (5, 5)), (3, (34, 14)), (6, (14, 5))])
def test_the_exif_orientation_is_applied(orientation: int, red_at: tuple[int, int]) -> None:
    image = Image.new("RGB", (40, 20), "blue")
    image.paste("red", (0, 0, 10, 10))  # top left, before it is turned
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = decode(encoded(image, "PNG", exif=exif))
    assert upright.size == ((20, 40) if orientation == 6 else (40, 20))
    assert upright.getpixel(red_at) == (255, 0, 0)


def test_broken_exif_beside_good_pixels_is_no_matter() -> None:
    data = encoded(picture(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff garbage")
    assert decode(data).size == (40, 20)


def test_transparency_lies_on_white() -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert decode(encoded(clear, "PNG")).getpixel((0, 0)) == (255, 255, 255)
    assert decode(encoded(clear, "WEBP", lossless=True)).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    assert decode(encoded(palette, "PNG", transparency=0)).getpixel((0, 0)) == (255, 255, 255)
    assert decode(encoded(palette, "PNG")).getpixel((0, 0)) == (255, 0, 0)


def test_other_modes_become_rgb() -> None:
    deep = Image.fromarray(np.full((4, 4), 0x80FF, dtype=np.uint16))
    assert decode(encoded(deep, "PNG")).getpixel((0, 0)) == (128, 128, 128)
    assert decode(encoded(picture().convert("CMYK"), "JPEG")).mode == "RGB"
    assert decode(encoded(picture().convert("1"), "PNG")).mode == "RGB"
    assert decode(encoded(Image.new("LA", (4, 4), (7, 255)), "PNG")).getpixel((0, 0)) == (7, 7, 7)


def test_bytes_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.jpg"
    path.write_bytes(b"x" * 100)
    monkeypatch.setattr(images, "MAX_BYTES", 100)
    assert len(read_bytes(path)) == 100
    monkeypatch.setattr(images, "MAX_BYTES", 99)
    with pytest.raises(BadImageError, match=r"more than .* bytes"):
        read_bytes(path)


@pytest.mark.parametrize("name", ["gone.jpg", ".", "x" * 5000])
def test_what_is_no_file_is_absent(name: str, tmp_path: Path) -> None:
    with pytest.raises(BadImageError, match="absent file"):
        read_bytes(tmp_path / name)


def test_the_store_takes_the_first_usable_and_counts_the_rest(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "good.png").write_bytes(encoded(picture(), "PNG"))
    (folder / "bomb.png").write_bytes(png_claiming(50_000, 50_000))
    (folder / "half.png").write_bytes(encoded(picture(), "PNG")[:-200])
    rows = [("a", "half.png"), ("a", "good.png"), ("b", "bomb.png"), ("c", "gone.png")]
    write_images(tmp_path / "d.image", [*rows, ("d", "half.png"), ("d", "bomb.png")])
    store = ImageStore(ItemContent(tmp_path, "d", ["[PAD]", "a", "b", "c", "d", "e"]))
    found = [store.get(item) for item in range(6)]
    assert [image is not None for image in found] == [False, True, False, False, False, False]
    assert found[1] is not None
    assert found[1].size == (40, 20)
    store.get(2)  # asking twice counts once
    assert store.problems == {
        images.TOO_MANY_PIXELS: 2,
        images.ABSENT: 1,
        images.NO_IMAGE: 1,
    }


def test_a_picture_says_which_file_it_was_read_from(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    forged = PngInfo()
    forged.add_text(images.DIGEST, "0" * 64)
    good = encoded(picture(), "PNG", pnginfo=forged)
    for name, data in (("good.png", good), ("half.png", good[:-200]), ("empty.png", b"")):
        (tmp_path / "images" / name).write_bytes(data)
    rows = [("a", "good.png"), ("b", "gone.png"), ("b", "empty.png"), ("b", "half.png")]
    write_images(tmp_path / "d.image", [*rows, ("b", "good.png")])
    store = ImageStore(ItemContent(tmp_path, "d", ["[PAD]", "a", "b"]))
    for item in (1, 2):
        image = store.get(item)
        assert image is not None
        assert image.info[images.DIGEST] == images.digest(good) != images.digest(good[:-200])

"""Opening pictures from anywhere: what is too large, broken or absent is data and no error."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from recbole_mm.data.content import ItemContent

FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
MAX_BYTES = 10_000_000
MAX_PIXELS = 16_000_000  # Pillow's own limit only warns below 179 million
DIGEST = "recbole_mm.sha256"  # key of a picture's `info`: `digest` of the file it was read from

NO_IMAGE = "no image"
ABSENT = "absent file"
TOO_MANY_BYTES = f"more than {MAX_BYTES:,} bytes"
TOO_MANY_PIXELS = f"more than {MAX_PIXELS:,} pixels"
OTHER_FORMAT = f"not one of {', '.join(FORMATS)}"
BROKEN = "broken file"


class BadImageError(Exception):
    """A picture cannot be used; the message is one of this module's reasons."""


def read_bytes(path: Path) -> bytes:
    """The bytes of a regular file of bounded size.

    Raises:
        BadImageError: absent, not a regular file, or too large.
    """
    try:
        if not path.is_file():
            raise BadImageError(ABSENT)
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise BadImageError(ABSENT) from error
    if len(data) > MAX_BYTES:
        raise BadImageError(TOO_MANY_BYTES)
    return data


def digest(data: bytes) -> str:
    """What names a file's content in a cache: 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def digest_of(path: Path) -> str | None:
    """The `digest` of a file's bytes; None where they cannot be read."""
    try:
        return digest(read_bytes(path))
    except BadImageError:
        return None


def open_header(data: bytes) -> Image.Image:
    """Opens a picture without decoding a pixel; format and size are within the limits.

    Raises:
        BadImageError: another format, too many pixels, or a broken header.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise BadImageError(TOO_MANY_PIXELS) from error
    except UnidentifiedImageError as error:
        raise BadImageError(OTHER_FORMAT) from error
    except Exception as error:  # Pillow's readers raise almost anything on hostile bytes
        raise BadImageError(BROKEN) from error
    if image.width * image.height > MAX_PIXELS:
        raise BadImageError(TOO_MANY_PIXELS)
    return image


def decode(data: bytes) -> Image.Image:
    """The picture as upright RGB: first frame, EXIF orientation applied, transparency on white.

    Raises:
        BadImageError: what `open_header` raises, or pixels that are truncated or broken.
    """
    image = open_header(data)
    try:
        image.load()
        return _flat(_upright(image))
    except Exception as error:  # as above
        raise BadImageError(BROKEN) from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # broken EXIF data beside good pixels
        return image


def _flat(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey: PIL would clip them to 8
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


class ImageStore:
    """The pictures of items, by internal item id."""

    def __init__(self, content: ItemContent) -> None:
        self._content = content
        self._bad: dict[int, str] = {}

    def get(self, item_id: int) -> Image.Image | None:
        """The first usable picture of an item, RGB; None when there is none.

        `info[DIGEST]` of the picture is the `digest` of the file it was read from.
        """
        reason = NO_IMAGE
        for path in self._content.image_paths(item_id):
            try:
                data = read_bytes(path)
                image = decode(data)
            except BadImageError as error:
                reason = str(error)
                continue
            image.info[DIGEST] = digest(data)
            return image
        if item_id > 0:  # the pad has no picture and is no problem
            self._bad[item_id] = reason
        return None

    @property
    def problems(self) -> dict[str, int]:
        """How many of the items asked for had no usable picture, by the last picture's reason."""
        return dict(Counter(self._bad.values()))

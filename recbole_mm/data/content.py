"""What is known about each item besides its id: texts and pictures, by internal item id."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from recbole_mm.data.atomic import IMAGE, read_images, read_text
from recbole_mm.errors import UserError, nearest


class ItemContent:
    """The texts of `D.text` and the picture paths of `D.image`, looked up by internal item id.

    Either file may be absent: then no item has that content. Rows of items outside the vocabulary
    are ignored and counted, so side files never add an item.

    Args:
        folder: the dataset's folder, with the atomic files and `images/`.
        dataset: the dataset's name, the stem of the files.
        item_tokens: raw item tokens in the order of internal ids, row 0 the pad. Length: V.

    Attributes:
        attributes: names of the text columns, in file order.
        item_tokens: as given.
        ignored: rows of items outside the vocabulary, by file suffix.

    Raises:
        UserError: a malformed file; see `recbole_mm.data.atomic`.
    """

    def __init__(self, folder: Path, dataset: str, item_tokens: Sequence[str]) -> None:
        self.folder, self.dataset = Path(folder), dataset
        self.item_tokens = list(item_tokens)
        self.attributes: list[str] = []
        self.ignored = {"text": 0, IMAGE: 0}
        self._ids = {token: i for i, token in enumerate(self.item_tokens) if i > 0}
        self._texts: dict[int, list[str | None]] = {}
        self._images: dict[int, list[str]] = {}
        self._root = (self.folder / "images").resolve()
        if (path := self.path("text")).is_file():
            self._load_texts(path)
        if (path := self.path(IMAGE)).is_file():
            self._load_images(path)

    def path(self, suffix: str) -> Path:
        """The dataset's file with that suffix."""
        return self.folder / f"{self.dataset}.{suffix}"

    def _load_texts(self, path: Path) -> None:
        self.attributes, rows = read_text(path, keep=self._ids.__contains__)
        for token, values in rows:
            if item_id := self._ids.get(token):
                self._texts[item_id] = values
            else:
                self.ignored["text"] += 1

    def _load_images(self, path: Path) -> None:
        for token, image in read_images(path):
            if item_id := self._ids.get(token):
                self._images.setdefault(item_id, []).append(image)
            else:
                self.ignored[IMAGE] += 1

    def text(self, item_id: int, attribute: str) -> str | None:
        """The raw string of one attribute; None when the item has no row or the cell is missing.

        Raises:
            UserError: the dataset has no such attribute.
        """
        values = self._texts.get(item_id)
        return values[self._column(attribute)] if values else None

    def _column(self, attribute: str) -> int:
        try:
            return self.attributes.index(attribute)
        except ValueError:
            known = ", ".join(self.attributes) or "none"
            raise UserError(
                f"{self.path('text')} has no attribute '{attribute}'"
                f"{nearest(attribute, self.attributes)}; it has: {known}."
            ) from None

    def image_paths(self, item_id: int) -> list[Path]:
        """The item's picture files in file order, whether they exist or not.

        Raises:
            UserError: a path leads out of the images folder through a symbolic link.
        """
        return [self._below_root(image) for image in self._images.get(item_id, [])]

    def _below_root(self, image: str) -> Path:
        path = (self._root / image).resolve()
        if not path.is_relative_to(self._root):
            raise UserError(
                f"{self.path(IMAGE)}: '{image}' is a link out of {self.folder / 'images'}; "
                "put the file itself there."
            )
        return path

    def coverage(self) -> dict[str, int]:
        """How many items have each attribute (not missing, not empty), and an existing picture."""
        columns = zip(*self._texts.values(), strict=True) if self._texts else ()
        counts = dict.fromkeys(self.attributes, 0)
        for name, column in zip(self.attributes, columns, strict=False):
            counts[name] = sum(map(bool, column))
        counts[IMAGE] = sum(
            any(path.is_file() for path in self.image_paths(item_id)) for item_id in self._images
        )
        return counts

    def hash(self, attributes: Sequence[str] = (), images: bool = False) -> str:
        """A digest of chosen content of all items in id order, for cache keys.

        Args:
            attributes: the text columns that count.
            images: whether the pictures count: their bytes, not their names.

        Returns:
            64 hexadecimal digits; equal content in equal id order gives equal digits.
        """
        digest = hashlib.sha256()
        for item_id, token in enumerate(self.item_tokens):
            _feed(digest, token.encode("utf-8", "surrogatepass"))
            for attribute in attributes:
                value = self.text(item_id, attribute)
                _feed(digest, None if value is None else value.encode())
            if images:
                for path in self.image_paths(item_id):
                    _feed(digest, path.read_bytes() if path.is_file() else None)
                _feed(digest, b"end")
        return digest.hexdigest()


def _feed(digest: hashlib._Hash, value: bytes | None) -> None:
    """Adds one field so that no two lists of fields look alike: its length, then its bytes."""
    digest.update((-1 if value is None else len(value)).to_bytes(8, "big", signed=True))
    digest.update(value or b"")

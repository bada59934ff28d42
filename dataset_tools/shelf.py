"""What a source says about its items, put aside on disk until it is known which are kept.

In memory stay a few bytes an item: what its record has, and the length of its title.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from dataset_tools.write import Item
from recbole_mm.data.atomic import IMAGE
from recbole_mm.errors import UserError

_RECORD, _IMAGE = 1, 2  # bits of what an item has; those of attributes follow
Mask = NDArray[np.bool_]


class Shelf:
    """A file without a name, gone when it is closed or the process ends, however that is.

    Args:
        place: a folder on the disk to use; it need not exist yet.
        attributes: of the items, at most thirty; a length is kept of the one called ``title``.
        size: how many items there are; they are numbers below it.

    Raises:
        UserError: the disk cannot be written to.

    Attributes:
        attributes: as given.
        title_lengths: characters of each item's title. Shape: (size,).
    """

    def __init__(self, place: Path, attributes: Sequence[str], size: int) -> None:
        self.attributes = tuple(attributes)
        self.title_lengths = np.zeros(size, dtype=np.int32)
        self._has = np.zeros(size, dtype=np.uint32)
        self._title = self.attributes.index("title")
        there = next(path for path in (place, *place.absolute().parents) if path.exists())
        try:
            self._file = tempfile.TemporaryFile(dir=there)  # noqa: SIM115 (closed by __exit__)
        except OSError as error:
            raise UserError(f"{there} cannot be written to: {error.strerror}.") from None

    def __enter__(self) -> Shelf:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def put(self, item: int, values: Sequence[str | None], urls: Sequence[str] = ()) -> bool:
        """Puts a record there; False, and nothing done, where the item has one already."""
        if self._has[item] & _RECORD:
            return False
        bits = _RECORD
        for at, value in enumerate(values):
            bits |= bool(value) << (at + 2)
        self._has[item] |= bits
        self.title_lengths[item] = len(values[self._title] or "")
        self._file.write(b"%d\t%s\n" % (item, json.dumps([values, urls]).encode("ascii")))
        return True

    def show(self, item: int) -> None:
        """Notes that there is a picture of an item."""
        self._has[item] |= _IMAGE

    def has(self, what: str | None = None) -> Mask:
        """Which items have an attribute, an ``image``, or (without a name) a record. (size,)"""
        bit = _RECORD if what is None else _IMAGE
        if what is not None and what != IMAGE:
            bit = 1 << (self.attributes.index(what) + 2)
        return (self._has & bit) > 0

    def items(self, tokens: Mapping[int, str]) -> Iterator[Item]:
        """The records of some items, in the order they were put there.

        Args:
            tokens: the token of each of them.
        """
        self._file.seek(0)
        for line in self._file:
            number, _, record = line.partition(b"\t")
            if token := tokens.get(int(number)):
                values, urls = json.loads(record)
                yield Item(token, values, urls)

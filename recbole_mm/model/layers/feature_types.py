"""Features of items by type, as I-LLMRec retrieves by them: pictures, texts, a trained table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recbole_mm.backbone.descriptors import PIXELS, WORDS, pixel_features, word_features
from recbole_mm.data.content import ItemContent
from recbole_mm.data.features import FeatureStore, feature_paths
from recbole_mm.errors import UserError
from recbole_mm.model.layers.id_vectors import standardized

TYPES = ("img", "cf", "text")
_WORD_WIDTH = 256  # of `words`, but where they stand in for pictures


@dataclass(frozen=True)
class Features:
    """One type of features.

    Attributes:
        table: of all items, zeros where one has none. Shape: (V, width).
        known: which have features of their own kind: of `img`, a picture's. Shape: (V,), bool.
    """

    table: Tensor
    known: Tensor

    @property
    def width(self) -> int:
        """Numbers of a row."""
        return int(self.table.shape[1])

    def to(self, device: torch.device) -> Features:
        """The same on another device."""
        return Features(self.table.to(device), self.known.to(device))


@dataclass(frozen=True)
class FeatureSettings:
    """Where features come from.

    Attributes:
        image: name of the pictures' features; ``pixels`` are computed here.
        text: of the texts'; ``words`` are computed here.
        fallback: of texts' features in the pictures' space (SigLIP's text tower), for items
            without a picture; ``words`` are computed here, ``none``: such items have zeros.
        missing_rate: share of pictures that are taken away, by a seeded draw.
        standardize: whether each dimension is given mean 0 and deviation 1.
        cache: where what is computed here is kept.
        seed: of the draw.
        instead: what to do where no item has a picture.
    """

    image: str
    text: str
    fallback: str
    missing_rate: float
    standardize: bool
    cache: Path
    seed: int
    instead: str = (
        "set item_repr: attribute and ire_features: [cf,text], or missing_image_rate: 1.0, which "
        "puts texts in their place"
    )

    @classmethod
    def of(cls, config: Any) -> FeatureSettings:
        """What a recommender's configuration says of them."""
        return cls(
            image=config["image_features"],
            text=config["text_features"],
            fallback=config["image_fallback"],
            missing_rate=config["missing_image_rate"],
            standardize=config["standardize"],
            cache=Path(config["cache_dir"]),
            seed=config["seed"],
        )


class FeatureReader:
    """Reads the features of a dataset's items.

    Args:
        settings: from where.
        content: the items.
        texts: what is to be said of each item by `words`. Length: V.
        show_progress: whether there is a bar where pictures are described.
    """

    def __init__(
        self,
        settings: FeatureSettings,
        content: ItemContent,
        texts: Sequence[str | None],
        show_progress: bool = False,
    ) -> None:
        self.settings, self.content, self.texts = settings, content, texts
        self.show_progress = show_progress

    def read(self, kind: str) -> Features:
        """The features of type ``img`` or ``text``.

        Raises:
            UserError: files are absent, broken, stale or of other items, or no item has any.
        """
        return self._images() if kind == "img" else self._texts()

    def _texts(self) -> Features:
        found = self._named("text_features", self.settings.text)
        if not found.known.any():
            raise UserError(
                f"text_features: no item of {self.content.dataset} has a text: set ire_features to "
                "types that it has, such as [cf]."
            )
        return self._scaled(found)

    def _images(self) -> Features:
        how = self.settings
        found = self._named("image_features", how.image)
        if not found.known.any() and how.missing_rate < 1:
            raise UserError(
                f"image_features: no item of {self.content.dataset} has a picture: {how.instead}."
            )
        shown = _without(found.known, how.missing_rate, how.seed)
        pictures = self._scaled(Features(found.table, shown))
        if how.fallback == "none" or bool(shown[1:].all()):
            return pictures
        instead = self._named("image_fallback", how.fallback, found.width)
        if instead.width != found.width:
            raise UserError(
                f"image_fallback: '{how.fallback}' has {instead.width} numbers an item and "
                f"'{how.image}' {found.width}: name features of the same encoder's text tower."
            )
        words = self._scaled(instead).table
        return Features(torch.where(shown[:, None], pictures.table, words), shown)

    def _scaled(self, found: Features) -> Features:
        if self.settings.standardize:
            return Features(standardized(found.table, found.known), found.known)
        return Features(found.table * found.known[:, None], found.known)

    def _named(self, key: str, name: str, width: int = _WORD_WIDTH) -> Features:
        content = self.content
        if name == PIXELS:
            pair = pixel_features(content, self.settings.cache, self.show_progress)
        elif name == WORDS:
            pair = word_features(self.texts, width)
        else:
            pair = self._stored(key, name).rows(content.item_tokens)
        return Features(torch.from_numpy(pair[0]), torch.from_numpy(pair[1]))

    def _stored(self, key: str, name: str) -> FeatureStore:
        folder, dataset = self.content.folder, self.content.dataset
        path = feature_paths(folder, dataset, name)[0]
        if not path.is_file():
            own, field = (PIXELS, "image") if key == "image_features" else (WORDS, "text")
            raise UserError(
                f"{key}: there is no {path}: make it with `python -m dataset_tools encode "
                f"{dataset} --encoder ENCODER --field {field} --name {name}`, or set {key}: {own}, "
                "which needs no weights."
            )
        store = FeatureStore.open_fresh(folder, dataset, name)
        known = {*store.info.items, *store.info.without}
        others = [token for token in self.content.item_tokens[1:] if token not in known]
        if others:
            raise UserError(
                f"{path} was made without item '{others[0]}' and {len(others) - 1} others of "
                f"{dataset}: encode it again with --force."
            )
        return store


def _without(known: Tensor, rate: float, seed: int) -> Tensor:
    """What is left once a share is taken away. Shape: (V,)."""
    rows = np.flatnonzero(known.numpy())
    gone = np.random.default_rng([seed, len(rows)]).permutation(rows)[: round(rate * len(rows))]
    left = known.clone()
    left[torch.from_numpy(gone)] = False
    return left


def rows_of(tables: Mapping[str, Features], items: Tensor) -> dict[str, Tensor]:
    """The features of some items by type. (n,) -> (n, width) each."""
    return {kind: found.table[items] for kind, found in tables.items()}

"""Encodes the texts or the pictures of a dataset's items: a feature matrix beside its files.

A killed command goes on where it was when it is given again.

  python -m dataset_tools encode amazon-beauty --encoder minilm --field text
"""

from __future__ import annotations

import argparse
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from recbole_mm.data.atomic import IMAGE, ITEM, PAD, read_columns
from recbole_mm.data.content import ItemContent
from recbole_mm.data.features import FeatureStore, feature_paths, hash_inputs, save_features
from recbole_mm.data.images import ImageStore
from recbole_mm.errors import UserError, nearest

if TYPE_CHECKING:
    from recbole_mm.backbone.encode import Encoder
    from recbole_mm.backbone.encode_items import ItemVectors
    from recbole_mm.backbone.encoder_source import EncoderSource

INTERRUPTED = "what was encoded is kept: the same command goes on where it was"
SEPARATOR = ". "
_MOST_CHARACTERS = 20_000  # of one attribute; more is not even looked at
_NEIGHBOURS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `python -m dataset_tools encode`."""
    add = parser.add_argument
    add("dataset", help="its name")
    add(
        "--encoder",
        required=True,
        metavar="siglip|clip|sbert|minilm|ID|FOLDER",
        help="a short name, an id of the Hugging Face hub or a local folder",
    )
    add("--field", required=True, choices=("text", "image"), help="what of the items")
    add("--attributes", default="title", metavar="A,B", help="of a text, in this order (title)")
    add("--name", help="of the features (the encoder's, with -text or -image where it does both)")
    add("--batch", type=int, default=64, metavar="N", help="texts or pictures at once (64)")
    add("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda (auto)")
    add("--data_path", default="dataset", help="where datasets lie (dataset)")
    add("--neighbours", type=int, default=0, metavar="N", help="show the nearest to N items (0)")
    add("--force", action="store_true", help="replace features of this name")


def run(arguments: argparse.Namespace) -> None:
    """Writes the features.

    Raises:
        UserError: no such dataset, attribute or encoder, an encoder that cannot do the field, or
            other features of this name stand there already.
    """
    if arguments.batch < 1:
        raise UserError(f"--batch is {arguments.batch}: it is 1 or more.")
    job = _job(arguments)
    if not _stands(job, arguments.force):
        _encode(job, arguments.batch, arguments.device)
    if arguments.neighbours > 0:
        _show_neighbours(job, arguments.neighbours)


@dataclass(frozen=True)
class _Job:
    """What is encoded, by what, and how the features are called."""

    content: ItemContent
    source: EncoderSource
    name: str
    fields: list[str]

    @property
    def place(self) -> tuple[Path, str, str]:
        """As the functions of `recbole_mm.data.features` take it."""
        return self.content.folder, self.content.dataset, self.name

    @property
    def items(self) -> list[str]:
        return self.content.item_tokens[1:]


def _job(arguments: argparse.Namespace) -> _Job:
    from recbole_mm.backbone.encoder_source import find_encoder

    folder = Path(arguments.data_path) / arguments.dataset
    rows = read_columns(folder / f"{folder.name}.inter", [ITEM])
    content = ItemContent(folder, folder.name, [PAD, *dict.fromkeys(item for [item] in rows)])
    fields = _fields(arguments, content)
    source = find_encoder(arguments.encoder)
    if arguments.field not in source.fields:
        raise UserError(
            f"Encoder '{arguments.encoder}' is a text encoder ({source.kind}): --field image takes "
            "siglip, clip or another model with an image tower."
        )
    return _Job(content, source, arguments.name or _name(source, arguments.field), fields)


def _fields(arguments: argparse.Namespace, content: ItemContent) -> list[str]:
    """What of an item is encoded; checks that the dataset has it."""
    if arguments.field == IMAGE:
        if not content.path(IMAGE).is_file():
            raise UserError(f"There is no {content.path(IMAGE)}: the dataset has no pictures.")
        return [IMAGE]
    asked = [name.strip() for name in arguments.attributes.split(",") if name.strip()]
    if not asked:
        raise UserError("--attributes names none: title, say.")
    for name in asked:
        if name not in content.attributes:
            known = ", ".join(content.attributes) or "none"
            raise UserError(
                f"--attributes: {content.path('text')} has no '{name}'"
                f"{nearest(name, content.attributes)}; it has: {known}."
            )
    return asked


def _name(source: EncoderSource, field: str) -> str:
    """What features are called by themselves."""
    short = Path(source.name).name or source.id  # of an id or a path the last part
    plain = re.sub(r"[^A-Za-z0-9._-]+|^[._-]+", "-", short).strip("-") or "features"
    return f"{plain}-{field}" if len(source.fields) > 1 else plain


def _stands(job: _Job, force: bool) -> bool:
    """Whether just these features are there already.

    Raises:
        UserError: others are, and they are not to be replaced.
    """
    matrix, about = feature_paths(*job.place)
    if force or not (matrix.exists() or about.exists()):
        return False
    try:
        info = FeatureStore.open_fresh(*job.place).info
    except UserError as error:
        raise UserError(f"{error} (--force encodes it again.)") from None
    made_of = (info.encoder, info.revision, info.fields, {*info.items, *info.without})
    asked = (job.source.id, job.source.revision, job.fields, {*job.items})
    if info.inputs is None or made_of != asked:
        raise UserError(
            f"{matrix} is of another encoder, revision, attributes or items: --force replaces it, "
            "--name gives the new one another name."
        )
    print(f"{matrix} is up to date.")
    return True


def _encode(job: _Job, batch: int, device: str) -> None:
    """Encodes, writes and reports; the log goes when the matrix stands."""
    from recbole_mm.backbone.encode import load_encoder
    from recbole_mm.backbone.encode_items import STRETCHED

    folder, dataset, name = job.place
    logs = folder / f".{dataset}.{name}.rows"
    encoder, images = load_encoder(job.source, device), ImageStore(job.content)
    began = time.perf_counter()
    found = _vectors(job, encoder, logs, images, batch)
    seconds = time.perf_counter() - began
    if not found.rows:
        raise UserError(f"No item of {folder} has {' or '.join(job.fields)} that can be encoded.")
    _save(job, found, encoder.pooling)
    shutil.rmtree(logs, ignore_errors=True)
    _summary(job, found, encoder.model, seconds)
    problems = {**images.problems, STRETCHED: found.stretched}
    for reason in filter(problems.get, problems):
        print(f"  without a row, {reason}: {problems[reason]:,}")


def _vectors(
    job: _Job, encoder: Encoder, logs: Path, images: ImageStore, batch: int
) -> ItemVectors:
    from torch import OutOfMemoryError

    from recbole_mm.backbone.encode_items import encode_images, encode_texts, open_log

    every = range(1, len(job.items) + 1)
    try:
        if job.fields == [IMAGE]:
            log = open_log(logs, encoder, IMAGE)
            files = job.content.image_paths
            first = {item: next(iter(files(item)), None) for item in every}
            return encode_images(encoder, every, images.get, first.get, log, batch, True)
        texts = [_text(job.content, item, job.fields) for item in every]
        log = open_log(logs, encoder, "text")
        return encode_texts(encoder, texts, log, batch, True)
    except OutOfMemoryError as error:
        raise UserError(
            f"{batch} at once take more memory than there is: the same command with a lower "
            "--batch goes on where it was."
        ) from error


def _save(job: _Job, found: ItemVectors, pooling: str) -> None:
    rows = set(found.rows)
    items = [job.items[row] for row in found.rows]
    without = [item for row, item in enumerate(job.items) if row not in rows]
    folder, dataset, name = job.place
    save_features(
        *(folder, dataset, name, found.matrix, items),
        encoder=job.source.id,
        revision=job.source.revision,
        pooling=pooling,
        inputs=hash_inputs(folder, dataset, items, without, job.fields),
        fields=job.fields,
        without=without,
    )


def _text(content: ItemContent, item: int, attributes: Sequence[str]) -> str:
    """What is encoded of an item: its values, cleaned as in prompts, those that say anything."""
    from recbole_mm.backbone.prompt import clean_text

    values = (content.text(item, name) or "" for name in attributes)
    return SEPARATOR.join(filter(None, (clean_text(value[:_MOST_CHARACTERS]) for value in values)))


def _summary(job: _Job, found: ItemVectors, model: Any, seconds: float) -> None:
    rows, width = found.matrix.shape
    precision = str(model.dtype).removeprefix("torch.")
    recalled = f", {found.recalled:,} kept of an earlier run" if found.recalled else ""
    print(
        f"{feature_paths(*job.place)[0]}: {len(job.items):,} items, {rows:,} rows of {width} "
        f"({found.matrix.dtype}), {len(job.items) - rows:,} without; {found.encoded:,} encoded in "
        f"{seconds:.1f} s on {model.device.type} ({precision}), {found.encoded / seconds:.0f} a "
        f"second{recalled}."
    )


def _show_neighbours(job: _Job, count: int) -> None:
    """Prints items, spread over the dataset, with those of other titles nearest to them."""
    store, content = FeatureStore.open(*job.place), job.content
    title = "title" if job.fields == [IMAGE] else job.fields[0]
    ids = {token: i for i, token in enumerate(content.item_tokens)}
    labels = [_label(content, ids[item], title) for item in store.info.items]
    matrix = np.asarray(store.matrix, dtype=np.float32)
    count = min(count, len(labels))
    for row in (i * len(labels) // count for i in range(count)):
        print(f"\n{labels[row]}")
        for other, cosine in nearest_rows(matrix, row, labels, _NEIGHBOURS):
            print(f"  {cosine:.3f}  {labels[other]}")


def _label(content: ItemContent, item: int, title: str) -> str:
    text = _text(content, item, [title]) if title in content.attributes else ""
    return text[:90] or content.item_tokens[item]


def nearest_rows(
    matrix: NDArray[np.float32], row: int, labels: Sequence[str], count: int
) -> list[tuple[int, float]]:
    """The rows of other labels with the highest cosine to a row, and their cosines.

    Args:
        matrix: shape (N, D).
        row: to which.
        labels: one a row; of rows that are called alike the nearest is named. Length: N.
        count: how many.
    """
    length = np.linalg.norm(matrix, axis=1)  # (N,)
    cosine = matrix @ matrix[row] / np.maximum(length * length[row], np.finfo(np.float32).tiny)
    found: dict[str, tuple[int, float]] = {}
    for other in np.argsort(-cosine, kind="stable").tolist():
        if len(found) == count:
            break
        if labels[other] != labels[row]:
            found.setdefault(labels[other], (other, float(cosine[other])))
    return list(found.values())

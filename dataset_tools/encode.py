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
    from recbole_mm.backbone.encode_items import ItemVectors
    from recbole_mm.backbone.encoder_source import EncoderSource

INTERRUPTED = "what was encoded is kept: the same command goes on where it was"
SEPARATOR = ". "
_MOST_CHARACTERS = 20_000  # of one attribute; more is not even looked at
_NEIGHBOURS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `python -m dataset_tools encode`."""
    add = parser.add_argument
    add("dataset", metavar="name", help="of the dataset")
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
    from recbole_mm.backbone.encoder_source import find_encoder

    if arguments.batch < 1:
        raise UserError(f"--batch is {arguments.batch}: it is 1 or more.")
    folder = Path(arguments.data_path) / arguments.dataset
    items = list(
        dict.fromkeys(item for [item] in read_columns(folder / f"{folder.name}.inter", [ITEM]))
    )
    content = ItemContent(folder, folder.name, [PAD, *items])
    fields = _fields(arguments, content)
    source = find_encoder(arguments.encoder)
    if arguments.field not in source.fields:
        raise UserError(
            f"Encoder '{arguments.encoder}' is a text encoder ({source.kind}): --field image takes "
            "siglip, clip or another model with an image tower."
        )
    name = arguments.name or _name(source, arguments.field)
    if not _stands(folder, name, source, fields, items, arguments.force):
        _encode(arguments, content, source, name, fields)
    if arguments.neighbours > 0:
        _show_neighbours(folder, name, content, arguments.neighbours)


def _fields(arguments: argparse.Namespace, content: ItemContent) -> list[str]:
    """What of an item is encoded; checks that the dataset has it."""
    if arguments.field == IMAGE:
        if not content.path(IMAGE).is_file():
            raise UserError(f"There is no {content.path(IMAGE)}: the dataset has no pictures.")
        return [IMAGE]
    asked = [name.strip() for name in arguments.attributes.split(",") if name.strip()]
    for name in asked:
        if name not in content.attributes:
            known = ", ".join(content.attributes) or "none"
            raise UserError(
                f"--attributes: {content.path('text')} has no '{name}'"
                f"{nearest(name, content.attributes)}; it has: {known}."
            )
    if not asked:
        raise UserError("--attributes names none: title, say.")
    return asked


def _name(source: EncoderSource, field: str) -> str:
    """What features are called by themselves."""
    short = Path(source.name).name or source.id  # of an id or a path the last part
    plain = re.sub(r"[^A-Za-z0-9._-]+|^[._-]+", "-", short).strip("-") or "features"
    return f"{plain}-{field}" if len(source.fields) > 1 else plain


def _stands(
    folder: Path,
    name: str,
    source: EncoderSource,
    fields: Sequence[str],
    items: Sequence[str],
    force: bool,
) -> bool:
    """Whether just these features are there already.

    Raises:
        UserError: others are, and they are not to be replaced.
    """
    matrix, about = feature_paths(folder, folder.name, name)
    if force or not (matrix.exists() or about.exists()):
        return False
    try:
        info = FeatureStore.open_fresh(folder, folder.name, name).info
    except UserError as error:
        raise UserError(f"{error} (--force encodes it again.)") from None
    same = (info.encoder, info.revision, info.fields) == (source.id, source.revision, fields)
    if not same or info.inputs is None or {*info.items, *info.without} != {*items}:
        raise UserError(
            f"{matrix} is of another encoder, revision, attributes or items: --force replaces it, "
            "--name gives the new one another name."
        )
    print(f"{matrix} is up to date.")
    return True


def _encode(
    arguments: argparse.Namespace,
    content: ItemContent,
    source: EncoderSource,
    name: str,
    fields: list[str],
) -> None:
    from recbole_mm.backbone.encode import load_encoder
    from recbole_mm.backbone.encode_items import open_log

    folder, dataset = content.folder, content.dataset
    encoder = load_encoder(source, arguments.device)
    logs = folder / f".{dataset}.{name}.rows"
    began = time.perf_counter()
    log = open_log(logs, encoder, arguments.field)
    images = ImageStore(content)
    found = _vectors(arguments, content, encoder, log, fields, images)
    seconds = time.perf_counter() - began
    rows, every = set(found.rows), content.item_tokens[1:]
    if not rows:
        raise UserError(f"No item of {folder} has {' or '.join(fields)} that can be encoded.")
    items = [every[row] for row in found.rows]
    without = [item for row, item in enumerate(every) if row not in rows]
    save_features(
        *(folder, dataset, name, found.matrix, items),
        encoder=source.id,
        revision=source.revision,
        pooling=encoder.pooling,
        inputs=hash_inputs(folder, dataset, items, without, fields),
        fields=fields,
        without=without,
    )
    shutil.rmtree(logs, ignore_errors=True)
    _summary(feature_paths(folder, dataset, name)[0], found, len(without), seconds, encoder.model)
    for reason, count in images.problems.items():
        print(f"  without a row, {reason}: {count:,}")


def _vectors(
    arguments: argparse.Namespace,
    content: ItemContent,
    encoder: Any,
    log: Any,
    fields: Sequence[str],
    images: ImageStore,
) -> ItemVectors:
    from recbole_mm.backbone.encode_items import encode_images, encode_texts

    every = range(1, len(content.item_tokens))
    how = {"batch": arguments.batch, "show_progress": True}
    if arguments.field == IMAGE:
        return encode_images(encoder, every, images.get, log, **how)
    return encode_texts(encoder, [_text(content, i, fields) for i in every], log, **how)


def _text(content: ItemContent, item: int, attributes: Sequence[str]) -> str:
    """What is encoded of an item: its values, cleaned as in prompts, those that say anything."""
    from recbole_mm.backbone.prompt import clean_text

    values = (content.text(item, name) or "" for name in attributes)
    return SEPARATOR.join(filter(None, (clean_text(value[:_MOST_CHARACTERS]) for value in values)))


def _summary(path: Path, found: ItemVectors, without: int, seconds: float, model: Any) -> None:
    rows, width = found.matrix.shape
    recalled = f", {found.recalled:,} kept of an earlier run" if found.recalled else ""
    print(
        f"{path}: {rows + without:,} items, {rows:,} rows of {width} ({found.matrix.dtype}), "
        f"{without:,} without; {found.encoded:,} encoded in {seconds:.1f} s on "
        f"{model.device.type} ({str(model.dtype).removeprefix('torch.')}), "
        f"{found.encoded / seconds:.0f} a second{recalled}."
    )


def _show_neighbours(folder: Path, name: str, content: ItemContent, count: int) -> None:
    """Prints items, spread over the dataset, with those of other titles nearest to them."""
    store = FeatureStore.open(folder, folder.name, name)
    title = next(iter(store.info.fields or []), IMAGE)
    title = title if title in content.attributes else "title"
    ids = {token: i for i, token in enumerate(content.item_tokens)}
    labels = [_label(content, ids[item], title) for item in store.info.items]
    matrix = np.asarray(store.matrix, dtype=np.float32)
    for row in range(0, len(labels), -(-len(labels) // count)):
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

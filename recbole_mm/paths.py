"""Where the property files are: beside the package (wheel) or beside the checkout, from any
directory."""

from __future__ import annotations

import os
from pathlib import Path

from recbole_mm.errors import UserError, nearest

_PACKAGE = Path(__file__).resolve().parent


def properties_dir() -> Path:
    """The folder of YAML files: `$RECBOLE_MM_PROPERTIES`, the wheel's copy, or the checkout's."""
    override = os.environ.get("RECBOLE_MM_PROPERTIES")
    candidates = (
        [Path(override)] if override else [_PACKAGE / "properties", _PACKAGE.parent / "properties"]
    )
    for folder in candidates:
        if (folder / "overall.yaml").is_file():
            return folder
    raise UserError(
        f"No property files in {' or '.join(map(str, candidates))}: reinstall recbole-mm "
        "or unset RECBOLE_MM_PROPERTIES."
    )


def property_file(kind: str, name: str) -> Path | None:
    """The YAML of a `model`, `dataset`, `backbone` or `paper` recipe, or None."""
    path = properties_dir() / kind / f"{name}.yaml"
    return path if path.is_file() else None


def recipe_or_path(name: str) -> Path:
    """What `--config_files` names: a file, or a recipe of `properties/paper/`.

    Raises:
        UserError: it is neither.
    """
    if Path(name).is_file():
        return Path(name)
    recipe = property_file("paper", name.removesuffix(".yaml"))
    if recipe:
        return recipe
    known = [path.stem for path in (properties_dir() / "paper").glob("*.yaml")]
    raise UserError(
        f"--config_files: '{name}' is neither a file nor a recipe{nearest(name, known)}; "
        f"recipes are: {', '.join(sorted(known)) or 'none'}."
    )

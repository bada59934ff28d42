"""Which columns of `NAME.item` feature models read, the zoo's and ours.

RecBole's own defaults name a column of ml-100k; here the dataset's header decides.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recbole_mm.errors import UserError
from recbole_mm.inner import inner_class

_KEYS = ("selected_features", "item_attribute")  # RecBole's, of FDSA, GRU4RecF, SASRecF and S3Rec
_ML_100K = "class"


def choose_item_features(config: Any) -> None:
    """Points a feature model's keys at the token columns of this dataset's `.item` file.

    Left alone: other models, keys the user has set, and datasets that have RecBole's default
    column. For a model with `optional_features` the key's default is None, and none may be there.

    Raises:
        UserError: the model needs features and the dataset has none.
    """
    final = config.final_config_dict
    path = Path(final["data_path"]) / f"{final['dataset']}.item"
    columns = _token_columns(path, final["field_separator"])
    features = [name for name in columns if name != final["ITEM_ID_FIELD"]]
    optional = _are_optional(config)
    if optional:
        wanted = ["selected_features"] if final["selected_features"] is None else []
    else:
        wanted = [key for key in _KEYS if final.get(key) in (_ML_100K, [_ML_100K])]
        wanted = [] if _ML_100K in columns else wanted
    if wanted and not (features or optional):
        raise UserError(
            f"{config['model']} needs item features, and {path} has no token column beside the "
            "item's id: add one (categories:token_seq, say), or take a model without features."
        )
    if wanted:
        _take(final, wanted, features)


def _are_optional(config: Any) -> bool:
    """Whether the model, or the one inside it, works without features too."""
    inner = inner_class(config.model_class, config.final_config_dict)
    return bool(getattr(inner or config.model_class, "optional_features", False))


def _take(final: dict[str, Any], wanted: list[str], features: list[str]) -> None:
    """Sets the keys, and what RecBole has to load for them."""
    for key in wanted:
        final[key] = features[0] if key == "item_attribute" else features
    if final["load_col"] is not None and features:  # None loads every column of every file
        final["load_col"] = {**final["load_col"], "item": [final["ITEM_ID_FIELD"], *features]}


def _token_columns(path: Path, separator: str) -> list[str]:
    """Token and token_seq columns of an atomic file, in its order."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8") as file:
        cells = [cell.partition(":") for cell in file.readline().rstrip("\n").split(separator)]
    return [name for name, _, kind in cells if kind in ("token", "token_seq")]

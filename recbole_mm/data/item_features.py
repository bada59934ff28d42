"""Which columns of `NAME.item` the zoo's feature models read.

RecBole's own defaults name a column of ml-100k; here the dataset's header decides.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recbole_mm.errors import UserError

_KEYS = ("selected_features", "item_attribute")  # RecBole's, of FDSA, GRU4RecF, SASRecF and S3Rec
_ML_100K = "class"


def choose_item_features(config: Any) -> None:
    """Points a feature model's keys at the token columns of this dataset's `.item` file.

    Left alone: other models, keys the user has set, and datasets that have RecBole's default
    column.

    Raises:
        UserError: the model needs features and the dataset has none.
    """
    final = config.final_config_dict
    wanted = [key for key in _KEYS if final.get(key) in (_ML_100K, [_ML_100K])]
    path = Path(final["data_path"]) / f"{final['dataset']}.item"
    columns = _token_columns(path, final["field_separator"])
    if not wanted or _ML_100K in columns:
        return
    features = [name for name in columns if name != final["ITEM_ID_FIELD"]]
    if not features:
        raise UserError(
            f"{config['model']} needs item features, and {path} has no token column beside the "
            "item's id: add one (categories:token_seq, say), or take a model without features."
        )
    values = {"selected_features": features, "item_attribute": features[0]}
    final.update({key: values[key] for key in wanted})
    if final["load_col"] is not None:  # None loads every column of every file
        final["load_col"] = {**final["load_col"], "item": [final["ITEM_ID_FIELD"], *features]}


def _token_columns(path: Path, separator: str) -> list[str]:
    """Token and token_seq columns of an atomic file, in its order."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8") as file:
        cells = [cell.partition(":") for cell in file.readline().rstrip("\n").split(separator)]
    return [name for name, _, kind in cells if kind in ("token", "token_seq")]

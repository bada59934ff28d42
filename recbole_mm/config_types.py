"""Types of keys: a value as a user writes it, in the type of its YAML default."""

from __future__ import annotations

from typing import Any

from recbole_mm.errors import UserError

# Keys whose default is `~` and which therefore have no type of their own.
NULL_KEYS: dict[str, tuple[type, ...]] = {
    "clip_grad_norm": (dict,),
    "rm_dup_inter": (str,),
    "val_interval": (dict,),
    "threshold": (dict,),
    "benchmark_filename": (list,),
    "train_neg_sample_args": (dict,),
    "selected_features": (list,),
    "eval_users": (int,),
    "limit_users": (int,),
    "stages": (list,),
}
# Keys that cannot be switched off by `None`.
NEEDED_KEYS = (
    *("metrics", "valid_metric", "topk", "eval_args"),
    *("attributes", "cache_dir", "n_buckets", "task"),
)


def _as_list(value: Any) -> list[Any] | None:
    if isinstance(value, str):  # also [a,b], which is no Python list
        words = value.strip().removeprefix("[").removesuffix("]").split(",")
        return [word.strip() for word in words if word.strip()]
    if isinstance(value, (list, tuple)):
        return list(value)
    return [value] if isinstance(value, int) and not isinstance(value, bool) else None


def _as_int(value: Any) -> int | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value % 1 != 0:
        return None  # also of an infinite one, whose remainder is NaN
    return int(value)


def _as_float(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _as_bool(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


def _as_str(value: Any) -> str | None:
    return None if value is None or isinstance(value, (bool, dict)) else str(value)


def _as_dict(value: Any) -> dict[str, Any] | None:
    return value if isinstance(value, dict) else None


_TYPE_NAMES = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "a dict",
}
_CONVERT = {
    bool: _as_bool,
    int: _as_int,
    float: _as_float,
    str: _as_str,
    list: _as_list,
    dict: _as_dict,
}


def convert(key: str, value: Any, default: Any) -> Any:
    """`value` in the type of the key's YAML default.

    Raises:
        UserError: it cannot be read so.
    """
    if default is None:
        allowed = NULL_KEYS.get(key)
        if allowed == (list,) and isinstance(value, (str, tuple)):
            return _as_list(value)
        is_true = isinstance(value, bool)  # to Python an int too
        if value is None or allowed is None or (isinstance(value, allowed) and not is_true):
            return value
        raise UserError(f"{key}: expected {_TYPE_NAMES[allowed[0]]} or None, got {value!r}.")
    if value is None and isinstance(default, (dict, str, list)) and key not in NEEDED_KEYS:
        return None  # RecBole's way to switch such a key off
    if "dropout" in key and isinstance(default, int):
        default = float(default)  # some of RecBole's YAML say 0
    converted = _CONVERT[type(default)](value) if type(default) in _CONVERT else value
    if converted is None:
        raise UserError(
            f"{key}: expected {_TYPE_NAMES[type(default)]} such as {default!r}, got {value!r}."
        )
    return converted

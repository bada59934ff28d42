"""Configuration: RecBole's, with our models and property files in it and every mistake told in one
sentence."""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from recbole_mm import compat
from recbole_mm.errors import UserError, nearest
from recbole_mm.paths import properties_dir, property_file, recipe_or_path
from recbole_mm.registry import get_model

compat.require_recbole()
compat.restore_numpy_aliases()

from recbole.config import Config  # noqa: E402
from recbole.utils import ModelType  # noqa: E402

from recbole_mm.config_checks import check_all  # noqa: E402

# Keys whose default is `~` and which therefore have no type of their own.
NULL_KEYS: dict[str, tuple[type, ...]] = {
    "clip_grad_norm": (dict,),
    "rm_dup_inter": (str,),
    "val_interval": (dict,),
    "threshold": (dict,),
    "benchmark_filename": (list,),
    "train_neg_sample_args": (dict,),
    "selected_features": (list,),
    "limit_users": (int,),
    "stages": (list,),
}
# Keys that cannot be switched off by `None`.
NEEDED_KEYS = ("metrics", "valid_metric", "topk", "eval_args")
# Keys that name the run itself or that RecBole reads without giving them a default.
RUN_KEYS = frozenset(
    [
        "model",
        "dataset",
        "config_files",
        "backbone",
        "stages",
        "nproc",
        "ip",
        "port",
        "world_size",
        "offset",
        "local_rank",
        "encoding",
        "contrast",
        "sim",
        "tail_ratio",
        "token_num_threshold",
        "use_filter",
        "eta",
        "norm",
        "transform",
        "gpu_id",
        "train_stage",
        "pre_model_path",
        "selected_features",
        "additional_feat_suffix",
        "dataset_command",
    ]
)
# What may differ between two calls of one and the same experiment.
VOLATILE_KEYS = frozenset(
    [
        "data_path",
        "checkpoint_dir",
        "device",
        "gpu_id",
        "use_gpu",
        "show_progress",
        "state",
        "worker",
        "save_every_s",
        "config_files",
        "config_file",
        "log_wandb",
        "wandb_project",
        "run_dir",
        "backbone_spec",
        "local_rank",
        "single_spec",
        "dataset_command",
        "MODEL_TYPE",
        "MODEL_INPUT_TYPE",
        "eval_type",
        "stages",
        "save_dataset",
        "dataset_save_path",
        "save_dataloaders",
        "dataloaders_save_path",
        "eval_batch_size",
        "valid_neg_sample_args",
        "test_neg_sample_args",
    ]
)


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads `1e-3` as a number, as RecBole's does."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?$"
        r"|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)
# A whole number stays an int: PyYAML asks the resolvers in order, so the int one must come first.
for _resolvers in _Loader.yaml_implicit_resolvers.values():
    _resolvers.sort(key=lambda pair: pair[0] != "tag:yaml.org,2002:int")


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        UserError: it is not readable YAML, or no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(
            f"{path}{line}: this is not valid YAML ({getattr(error, 'problem', error)})."
        ) from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected `key: value` lines, found a {type(content).__name__}.")
    return content


def parse_value(text: str) -> Any:
    """A flag's value as RecBole writes it: numbers, `None`, `[20,40]`, dicts; else the text. Never
    evaluated."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return {"true": True, "false": False}.get(text.lower(), text)


@cache
def _our_keys() -> frozenset[str]:
    """Every key of every property file."""
    found: set[str] = set()
    for kind in ("", "model", "dataset"):
        for path in (properties_dir() / kind).glob("*.yaml"):
            found.update(read_yaml(path))
    found.discard("per_model")
    for path in (properties_dir() / "backbone").glob("*.yaml"):
        content = read_yaml(path)
        found.update(content.get("settings") or {})
        found.update((content.get("tiny") or {}).get("settings") or {})
    return frozenset(found)


def _as_list(value: Any) -> list[Any] | None:
    if isinstance(value, str):  # also [a,b], which is no Python list
        words = value.strip().removeprefix("[").removesuffix("]").split(",")
        return [word.strip() for word in words if word.strip()]
    if isinstance(value, (list, tuple)):
        return list(value)
    return [value] if isinstance(value, int) and not isinstance(value, bool) else None


def _as_int(value: Any) -> int | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value):
        return None
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
        if value is None or allowed is None or isinstance(value, allowed):
            return value
        raise UserError(f"{key}: expected {_TYPE_NAMES[allowed[0]]} or None, got {value!r}.")
    if value is None and isinstance(default, (dict, str, list)) and key not in NEEDED_KEYS:
        return None  # RecBole's way to switch such a key off
    converted = _CONVERT[type(default)](value) if type(default) in _CONVERT else value
    if converted is None:
        raise UserError(
            f"{key}: expected {_TYPE_NAMES[type(default)]} such as {default!r}, got {value!r}."
        )
    return converted


class MMConfig(Config):
    """RecBole's `Config` with our models, property files, typed keys and no `eval`.

    Args:
        model: a name that `registry.get_model` knows.
        dataset: the folder's name under `data_path`.
        config_files: YAML files or names of recipes in `properties/paper/`.
        overrides: flags; strings are parsed by `parse_value`.

    Raises:
        UserError: an unknown model or key, a value of the wrong type, an impossible combination.
    """

    def __init__(
        self,
        model: str,
        dataset: str,
        config_files: Iterable[str] = (),
        overrides: Mapping[str, Any] | None = None,
    ) -> None:
        self._files, self._name = [str(recipe_or_path(name)) for name in config_files], model
        try:
            super().__init__(model, dataset, self._files, dict(overrides or {}))
        except (ValueError, TypeError, NotImplementedError, RuntimeError, AssertionError) as error:
            raise UserError(f"{model} on {dataset}: {error}") from error
        check_all(self.model, self.model_class, self.final_config_dict)

    # --- RecBole's hooks
    def compatibility_settings(self) -> None:
        compat.restore_numpy_aliases()
        compat.silence_deprecations()

    def _build_yaml_loader(self) -> type[yaml.SafeLoader]:
        return _Loader

    def _load_config_files(self, file_list: list[str]) -> dict[str, Any]:
        """Files in their order; `per_model: {SASRec: {...}}` holds what is for one model alone."""
        merged: dict[str, Any] = {}
        for file in file_list:
            merged.update(self._for_this_model(Path(file)))
        return merged

    def _for_this_model(self, path: Path) -> dict[str, Any]:
        content = read_yaml(path)
        own = (content.pop("per_model", None) or {}).get(self._name) or {}
        return {**content, **own}

    def _convert_config_dict(self, config_dict: dict[str, Any]) -> dict[str, Any]:
        return {k: parse_value(v) if isinstance(v, str) else v for k, v in config_dict.items()}

    def _load_cmd_line(self) -> dict[str, Any]:
        return {}  # our command line hands its flags over as `overrides`

    def _get_model_and_dataset(self, model: str, dataset: str) -> tuple[str, type, str]:
        return super()._get_model_and_dataset(get_model(model), dataset)

    def _load_internal_config_dict(self, model: str, model_class: Any, dataset: str) -> None:
        super()._load_internal_config_dict(model, model_class, dataset)
        recbole_own = dict(self.internal_config_dict)
        self._lay(properties_dir() / "overall.yaml")
        self._lay(property_file("model", model))
        dataset_file = property_file("dataset", dataset)
        self._lay_backbone(self._for_this_model(dataset_file) if dataset_file else {})
        self._lay(dataset_file)
        self._suit_model_type(model_class, recbole_own)
        self._settle_keys()

    # --- our layers
    def _lay(self, path: Path | None) -> None:
        if path is not None:
            self.internal_config_dict.update(self._for_this_model(path))

    def _lay_backbone(self, dataset_yaml: Mapping[str, Any]) -> None:
        """The backbone's own settings stand above the model's YAML and below the dataset's."""
        default = self.internal_config_dict.get("backbone")
        if default is None:
            return
        named = self.external_config_dict.get("backbone", dataset_yaml.get("backbone", default))
        spec, settings = resolve_backbone(str(named), str(default))
        self.internal_config_dict.update(settings)
        self.internal_config_dict["backbone_spec"] = spec

    def _suit_model_type(self, model_class: Any, recbole_own: Mapping[str, Any]) -> None:
        internal = self.internal_config_dict
        if model_class.type in (ModelType.CONTEXT, ModelType.DECISIONTREE):
            for key in ("eval_args", "metrics", "valid_metric", "eval_batch_size"):
                internal[key] = recbole_own[key]
        if model_class.type == ModelType.SEQUENTIAL:
            internal["repeatable"] = True
            loss = self.external_config_dict.get("loss_type", internal.get("loss_type"))
            if loss == "CE" and not hasattr(model_class, "input_type"):
                internal["train_neg_sample_args"] = None  # every item is a negative
        if internal["load_col"] == {
            "inter": ["user_id", "item_id"]
        }:  # RecBole's sample.yaml: no time
            internal["load_col"] = {"inter": ["user_id", "item_id", "timestamp"]}

    def _settle_keys(self) -> None:
        """Checks the names and types of everything the user set."""
        known = {*self.internal_config_dict, *_our_keys(), *RUN_KEYS, *NULL_KEYS}
        for arguments in self.parameters.values():
            known.update(arguments)
        for key, value in self.external_config_dict.items():
            if key not in known:
                raise UserError(
                    f"{self._where(key)}: there is no key '{key}'{nearest(key, known)}."
                )
            default = self.internal_config_dict.get(key)
            self.external_config_dict[key] = convert(key, value, default)

    def _where(self, key: str) -> str:
        return f"--{key}" if key in self.variable_config_dict else (self._files or ["config"])[-1]

    # --- what others read
    @property
    def protocol(self) -> str:
        """The evaluation protocol's name in the result: full, full-masked, cand100 or cand20; or
        labeled, where RecBole's context-aware models tell clicks from others and rank nothing."""
        if self["eval_args"]["mode"]["test"] == "labeled":
            return "labeled"
        if self["eval_candidates"] != "full":
            return str(self["eval_candidates"])
        return "full-masked" if self["mask_history"] else "full"

    def settings(self) -> dict[str, Any]:
        """What the experiment depends on, as plain values: goes into `config.yaml` and the hash."""
        plain = {k: _plain(v) for k, v in self.final_config_dict.items() if k not in VOLATILE_KEYS}
        spec = self.final_config_dict.get("backbone_spec")
        return {**plain, **({"backbone_spec": _plain(spec)} if spec else {})}

    def hash(self) -> str:
        """The first 12 hex digits of the SHA-256 of `settings()`."""
        text = json.dumps(self.settings(), sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def _plain(value: Any) -> Any:
    """Plain YAML values, whatever enum or tuple RecBole put in."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(v) for v in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def resolve_backbone(name: str, default: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A backbone's description and the model keys it sets.

    Args:
        name: a file of `properties/backbone/`, `tiny` (the tiny form of the model's own default
            family),
            `tiny-FAMILY`, or a local folder with weights of the default's family.
        default: the model's own backbone, from its YAML.

    Returns:
        The mapping `load_backbone` takes, with `name`, `is_tiny` and `tiny` (sizes) in it; the
        settings.

    Raises:
        UserError: no such backbone.
    """
    is_tiny = name == "tiny" or name.startswith("tiny-")
    is_folder = not is_tiny and property_file("backbone", name) is None and Path(name).is_dir()
    base = (
        default if name == "tiny" or is_folder else name.removeprefix("tiny-") if is_tiny else name
    )
    path = property_file("backbone", base)
    if path is None:
        known = sorted(p.stem for p in (properties_dir() / "backbone").glob("*.yaml"))
        raise UserError(
            f"--backbone: there is no backbone '{name}'{nearest(name, ['tiny', *known])}; "
            f"known are tiny, {', '.join(known)} and any local folder."
        )
    spec = read_yaml(path)
    tiny = dict(spec.pop("tiny", None) or {})
    settings = spec.pop("settings", None) or {}
    tiny_settings = tiny.pop("settings", None) or {}
    spec |= {"name": name, "is_tiny": is_tiny, "tiny": tiny}
    if is_folder:
        spec["model"] = name
    return spec, {**settings, **(tiny_settings if is_tiny else {})}

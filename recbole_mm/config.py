"""Configuration: RecBole's, with our models and property files in it and every mistake told in one
sentence."""

from __future__ import annotations

import ast
import hashlib
import importlib
import json
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from recbole_mm import compat
from recbole_mm.errors import UserError, nearest
from recbole_mm.paths import properties_dir, property_file, recipe_or_path
from recbole_mm.registry import MENDED, MODELS, get_model, model_names, zoo_models
from recbole_mm.stage import STAGE_KEYS
from recbole_mm.yaml_files import Loader, read_yaml

compat.require_recbole()
compat.restore_numpy_aliases()

import recbole  # noqa: E402
from recbole.config import Config  # noqa: E402
from recbole.utils import ModelType  # noqa: E402

from recbole_mm.config_checks import check_all, check_values  # noqa: E402
from recbole_mm.config_types import NULL_KEYS, convert  # noqa: E402
from recbole_mm.inner import find_inner  # noqa: E402

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
# What RecBole's transforms write into the configuration once data are loaded.
_FIELDS_OF_TRANSFORMS = (
    *("MASK_INDEX", "MASK_ITEM_SEQ", "POS_ITEMS", "NEG_ITEMS", "INVERSE_ITEM_SEQ"),
    *("CROP_ITEM_SEQ", "CROP_ITEM_SEQ_LEN", "REORDER_ITEM_SEQ"),
)
# Users a step with `train_mode: whole`, if no YAML says another; RecBole's 2048 are single targets.
_WHOLE_USERS = 128
# Keys of a backbone's description that its `settings` may hold, see `BackboneSpec`.
SPEC_KEYS = ("dtype", "quantize", "attention", "min_pixels", "max_pixels", "image_pooling")
# What may differ between two calls of one and the same experiment.
VOLATILE_KEYS = frozenset(
    [
        *_FIELDS_OF_TRANSFORMS,
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
        "text_backbone_spec",
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


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """One layer over another: keys replace each other, but `eval_args` keeps what the upper layer
    leaves out; else RecBole would fill it in with a random split."""
    both = {**below, **above}
    if isinstance(below.get("eval_args"), dict) and isinstance(above.get("eval_args"), dict):
        both["eval_args"] = {**below["eval_args"], **above["eval_args"]}
    return both


def _is_model(name: str) -> bool:
    """Whether a model is called so, without importing all of them."""
    path = zoo_models().get(name.lower())
    if name in MODELS or name in MENDED or path is None:
        return name in MODELS or name in MENDED
    try:
        return hasattr(importlib.import_module(path), name)
    except ImportError:  # its own package is not installed
        return True


def _own_keys(path: Path, per_model: Any, model: str) -> dict[str, Any]:
    """What a file's `per_model` holds for one model."""
    if not isinstance(per_model, dict):
        raise UserError(f"{path}: per_model: expected `Model: {{key: value}}`, got {per_model!r}.")
    for name, keys in per_model.items():
        if not _is_model(str(name)):
            raise UserError(
                f"{path}: per_model: there is no model '{name}'{nearest(str(name), model_names())}."
            )
        if not isinstance(keys, dict):
            raise UserError(f"{path}: per_model: {name}: expected {{key: value}}, got {keys!r}.")
    return per_model.get(model) or {}


class MMConfig(Config):
    """RecBole's `Config` with our models, property files, typed keys and no `eval`.

    Args:
        model: a name that `registry.get_model` knows.
        dataset: the folder's name under `data_path`.
        config_files: YAML files or names of recipes in `properties/paper/`.
        overrides: flags; strings are parsed by `parse_value`.

    Raises:
        UserError: an unknown model or key, a value of the wrong type, an impossible combination.

    Attributes:
        warnings: a sentence for each flag, or file, with keys that only other models have.
    """

    internal_config_dict: dict[str, Any]
    external_config_dict: dict[str, Any]

    def __init__(
        self,
        model: str,
        dataset: str,
        config_files: Iterable[str] = (),
        overrides: Mapping[str, Any] | None = None,
    ) -> None:
        if not dataset or Path(dataset).name != dataset:
            raise UserError(
                f"--dataset: '{dataset}' is no name: --dataset is a name; its place is --data_path."
            )
        self._name, self._file_of = model, dict[str, str]()
        self.warnings: list[str] = []
        files = [str(recipe_or_path(name)) for name in config_files]
        try:
            super().__init__(model, dataset, files, dict(overrides or {}))
        except (ValueError, TypeError, NotImplementedError, RuntimeError, AssertionError) as error:
            raise UserError(f"{model} on {dataset}: {error}") from error
        check_all(self.model, self.model_class, self.final_config_dict)

    # --- RecBole's hooks
    def compatibility_settings(self) -> None:
        compat.restore_numpy_aliases()
        compat.silence_deprecations()

    def _build_yaml_loader(self) -> type[yaml.SafeLoader]:
        return Loader

    def _load_config_files(self, file_list: list[str]) -> dict[str, Any]:
        """Files in their order; `per_model: {SASRec: {...}}` holds what is for one model alone."""
        merged: dict[str, Any] = {}
        for file in file_list:
            content = self._for_this_model(Path(file))
            self._file_of.update(dict.fromkeys(content, file))
            merged = _over(merged, content)
        return merged

    def _merge_external_config_dict(self) -> None:
        self.external_config_dict = _over(self.file_config_dict, self.variable_config_dict)

    def _for_this_model(self, path: Path) -> dict[str, Any]:
        content = read_yaml(path)
        per_model = content.pop("per_model", None)
        for key in ("variants", "compare"):  # of the whole command, see `jobs`
            content.pop(key, None)
        return (
            content if per_model is None else _over(content, _own_keys(path, per_model, self._name))
        )

    def _convert_config_dict(self, config_dict: dict[str, Any]) -> dict[str, Any]:
        return {k: parse_value(v) if isinstance(v, str) else v for k, v in config_dict.items()}

    def _load_cmd_line(self) -> dict[str, Any]:
        return {}  # our command line hands its flags over as `overrides`

    def _get_model_and_dataset(self, model: str, dataset: str) -> tuple[str, type, str]:
        model_class = get_model(model)
        return model, *super()._get_model_and_dataset(model_class, dataset)[1:]

    def _load_internal_config_dict(self, model: str, model_class: Any, dataset: str) -> None:
        super()._load_internal_config_dict(model, model_class, dataset)
        recbole_own = dict(self.internal_config_dict)
        self._lay(properties_dir() / "overall.yaml")
        dataset_file = property_file("dataset", dataset)
        dataset_yaml = self._for_this_model(dataset_file) if dataset_file else {}
        self._lay_inner(model, model_class, dataset_yaml)
        ours = [cls.__name__ for cls in reversed(model_class.__mro__) if cls.__name__ in MODELS]
        for name in dict.fromkeys((*ours, model_class.__name__, model)):  # its bases' and aliases'
            self._lay(property_file("model", name))
        self._lay_backbone(dataset_yaml)
        self._lay(dataset_file)
        self._suit_model_type(model_class, recbole_own)
        self._settle_keys(model_class)
        check_values(
            model, model_class, _over(self.internal_config_dict, self.external_config_dict)
        )

    def _set_default_parameters(self) -> None:
        """On candidate lists AUC stands beside ranks, which RecBole's own loaders cannot do."""
        final = self.final_config_dict
        asked = final["metrics"]
        if final["eval_candidates"] != "full" and isinstance(asked, list):
            ranks = [name for name in asked if str(name).lower() != "auc"]
            final["metrics"] = ranks or ["GAUC"]
            super()._set_default_parameters()
            final["metrics"] = asked
        else:
            super()._set_default_parameters()

    # --- our layers
    def _lay(self, path: Path | None) -> None:
        if path is not None:
            above = self._for_this_model(path)
            self.internal_config_dict = _over(self.internal_config_dict, above)

    def _lay_inner(self, model: str, model_class: Any, dataset_yaml: Mapping[str, Any]) -> None:
        """A model inside a model, PRIME's `retriever`: its YAML stands below the model's own."""
        key = getattr(model_class, "inner_model", None)
        if key is None:
            return
        default = read_yaml(property_file("model", model) or Path())[key]
        name = str(self.external_config_dict.get(key, dataset_yaml.get(key, default)))
        find_inner(model, model_class, name)
        recboles = Path(recbole.__file__).parent / "properties" / "model" / f"{name}.yaml"
        for path in (recboles if recboles.is_file() else None, property_file("model", name)):
            self._lay(path)

    def _lay_backbone(self, dataset_yaml: Mapping[str, Any]) -> None:
        """The backbone's own settings stand above the model's YAML and below the dataset's."""
        internal, external = self.internal_config_dict, self.external_config_dict
        default = internal.get("backbone")
        if default is None:
            return
        named = external.get("backbone", dataset_yaml.get("backbone", default))
        spec, settings = resolve_backbone(str(named), str(default))
        second = internal.get("text_backbone")  # before the settings: they may name another
        internal.update(settings)
        internal["backbone_spec"] = spec
        if second is not None:
            named = dataset_yaml.get("text_backbone", internal["text_backbone"])
            named = external.get("text_backbone", named)
            own = second_backbone(str(named), str(second))
            for key in ("dtype", "quantize"):
                value = external.get(key, dataset_yaml.get(key))
                if value and not own["is_tiny"]:  # a run's key reaches both
                    own[key] = str(value)
            internal["text_backbone_spec"] = own

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
        mode = self.external_config_dict.get("train_mode", internal["train_mode"])
        if mode == "whole" and internal["train_batch_size"] == recbole_own["train_batch_size"]:
            internal["train_batch_size"] = _WHOLE_USERS
        if internal["load_col"] == {
            "inter": ["user_id", "item_id"]
        }:  # RecBole's sample.yaml: no time
            internal["load_col"] = {"inter": ["user_id", "item_id", "timestamp"]}

    def _settle_keys(self, model_class: Any) -> None:
        """Checks the names and types of everything the user set."""
        internal, external = self.internal_config_dict, self.external_config_dict
        of_stages = _stage_keys(model_class)
        own = {*internal, *RUN_KEYS, *NULL_KEYS, *of_stages}
        own.update(*self.parameters.values())
        idle: dict[str, list[str]] = {}  # flag or file -> keys
        for key, value in external.items():
            where = self._where(key)
            if key not in own and key not in _our_keys():
                raise UserError(f"{where}: {self._name} has no key '{key}'{nearest(key, own)}.")
            if key not in own:
                idle.setdefault(where, []).append(key)
            external[key] = convert(key, value, internal.get(key, of_stages.get(key)))
        self.warnings += [
            f"{where}: changes nothing, only models other than {self._name} have {', '.join(keys)}."
            for where, keys in idle.items()
        ]
        if "eval_args" in external:
            external["eval_args"] = _over(internal, external)["eval_args"]

    def _where(self, key: str) -> str:
        return f"--{key}" if key in self.variable_config_dict else self._file_of[key]

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

    @property
    def split(self) -> str:
        """How interactions are split and ordered, e.g. LS/TO: each user's last ones by time."""
        if self["benchmark_filename"]:
            return "ready-made"
        return f"{next(iter(self['eval_args']['split']))}/{self['eval_args']['order']}"

    def settings(self) -> dict[str, Any]:
        """What the experiment depends on, as plain values: goes into `config.yaml` and the hash."""
        plain = {k: _plain(v) for k, v in self.final_config_dict.items() if k not in VOLATILE_KEYS}
        for key in ("backbone_spec", "text_backbone_spec"):
            spec = self.final_config_dict.get(key)
            plain |= {key: _plain(spec)} if spec else {}
        return plain

    def hash(self) -> str:
        """The first 12 hex digits of the SHA-256 of `settings()`."""
        text = json.dumps(self.settings(), sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def _stage_keys(model_class: Any) -> dict[str, Any]:
    """`<stage>_<key>` of a model that trains in stages; `<stage>_from` is whose weights to take."""
    stages = model_class.stage_names if hasattr(model_class, "make_stages") else ()
    keys = {**STAGE_KEYS, "from": ""}
    return {f"{stage}_{key}": value for stage in stages for key, value in keys.items()}


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
            family), `tiny-NAME` with a file's name or its beginning (`tiny-llava`), or a local
            folder with weights of the family that its `config.json` names, else the default's.
        default: the model's own backbone, from its YAML.

    Returns:
        The mapping `load_backbone` takes, with `name`, `is_tiny` and `tiny` (sizes) in it; the
        settings.

    Raises:
        UserError: no such backbone.
    """
    is_tiny = name == "tiny" or name.startswith("tiny-")
    is_folder = not is_tiny and property_file("backbone", name) is None and Path(name).is_dir()
    if name == "tiny":
        path = property_file("backbone", default)
    elif is_folder:
        path = _file_of_folder(Path(name), default)
    else:
        path = _tiny_file(name) if is_tiny else property_file("backbone", name)
    if path is None:
        known = _backbones()
        names = ["tiny", *known, *(f"tiny-{stem.partition('-')[0]}" for stem in known)]
        raise UserError(
            f"--backbone: there is no backbone '{name}'{nearest(name, names)}; "
            f"known are tiny, tiny-NAME (tiny-llava), {', '.join(known)} and any local folder."
        )
    spec = read_yaml(path)
    tiny = dict(spec.pop("tiny", None) or {})
    settings = spec.pop("settings", None) or {}
    tiny_settings = tiny.pop("settings", None) or {}
    spec |= {"name": name, "is_tiny": is_tiny, "tiny": tiny}
    if is_folder:
        spec["model"] = name
    return spec, {**settings, **(tiny_settings if is_tiny else {})}


def second_backbone(name: str, default: str) -> dict[str, Any]:
    """The description of a backbone beside the first, with its own settings in it: plain keys are
    those of the first. Raises `UserError` as `resolve_backbone`."""
    try:
        spec, settings = resolve_backbone(name, default)
    except UserError as error:
        raise UserError(str(error).replace("--backbone", "--text_backbone")) from error
    own = {key: settings[key] for key in SPEC_KEYS if key in settings}
    return {**spec, **own}


def _backbones() -> list[str]:
    """Names of the files of `properties/backbone/`."""
    return sorted(path.stem for path in (properties_dir() / "backbone").glob("*.yaml"))


def _tiny_file(name: str) -> Path | None:
    """The file whose tiny form `tiny-NAME` is: the first that is called so or begins so."""
    wanted = name.removeprefix("tiny-")
    stem = next((s for s in _backbones() if s == wanted or s.startswith(f"{wanted}-")), None)
    return None if stem is None else property_file("backbone", stem)


def _file_of_folder(folder: Path, default: str) -> Path | None:
    """The file of the family that a folder's weights are of, as far as it says."""
    config = folder / "config.json"
    family = read_yaml(config).get("model_type") if config.is_file() else None
    files = [property_file("backbone", stem) for stem in (default, *_backbones())]
    return next((f for f in files if f and read_yaml(f)["family"] == family), files[0])

"""Name -> model and trainer, as dotted names that are imported on demand: ours first, then
RecBole's."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from typing import Any

from recbole_mm.errors import UserError, nearest

MODELS = {
    "ComiRec": "recbole_mm.model.comirec:ComiRec",
    "FMLPRec": "recbole_mm.model.fmlprec:FMLPRec",
    "ILLMRec": "recbole_mm.model.illmrec:ILLMRec",
    "LRURec": "recbole_mm.model.lrurec:LRURec",
    "LlamaRec": "recbole_mm.model.prime:PRIME",  # an alias: its YAML stands above PRIME's
    "MLLMMSR": "recbole_mm.model.mllmmsr:MLLMMSR",
    "MLLMMSRRerank": "recbole_mm.model.mllmmsr_rerank:MLLMMSRRerank",
    "MLP4Rec": "recbole_mm.model.mlp4rec:MLP4Rec",
    "PRIME": "recbole_mm.model.prime:PRIME",
    "RARec": "recbole_mm.model.rarec:RARec",
    "VBPR": "recbole_mm.model.vbpr:VBPR",
}

# RecBole's models, mended in subclasses of the same name.
MENDED: dict[str, str] = {
    **{
        name: f"recbole_mm.model.zoo_graph:{name}"
        for name in ("GCMC", "LightGCN", "NCL", "NGCF", "SpectralCF")
    },
    **{
        name: f"recbole_mm.model.zoo:{name}"
        for name in (
            *("BERT4Rec", "DiffRec", "GRU4Rec", "KSR", "LDiffRec", "MacridVAE"),
            *("MultiVAE", "Pop", "RaCT", "Random", "RippleNet", "S3Rec", "SASRec"),
        )
    },
}

TRAINERS = {
    "ILLMRec": "recbole_mm.trainer.staged:StagedTrainer",
    "LRURec": "recbole_mm.trainer.staged:StagedTrainer",
    "LlamaRec": "recbole_mm.trainer.staged:StagedTrainer",
    "MLLMMSR": "recbole_mm.trainer.staged:StagedTrainer",
    "MLLMMSRRerank": "recbole_mm.trainer.staged:StagedTrainer",
    "PRIME": "recbole_mm.trainer.staged:StagedTrainer",
    "RARec": "recbole_mm.trainer.staged:StagedTrainer",
    "RaCT": "recbole_mm.trainer.special:PhasedTrainer",
    "RecVAE": "recbole_mm.trainer.special:RecVAETrainer",
    "S3Rec": "recbole_mm.trainer.special:PhasedTrainer",
}

_ZOO_ROOMS = ("general", "sequential", "context_aware", "knowledge_aware")


def _load(dotted: str) -> Any:
    module, _, name = dotted.partition(":")
    return getattr(importlib.import_module(module), name)


def zoo_models() -> dict[str, str]:
    """RecBole's models, lower-case file name -> dotted module."""
    found = {}
    for room in _ZOO_ROOMS:
        package = f"recbole.model.{room}_recommender"
        spec = importlib.util.find_spec(package)  # to import it would import all its models
        for module in pkgutil.iter_modules(spec.submodule_search_locations if spec else None):
            found[module.name] = f"{package}.{module.name}"
    return found


def model_names() -> list[str]:
    """Every name that `--model` takes."""
    return sorted({*MODELS, *MENDED, *(_zoo_class_name(path) for path in zoo_models().values())})


def _zoo_class_name(module_path: str) -> str:
    """A zoo module holds one public recommender whose name is the file's but for its capitals."""
    stem = module_path.rsplit(".", 1)[1]
    try:
        module = importlib.import_module(module_path)
    except ImportError:  # a model whose extra package is not installed
        return stem
    members = vars(module).items()
    return next((k for k, v in members if k.lower() == stem and isinstance(v, type)), stem)


def is_zoo(name: str) -> bool:
    """Whether a model is RecBole's own (mended or not)."""
    return name not in MODELS


def get_model(name: str) -> type:
    """The model class called `name`.

    Raises:
        UserError: there is none; names the nearest, or the package that the model needs.
    """
    if name in MODELS or name in MENDED:
        return _load((MODELS | MENDED)[name])
    path = zoo_models().get(name.lower())
    if path is None or _zoo_class_name(path) != name:
        raise UserError(f"--model: there is no model '{name}'{nearest(name, model_names())}.")
    try:
        return getattr(importlib.import_module(path), name)
    except ImportError as error:
        raise UserError(
            f"Model {name} needs the package '{error.name}': pip install it."
        ) from error


def get_trainer_base(model_type: Any, name: str) -> type:
    """The trainer class that `name` is trained by: ours, or what RecBole picks."""
    if name in TRAINERS:
        return _load(TRAINERS[name])
    from recbole.utils import get_trainer

    return get_trainer(model_type, name)

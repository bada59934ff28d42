"""From a model's name and a dataset's to a trained model and its result: what the command line
calls."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import Any

from recbole_mm import compat, machine, registry
from recbole_mm.config import VOLATILE_KEYS, MMConfig, parse_value
from recbole_mm.errors import UserError, nearest
from recbole_mm.report.places import PLACES, write_places
from recbole_mm.report.slices import by_history, by_popularity, warm_and_cold
from recbole_mm.trainer.checkpoint import write_json
from recbole_mm.trainer.run import Run, check_given, check_same, earlier_run, same_run

# What a trained run can be evaluated with, beside the keys that change no number at all.
_MEASURES = (
    *("mask_history", "eval_candidates", "metrics", "topk", "valid_metric", "history_slices"),
    "popularity_slices",
)
_RANKER_AT_WORK = (
    "fusion",
    "candidate_order",
    "candidate_mask_history",
    "score_tokens",
    "attention",
)
EVALUATION_KEYS = frozenset([*_MEASURES, *_RANKER_AT_WORK])
# Keys of a stored configuration that are given otherwise.
_DERIVED = ("model", "dataset", "backbone_spec", "text_backbone_spec")
_NOT_WHEN_LOADED = ("stages", "config_files")
DEMOS = ("mm-demo", "mm-demo-permuted")  # made on first use


@dataclass
class Data:
    """The three loaders of a run and the dataset they were cut from."""

    dataset: Any
    train: Any
    valid: Any
    test: Any


def run(
    model: str,
    dataset: str,
    config_files: Iterable[str] = (),
    overrides: Mapping[str, Any] | None = None,
    resume: bool = False,
    one_of_several: bool = False,
    may_extend: bool = True,
) -> dict[str, Any]:
    """Trains and tests one model.

    Args:
        model: e.g. `PRIME`, `SASRec`.
        dataset: a folder under `data_path`.
        config_files: YAML files or recipes.
        overrides: keys of the configuration; strings are parsed as flags are.
        resume: go on with the newest unfinished run of this configuration.
        one_of_several: with `resume`, a finished run of the same stages gives its stored result
            and a missing one is started.
        may_extend: whether that may go on with a run of the first of its stages.

    Returns:
        The result, as `--result_file` stores it.

    Raises:
        UserError: a mistake in names, keys, values or data.
    """
    config = _configure(model, dataset, config_files, overrides)
    named = config["stages"] if "stages" in config.external_config_dict else ()
    if resume and one_of_several:
        place = same_run(config, may_extend)
        finished = place is not None and place.state["status"] == "finished"
        if place and finished and place.has_trained(config["stages"]):
            return dict(json.loads((place.folder / "result.json").read_text(encoding="utf-8")))
        return _work(config, place or earlier_run(config, False, _earlier_stages(config)), named)
    return _work(config, earlier_run(config, resume, _earlier_stages(config)), named)


def go_on(folder: str, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Goes on with one run, in the configuration that it was started with.

    Args:
        folder: `saved/<model>-<dataset>-<id>`.
        overrides: keys that change no number, and `stages`.

    Raises:
        UserError: there is no such run, or a key differs from the run's.
    """
    place = Run.open(Path(folder))
    asked = {"stages": place.state["asked"]} if place.state.get("asked") else {}
    config = _config_of(place, {**asked, **(overrides or {})})
    check_same(place, config)
    return _work(config, place, config["stages"] if "stages" in (overrides or {}) else ())


def check(
    model: str, dataset: str, config_files: Iterable[str], overrides: Mapping[str, Any]
) -> MMConfig:
    """The configuration of a run to come.

    Raises:
        UserError: what can be known to fail before anything is trained.
    """
    config = _configure(model, dataset, config_files, overrides)
    if dataset not in DEMOS:
        ensure_dataset(config)
    return config


def _configure(
    model: str, dataset: str, config_files: Iterable[str], overrides: Mapping[str, Any] | None
) -> MMConfig:
    """The whole configuration, with what the dataset's files and runs it names say about it."""
    from recbole_mm.data.item_features import choose_item_features

    config = MMConfig(model, dataset, config_files, overrides)
    if Path(config["data_path"]).is_dir():  # else it is still to be made, or missing
        choose_item_features(config)
    for stage in getattr(config.model_class, "stage_names", ()):
        if config[f"{stage}_from"]:
            check_given(stage, config[f"{stage}_from"])
    return config


def load(folder: str, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Evaluates a finished run again; its folder stays as it is.

    Args:
        folder: `saved/<model>-<dataset>-<id>`.
        overrides: keys that change no weights: `EVALUATION_KEYS` and those of the machine, such as
            `data_path`, when the data are not where they were.

    Raises:
        UserError: there is no such run, it is not finished, or a key would change its weights.
    """
    place, config = _finished(folder, overrides or {})
    return _work(config, place, train=False)


def trained(folder: str, overrides: Mapping[str, Any] | None = None) -> tuple[Data, Any]:
    """The data of a finished run of a model of ours, and the model with its best weights.

    Args:
        folder: as `load` takes it.
        overrides: likewise.

    Raises:
        UserError: as `load`.
    """
    from recbole_mm.trainer.staged import StagedTrainer

    place, config = _finished(folder, overrides or {})
    _start_logging(config)
    data = prepare_data(config)
    model = build_model(config, data)
    StagedTrainer(config, model, place).load(data.train, data.valid)
    model.eval()
    return data, model


def _finished(folder: str, overrides: Mapping[str, Any]) -> tuple[Run, MMConfig]:
    """A finished run, and its configuration with some keys laid over it."""
    place = Run.open(Path(folder))
    if place.state["status"] != "finished":
        raise UserError(f"--load: {folder} is not finished: go on with it by --resume={folder}.")
    _refuse_new_weights(place.config(), overrides)
    stages = {}
    if getattr(registry.get_model(place.config()["model"]), "stage_names", ()):
        stages["stages"] = [name for name in place.state["stages"] if place.is_done(name)]
    return place, _config_of(place, {**stages, **overrides})


def _config_of(place: Run, overrides: Mapping[str, Any]) -> MMConfig:
    """The configuration of a run, with some keys laid over it."""
    settings = place.config()
    own = {k: v for k, v in settings.items() if k not in _DERIVED}
    if (own["train_neg_sample_args"] or {}).get("distribution") == "none":
        own["train_neg_sample_args"] = None  # RecBole's Config writes a dict and takes None
    if place.state.get("data_path"):
        own["data_path"] = place.state["data_path"]
    own["checkpoint_dir"] = str(place.folder.parent)
    flags = {k: v for k, v in overrides.items() if k not in ("model", "dataset")}
    for key in ("model", "dataset"):
        if overrides.get(key, settings[key]) != settings[key]:
            raise UserError(
                f"--{key} is {overrides[key]}, but {place.folder} is a run of {settings[key]}: "
                f"leave --{key} out."
            )
    return MMConfig(settings["model"], settings["dataset"], (), {**own, **flags})


def _refuse_new_weights(settings: Mapping[str, Any], overrides: Mapping[str, Any]) -> None:
    able = (EVALUATION_KEYS | VOLATILE_KEYS | {"cache_dir"}).difference(_NOT_WHEN_LOADED)
    for key, value in overrides.items():
        if key in ("model", "dataset") or key.endswith("_valid_metric"):
            continue
        same = parse_value(str(settings.get(key))) == parse_value(str(value))
        if key not in able and not same:
            raise UserError(
                f"--{key} cannot be changed for a trained run: with --load only "
                f"{', '.join(sorted(EVALUATION_KEYS))} can."
            )


def _earlier_stages(config: MMConfig) -> list[str]:
    """Stages that come before those asked for, and must therefore have been trained already, but
    for those whose weights another run gives."""
    names: list[str] = list(getattr(config.model_class, "stage_names", ()))
    chosen = [name for name in config["stages"] or names if name in names]
    before = names[: min(map(names.index, chosen), default=0)]
    return [name for name in before if not config[f"{name}_from"]]


def _work(
    config: MMConfig, place: Run | None, named: Sequence[str] = (), train: bool = True
) -> dict[str, Any]:
    """`named` are the stages that the user, and not only the model's YAML, asks for."""
    if place is not None and train:
        place.require_done(_earlier_stages(config))
    started = time.perf_counter()
    machine.reset_peak_memory(config["device"])
    _start_logging(config)
    logger = getLogger()
    for warning in config.warnings:
        logger.warning(warning)
    data = prepare_data(config)
    model = build_model(config, data)
    if place is None:  # not sooner: a mistake in data or model leaves no empty run behind
        place = Run.start(Path(config["checkpoint_dir"]), config)
    elif train:
        place.reopen(named, getattr(model, "stage_names", ()))
    if train:
        place.state["asked"] = list(config["stages"] or ())
        place.save()
    logger.info(f"Run folder: {place.folder}")
    logger.info(model)
    rows, trainer = (_staged if is_staged(model) else _zoo)(config, model, data, place, train)
    places = {row["name"]: row.pop("places") for row in rows}
    for row in rows:
        row["slices"] = _slices(config, data, places[row["name"]], list(row["test"]))
    result = _result(config, place, model, data, trainer, rows, time.perf_counter() - started)
    if train:
        write_places(place.folder / PLACES, data.dataset, places)
        write_json(place.folder / "result.json", result)
        place.finish()
    logger.info(f"Run folder: {place.folder}")
    return result


def _slices(config: MMConfig, data: Data, found: Any, metrics: list[str]) -> dict[str, Any]:
    """The metrics on parts of the test users."""
    train, test = data.train._dataset, data.test._dataset
    return {
        **warm_and_cold(train, test, found, metrics),
        **by_popularity(train, test, found, metrics, config["popularity_slices"]),
        **by_history(test, found, metrics, config["history_slices"] or ()),
    }


def _start_logging(config: MMConfig) -> None:
    from recbole.utils import init_logger, init_seed

    compat.reset_logging()
    init_seed(config["seed"], config["reproducibility"])
    on_cpu = config["device"].type == "cpu"
    compat.do_not_trace_autograd()
    compat.add_in_a_fixed_order(bool(config["reproducibility"]) and on_cpu)
    init_logger(config)
    getLogger().info(sys.argv)
    getLogger().info(config)


def prepare_data(config: MMConfig) -> Data:
    """Reads a dataset and splits it as the configuration says; makes `mm-demo` when it is not
    there yet.

    Raises:
        UserError: the dataset is not there; the sentence names the command that makes it.
    """
    from recbole_mm.data.history import attach_candidates, attach_history
    from recbole_mm.data.item_features import choose_item_features
    from recbole_mm.data.preparation import create_dataset, data_preparation

    ensure_dataset(config)
    choose_item_features(config)
    dataset = create_dataset(config)
    _check_catalogue(config, dataset)
    getLogger().info(dataset)
    if not dataset_is_sequential(config):  # RecBole counts (user, item) cells there, we count users
        config.final_config_dict["eval_batch_size"] *= dataset.item_num
    data = Data(dataset, *data_preparation(config, dataset, config.model_class))
    attach_history(data.train, data.valid, data.test)
    if config["eval_candidates"] != "full":
        attach_candidates(config["eval_candidates"], data.valid, data.test)
    return data


def _check_catalogue(config: MMConfig, dataset: Any) -> None:
    """RecBole fails deep inside torch when there are fewer items than the longest list."""
    longest = max(config["topk"])
    if config["eval_candidates"] == "full" and dataset.item_num <= longest:
        raise UserError(
            f"topk: {config['dataset']} has only {dataset.item_num - 1} items after filtering, "
            f"fewer than the {longest} of the longest list: set a shorter topk."
        )


def dataset_is_sequential(config: MMConfig) -> bool:
    """Whether RecBole evaluates the rows of a sequence, or users."""
    from recbole.utils import ModelType

    return bool(config["MODEL_TYPE"] == ModelType.SEQUENTIAL)


def ensure_dataset(config: MMConfig) -> None:
    """Makes a demo dataset on first use; RecBole's download is never tried."""
    folder, name = Path(config["data_path"]), config["dataset"]
    if (folder / f"{name}.inter").is_file() or config["benchmark_filename"]:
        return
    if name in DEMOS:
        from recbole_mm.data.demo import make_demo

        getLogger().info(f"Making {name} in {folder}")
        make_demo(folder, permuted=name != DEMOS[0])
        return
    near = [p.name for p in folder.parent.glob("*") if p.is_dir()] if folder.parent.is_dir() else []
    command = config["dataset_command"] or (
        f"python -m dataset_tools table --name {name} --interactions FILE --items FILE "
        f"--out {folder.parent}"
    )
    raise UserError(
        f"--dataset: there is no {folder / (name + '.inter')}{nearest(name, near + list(DEMOS))}; "
        f"make it with `{command}`, or name its place with --data_path."
    )


def build_model(config: MMConfig, data: Data) -> Any:
    """The model on its device, seeded as RecBole seeds it."""
    from recbole.utils import init_seed

    init_seed(config["seed"] + config["local_rank"], config["reproducibility"])
    try:
        return config.model_class(config, data.train._dataset).to(config["device"])
    except (ImportError, AttributeError) as error:
        if not registry.is_zoo(config["model"]):
            raise
        raise UserError(
            f"RecBole's {config['model']} cannot be built here ({error}): "
            "docs/zoo.md says what it needs."
        ) from error


def is_staged(model: Any) -> bool:
    """Whether a model trains in stages of its own."""
    return hasattr(model, "make_stages")


def _staged(
    config: MMConfig, model: Any, data: Data, place: Run, train: bool
) -> tuple[list[dict[str, Any]], Any]:
    from recbole_mm.trainer.staged import StagedTrainer

    trainer = StagedTrainer(config, model, place)
    if train:
        trainer.fit(data.train, data.valid, data.test, show_progress=config["show_progress"])
    else:
        trainer.load(data.train, data.valid, data.test)
    return [_measure(trainer, data, readout) for readout in _readouts(model, trainer)], trainer


def _readouts(model: Any, trainer: Any) -> list[Any]:
    from recbole_mm.stage import Readout

    own = getattr(model, "readouts", None)
    return own(trainer.stages[-1].name) if own else [Readout("", lambda: None)]


def _measure(trainer: Any, data: Data, readout: Any) -> dict[str, Any]:
    """A row of the result: valid and test under every protocol that one scoring pass gives."""
    readout.use()
    config = trainer.config
    row: dict[str, Any] = {"name": readout.name, "chosen": readout.chosen, **readout.extra}
    for phase, loader in (("valid", data.valid), ("test", data.test)):
        row[phase] = trainer.evaluate(
            loader,
            load_best_model=False,
            show_progress=config["show_progress"],
            every_protocol=True,
        )
        row[f"{phase}_protocols"] = trainer.all_results
    row["places"] = trainer.places  # of the test, the last that was measured
    return row


def _zoo(
    config: MMConfig, model: Any, data: Data, place: Run, train: bool
) -> tuple[list[dict[str, Any]], Any]:
    from recbole_mm.stage import ONLY_STAGE, Readout
    from recbole_mm.trainer.zoo import epochs_trained, zoo_trainer

    trainer = zoo_trainer(registry.get_trainer_base(config["MODEL_TYPE"], config["model"]))(
        config, model
    )
    trainer.start(place, data.train)
    if train and not place.is_done(ONLY_STAGE):
        trainer.fit(data.train, data.valid, saved=True, show_progress=config["show_progress"])
        trainer.finish(epochs_trained(trainer))
    trainer.load_best()
    return [_measure(trainer, data, Readout("", lambda: None))], trainer


def _result(
    config: MMConfig,
    place: Run,
    model: Any,
    data: Data,
    trainer: Any,
    rows: list[dict[str, Any]],
    seconds: float,
) -> dict[str, Any]:
    from recbole.utils import ModelType

    chosen = next(row for row in rows if row["chosen"])
    metric = str(config["valid_metric"]).lower()
    spec = config["backbone_spec"]
    return {
        "model": config["model"],
        "dataset": config["dataset"],
        "run_dir": str(place.folder),
        "backbone": spec["name"] if spec else None,
        "seed": config["seed"],
        "train_mode": config["train_mode"],
        "protocol": config.protocol,
        "split": config.split,
        "general": config["MODEL_TYPE"] != ModelType.SEQUENTIAL,
        "limit_users": config["limit_users"],
        "valid_metric": metric,
        "best_valid": chosen["valid"][metric],
        "valid": chosen["valid"],
        "test": chosen["test"],
        "valid_protocols": chosen["valid_protocols"],
        "test_protocols": chosen["test_protocols"],
        "slices": chosen["slices"],
        "test_users": _users(data.test),
        "stages": _stages(place, rows),
        "rows": rows if len(rows) > 1 else [],
        "fusion_alpha": chosen.get("fusion_alpha"),
        "seconds": round(seconds, 2),
        "peak_memory_mb": machine.peak_memory_mb(config["device"]),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "device": machine.device_name(config["device"]),
        "config_hash": config.hash(),
        "config": config.settings(),
        "versions": machine.versions(),
        "git_commit": machine.git_commit(),
    }


def _users(loader: Any) -> int:
    return len(set(loader._dataset.inter_feat[loader._dataset.uid_field].tolist()))


def _stages(place: Run, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Every stage's record; what was measured now stands above what was measured in training."""
    stages = {name: dict(entry) for name, entry in place.state["stages"].items()}
    for name, entry in stages.items():
        entry.update(entry.pop("finished", {}))  # what the stage itself had to say
        entry.setdefault("steps", None)
        row = next((r for r in rows if r["name"] in (name, "")), None)  # "": the only way to read
        if row:
            entry.update(valid=row["valid"], test=row["test"])
    return stages


def write_results(path: str, results: list[dict[str, Any]]) -> None:
    """Writes `--result_file`: one JSON, a list when there are several models."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_json(target, results if len(results) > 1 else results[0])

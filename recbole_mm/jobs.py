"""The runs that one command asks for: every model, in every variant of a recipe, with every seed.

A recipe names variants, each with the keys in which it differs from the others:

    seed: [2020, 2021, 2022]
    variants:
      whole: {stages: [retriever, ranker]}
      title only: {stages: [retriever, ranker], attributes: [title], retriever_from: whole}
    compare:
      - ["whole:ranker", "title only:ranker"]

Where `<stage>_from` names another variant, its run with the same seed is meant. `compare` names
pairs of rows whose difference is printed at the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recbole_mm.errors import UserError, nearest

_DEFAULTS = {"model": "PRIME", "dataset": "mm-demo"}
_OF_THE_COMMAND = (
    "model",
    "dataset",
    "seed",
    "variants",
    "compare",
)  # keys that are not of one run
_FROM = "_from"
Keys = dict[str, Any]
Variants = Mapping[str | None, Keys]


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        model: its name.
        dataset: its name.
        variant: its name in the recipe; None where there are no variants.
        keys: what stands above the files: the variant's keys, the seed, the flags.
        others: keys whose value is the run of another variant, with the name of that.
    """

    model: str
    dataset: str
    variant: str | None
    keys: Mapping[str, Any]
    others: Mapping[str, str]


# --- what a command says --------------------------------------------------------------------------


def read_recipe(files: Sequence[str]) -> Keys:
    """What YAML files or recipes say about the whole command, the last one's word."""
    from recbole_mm.paths import recipe_or_path
    from recbole_mm.yaml_files import read_yaml

    merged: Keys = {}
    for name in files:
        merged.update(read_yaml(Path(recipe_or_path(name))))
    return {k: merged[k] for k in _OF_THE_COMMAND if k in merged}


def plan_jobs(recipe: Mapping[str, Any], flags: Mapping[str, Any]) -> list[Job]:
    """All runs in their order, seed by seed.

    Args:
        recipe: see `read_recipe`.
        flags: from the command line.

    Raises:
        UserError: names or seeds that cannot be read, a flag that would undo a variant, or a
            variant that needs another.
    """
    _check_pairs(recipe)
    given = {**_DEFAULTS, **recipe, **flags}
    own = {k: v for k, v in flags.items() if k not in _OF_THE_COMMAND}
    variants = _variants(recipe, flags.get("variants"), own)
    seeds = [{"seed": seed} for seed in _seeds(given["seed"])] if "seed" in given else [{}]
    return [
        _job(model, str(given["dataset"]), variant, {**variants[variant], **seed}, variants)
        for seed in seeds
        for model in _models(given["model"])
        for variant in variants
    ]


def _check_pairs(recipe: Mapping[str, Any]) -> None:
    """Raises `UserError` unless `compare` holds pairs of names."""
    pairs = recipe.get("compare") or []
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(name, str) for name in pair)
        for pair in pairs
    ):
        raise UserError('compare: expected lines such as - ["NAME:ROW", "NAME:ROW"].')


def _job(model: str, dataset: str, variant: str | None, keys: Keys, variants: Variants) -> Job:
    others = {k: v for k, v in keys.items() if _names_another(k, v, variants)}
    return Job(model, dataset, variant, {k: keys[k] for k in keys if k not in others}, others)


def _names_another(key: str, value: Any, variants: Mapping[Any, Any]) -> bool:
    return key.endswith(_FROM) and isinstance(value, str) and value in variants


def _words(value: Any) -> list[str]:
    """`A,B`, `[A, B]` or `(A, B)` on the command line, a list or any of these in YAML."""
    if isinstance(value, list | tuple):
        words = [str(word) for word in value]
    else:
        text = str(value).strip()
        bare = text[1:-1] if text[:1] + text[-1:] in ("[]", "()") else text
        words = bare.split(",")
    return [word.strip() for word in words if word.strip()]


def _models(value: Any) -> list[str]:
    names = _words(value)
    if not names:
        raise UserError("--model names no model: write --model=PRIME, or several with commas.")
    if len({*names}) < len(names):
        raise UserError(f"--model: {', '.join(names)} names a model twice: name each once.")
    return names


def _seeds(value: Any) -> list[int]:
    words = _words(value)
    seeds = [int(word) for word in words if word.isdecimal()]
    if not seeds or len(seeds) < len(words) or len({*seeds}) < len(seeds):
        raise UserError(f"--seed is {value}: write a whole number, or several with commas.")
    return seeds


def _variants(recipe: Mapping[str, Any], asked: Any, flags: Keys) -> Variants:
    """The variants to run with the flags above them; without a name where the recipe has none."""
    if "variants" not in recipe:
        if asked is not None:
            raise UserError("--variants: no recipe with variants is named by --config_files.")
        return {None: flags}
    every = _read_variants(recipe["variants"])
    named = list(every) if asked is None else _words(asked)
    for name in named:
        if name not in every:
            raise UserError(
                f"--variants: there is no variant '{name}'{nearest(name, every)}: the recipe has "
                f"{', '.join(every)}."
            )
    if not named:
        raise UserError(f"--variants names none: the recipe has {', '.join(every) or 'none'}.")
    chosen = {name: keys for name, keys in every.items() if name in named}
    for name, keys in chosen.items():
        _refuse_undoing(name, keys, flags)
    over: dict[str | None, Keys] = {name: {**keys, **flags} for name, keys in chosen.items()}
    _check_order(over, every)
    return over


def _read_variants(found: Any) -> dict[str, Keys]:
    """The recipe's variants by name."""
    if not isinstance(found, dict) or not all(isinstance(v, dict | None) for v in found.values()):
        raise UserError("variants: expected `name: {key: value}` lines in the recipe.")
    every = {str(name): dict(keys or {}) for name, keys in found.items()}
    for name, keys in every.items():
        if "," in name or ":" in name:
            raise UserError(f"variants: '{name}': a name has neither comma nor colon.")
        if wrong := [key for key in keys if key in _OF_THE_COMMAND]:
            raise UserError(
                f"variants: '{name}' sets {wrong[0]}, which is of the whole command: write it "
                "beside variants."
            )
    return every


def _refuse_undoing(name: str, keys: Keys, flags: Keys) -> None:
    """A flag that replaces what a variant is named after; another run's weights are welcome."""
    for key in flags:
        if key in keys and not key.endswith(_FROM):
            raise UserError(
                f"--{key}: variant '{name}' sets it to {keys[key]}: leave the flag out, or choose "
                "other variants with --variants."
            )


def _check_order(chosen: Variants, every: Mapping[str, Keys]) -> None:
    """Raises `UserError` where a variant takes weights of one that is not run before it."""
    earlier: set[str | None] = set()
    for name, keys in chosen.items():
        for key, value in keys.items():
            if not key.endswith(_FROM) or not isinstance(value, str) or value in earlier:
                continue
            takes = f"variant '{name}' takes its {key.removesuffix(_FROM)} from '{value}'"
            if value in chosen:
                raise UserError(f"variants: {takes}: put that above it in the recipe.")
            if value in every:
                raise UserError(f"--variants: {takes}: name that too.")
            if not Path(value).exists() and (near := nearest(value, every)):
                raise UserError(f"variants: {takes}, which is neither a variant nor a run{near}.")
        earlier.add(name)


# --- the runs -------------------------------------------------------------------------------------


def run_jobs(
    jobs: Sequence[Job], files: Sequence[str], resume: bool = False
) -> Iterator[dict[str, Any]]:
    """Runs them one by one.

    Args:
        jobs: see `plan_jobs`.
        files: YAML files or recipes, as `--config_files` names them.
        resume: take what has ended from the disk, and go on with what has not.

    Yields:
        Each result, with the name of its `variant`.

    Raises:
        UserError: before the first is run, what can be known to fail in any of them.
    """
    from recbole_mm import quick_start

    _check(jobs, files)
    folders: dict[tuple[str, Any, str | None], str] = {}
    for job in jobs:
        seed = job.keys.get("seed")
        given = {key: folders[job.model, seed, name] for key, name in job.others.items()}
        alone = job.variant is None  # of variants each has a run of its own
        result = quick_start.run(
            job.model,
            job.dataset,
            files,
            {**job.keys, **given},
            resume,
            one_of_several=len(jobs) > 1 or not alone,
            may_extend=alone,
        )
        folders[job.model, seed, job.variant] = result["run_dir"]
        yield {**result, "variant": job.variant}


def _check(jobs: Sequence[Job], files: Sequence[str]) -> None:
    """A mistake in the last run should not cost the training of those before it."""
    from recbole_mm import quick_start

    trained: dict[tuple[str, str | None], list[str]] = {}
    for job in jobs:
        if (job.model, job.variant) in trained:
            continue  # another seed
        try:
            config = quick_start.check(job.model, job.dataset, files, job.keys)
            names = list(getattr(config.model_class, "stage_names", ()))
            _check_stages(job, list(config["stages"] or names), names, trained)
        except UserError as error:
            where = "" if job.variant is None else f"variant '{job.variant}': "
            raise UserError(f"{where}{error}") from error
        trained[job.model, job.variant] = list(config["stages"] or names)


def _check_stages(
    job: Job,
    asked: Sequence[str],
    names: Sequence[str],
    trained: Mapping[tuple[str, str | None], Sequence[str]],
) -> None:
    """What a variant does not train itself must come from another one that does."""
    for key, other in job.others.items():
        stage = key.removesuffix(_FROM)
        if stage not in names:
            raise UserError(f"{job.model} has no stage '{stage}', so no key {key}.")
        if stage not in trained[job.model, other]:
            raise UserError(f"{key}: variant '{other}' has no stage {stage} among its stages.")
    if job.variant is None or not names:
        return
    first = min(names.index(stage) for stage in asked)
    taken = [key.removesuffix(_FROM) for key in (*job.keys, *job.others) if key.endswith(_FROM)]
    for stage in names[:first]:
        if stage not in taken:
            raise UserError(
                f"stages begin with {asked[0]}: name {stage} too, or a variant or run to take it "
                f"from, {stage}{_FROM}."
            )

"""The runs that one command asks for: every model, in every variant of a recipe, with every seed.

A recipe names variants, each with the keys in which it differs from the others:

    seed: [2020, 2021, 2022]
    variants:
      whole: {stages: [retriever, ranker]}
      text only: {stages: [retriever, ranker], attributes: [title], retriever_from: whole}

Where `<stage>_from` names another variant, its run with the same seed is meant.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recbole_mm.errors import UserError, nearest

_DEFAULTS = {"model": "PRIME", "dataset": "mm-demo"}
_OF_THE_COMMAND = ("model", "dataset", "seed", "variants")  # keys that are not of one run
_FROM = "_from"
Variants = Mapping[str | None, Mapping[str, Any]]


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


def plan_jobs(files: Sequence[str], flags: Mapping[str, Any]) -> list[Job]:
    """All runs in their order, seed by seed.

    Args:
        files: YAML files or recipes, as `--config_files` names them.
        flags: from the command line; they stand above a variant's keys.

    Raises:
        UserError: names or seeds that cannot be read, or a variant that needs another.
    """
    recipe = _recipe(files)
    given = {**_DEFAULTS, **recipe, **flags}
    own = {k: v for k, v in flags.items() if k not in _OF_THE_COMMAND}
    chosen = _variants(recipe.get("variants"), flags.get("variants"))
    variants = {name: {**keys, **own} for name, keys in chosen.items()}
    _check_order(variants, recipe.get("variants") or {})
    seeds = [{"seed": seed} for seed in _seeds(given["seed"])] if "seed" in given else [{}]
    return [
        _job(model, str(given["dataset"]), variant, {**variants[variant], **seed}, variants)
        for seed in seeds
        for model in _names(given["model"])
        for variant in variants
    ]


def _job(
    model: str, dataset: str, variant: str | None, keys: Mapping[str, Any], variants: Variants
) -> Job:
    others = {k: v for k, v in keys.items() if k.endswith(_FROM) and v in variants}
    return Job(model, dataset, variant, {k: keys[k] for k in keys if k not in others}, others)


def run_jobs(
    jobs: Sequence[Job], files: Sequence[str], resume: bool = False
) -> Iterator[dict[str, Any]]:
    """Runs them one by one.

    Args:
        jobs: see `plan_jobs`.
        files: the same as there.
        resume: take what has ended from the disk, and go on with what has not.

    Yields:
        Each result, with the name of its `variant`.

    Raises:
        UserError: before the first is run, what can be known to fail in any of them.
    """
    from recbole_mm import quick_start

    for job in jobs:  # a mistake in the last should not cost the training of the first
        quick_start.check(job.model, job.dataset, files, job.keys)
    folders: dict[tuple[str, Any, str | None], str] = {}
    for job in jobs:
        seed = job.keys.get("seed")
        given = {key: folders[job.model, seed, name] for key, name in job.others.items()}
        keys = {**job.keys, **given}
        result = quick_start.run(job.model, job.dataset, files, keys, resume, len(jobs) > 1)
        folders[job.model, seed, job.variant] = result["run_dir"]
        yield {**result, "variant": job.variant}


# --- what a command says --------------------------------------------------------------------------


def _recipe(files: Sequence[str]) -> dict[str, Any]:
    """What the files say about the whole command."""
    from recbole_mm.config import read_yaml
    from recbole_mm.paths import recipe_or_path

    merged: dict[str, Any] = {}
    for name in files:
        merged.update(read_yaml(Path(recipe_or_path(name))))
    return {k: merged[k] for k in _OF_THE_COMMAND if k in merged}


def _words(value: Any) -> list[str]:
    """`A,B` on the command line, `[A, B]` or `A,B` in YAML."""
    words = value if isinstance(value, list) else str(value).strip("[]()").split(",")
    return [str(word).strip() for word in words if str(word).strip()]


def _names(models: Any) -> list[str]:
    names = _words(models)
    if not names:
        raise UserError("--model names no model: write --model=PRIME, or several with commas.")
    return names


def _seeds(value: Any) -> list[int]:
    seeds = _words(value)
    if not seeds or not all(map(str.isdecimal, seeds)) or len(set(seeds)) < len(seeds):
        raise UserError(f"--seed is {value}: write a whole number, or several with commas.")
    return [int(seed) for seed in seeds]


def _variants(recipe: Any, asked: Any) -> Variants:
    """The variants to run; where the recipe has none, one without a name."""
    if recipe is None:
        if asked is not None:
            raise UserError("--variants: no recipe with variants is named by --config_files.")
        return {None: {}}
    if not isinstance(recipe, dict) or not all(isinstance(v, dict) for v in recipe.values()):
        raise UserError("variants: expected `name: {key: value}` lines in the recipe.")
    named = list(recipe) if asked is None else _words(asked)
    for name in named:
        if name not in recipe:
            raise UserError(
                f"--variants: there is no variant '{name}'{nearest(name, recipe)}: the recipe has "
                f"{', '.join(recipe)}."
            )
    return {name: keys for name, keys in recipe.items() if name in named}


def _check_order(chosen: Variants, recipe: Mapping[str, Any]) -> None:
    """Raises `UserError` where a variant takes weights of one that is not run before it."""
    earlier: set[str | None] = set()
    for name, keys in chosen.items():
        for key, other in keys.items():
            if key.endswith(_FROM) and other in recipe and other not in earlier:
                raise UserError(
                    f"--variants: '{name}' takes its {key.removesuffix(_FROM)} from '{other}', "
                    "which must be run before it: name that too."
                )
        earlier.add(name)

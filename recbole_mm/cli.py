"""The command line: arguments in, exit code out."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from logging import INFO, getLogger
from pathlib import Path
from typing import Any

from recbole_mm.errors import UserError, told

HELP = """\
usage: run_recbole_mm.py --model=NAME[,NAME...] --dataset=NAME [--KEY=VALUE ...]

  --model, -m NAME       LRURec, FMLPRec, PRIME or any model of RecBole's zoo; several give a table
  --dataset, -d NAME     a folder under --data_path (default: dataset/); mm-demo makes itself
  --config_files A,B     YAML files or recipes of properties/paper/
  --seed N[,N...]        several give the mean and its standard error
  --variants A,B         of a recipe that has variants; all of them by default
  --result_file PATH     write the result as JSON
  --resume[=RUN_DIR]     go on with the newest unfinished run of this configuration, or RUN_DIR; of
                         several models, seeds or variants those that have ended are read back
  --load=RUN_DIR         evaluate a finished run again
  --debug                show the traceback of an error
  --KEY=VALUE            any key of the YAML files, e.g. --epochs=5 --backbone=tiny --seed=7

Examples:
  python run_recbole_mm.py                 # PRIME on mm-demo: minutes, no network
  python run_recbole_mm.py --model=SASRec,LRURec,PRIME --dataset=amazon-beauty --backbone=tiny
"""
_SHORT = {"-m": "--model", "-d": "--dataset", "-h": "--help"}
_SWITCHES = ("--debug", "--help", "--resume")  # may stand without a value


def parse(arguments: Sequence[str]) -> dict[str, str]:
    """`--key=value`, `--key value`, `-m value` and switches, as one mapping of texts.

    Raises:
        UserError: a word that belongs to no flag, a flag without value, a flag given twice.
    """
    flags: dict[str, str] = {}
    words = list(arguments)
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        name = _SHORT.get(name, name)
        if not name.startswith("--") or len(name) < 3:
            raise UserError(f"'{word}' belongs to no flag: write --key=value (see --help).")
        if not equals:
            value = _value_after(name, words)
        key = name[2:]
        if key in flags and flags[key] != value:
            raise UserError(f"--{key} is given twice, as '{flags[key]}' and '{value}': keep one.")
        flags[key] = value
    return flags


def _value_after(name: str, words: list[str]) -> str:
    if name in _SWITCHES and (name != "--resume" or not words or words[0].startswith("-")):
        return ""
    if not words or words[0].startswith("--"):
        raise UserError(f"{name} has no value: write {name}=VALUE.")
    return words.pop(0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line. Returns the exit code: 0 done, 1 a user's mistake, 130 interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    try:
        flags = parse(given)
        if "help" in flags:
            print(HELP)
            return 0
        _run(flags)
    except KeyboardInterrupt:
        print("\nInterrupted; go on with --resume.", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            raise
        print(told(error), file=sys.stderr)
        return 1
    return 0


def _run(flags: dict[str, str]) -> None:
    flags.pop("debug", None)
    result_file = flags.pop("result_file", None)
    if result_file is not None:
        _check_writable(result_file)
    results: list[dict[str, Any]] = []
    files = _files(flags.get("config_files", ""))
    try:
        for result in _load(flags) if "load" in flags else _train(flags):
            results.append(result)  # noqa: PERF402 (each is kept if a later one fails)
    finally:
        if results:
            _report(results, result_file, files)


def _report(results: list[dict[str, Any]], result_file: str | None, files: list[str]) -> None:
    from recbole_mm.jobs import read_recipe
    from recbole_mm.quick_start import write_results
    from recbole_mm.report.differences import difference_table, pair_table
    from recbole_mm.report.table import result_table

    if result_file:  # before anything that could fail
        write_results(result_file, results)
    pairs = read_recipe(files).get("compare")
    tables = [result_table(results), difference_table(results), pair_table(results, pairs or [])]
    _tell("\n\n" + "\n\n".join(table for table in tables if table) + "\n")
    if result_file:
        _tell(f"Result: {result_file}")


def _tell(text: str) -> None:
    """To the log, or where that is silent or was never started, to the screen."""
    logger = getLogger()
    if logger.hasHandlers() and logger.isEnabledFor(INFO):
        logger.info(text)
    else:
        print(text)


def _check_writable(result_file: str) -> None:
    """A place that cannot be written to should not cost a training."""
    path = Path(result_file or ".")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        possible = os.access(path.parent, os.W_OK) and not path.is_dir()
    except OSError:
        possible = False
    if not possible:
        raise UserError(f"--result_file: '{result_file}' cannot be written: name a file.")


def _load(flags: dict[str, str]) -> Iterator[dict[str, Any]]:
    from recbole_mm import quick_start

    folder = flags.pop("load")
    if not folder:
        raise UserError("--load needs the folder of a finished run: --load=saved/MODEL-DATASET-ID.")
    yield quick_start.load(folder, flags)


def _train(flags: dict[str, str]) -> Iterator[dict[str, Any]]:
    from recbole_mm import quick_start  # RecBole and torch are only imported when there is work
    from recbole_mm.jobs import plan_jobs, read_recipe, run_jobs

    resume = flags.pop("resume", None)
    if resume:
        flags.pop("config_files", None)  # the run knows what stood there
        if "variants" in flags:
            raise UserError(f"--resume={resume} goes on with one run: leave --variants out.")
        yield quick_start.go_on(resume, flags)
        return
    files = _files(flags.pop("config_files", ""))
    yield from run_jobs(plan_jobs(read_recipe(files), flags), files, resume == "")


def _files(text: str) -> list[str]:
    """What `--config_files` names."""
    return [name.strip() for name in text.split(",") if name.strip()]


if __name__ == "__main__":
    raise SystemExit(main())

"""Makes datasets, adds to them, checks them: `python -m dataset_tools --help`."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from dataset_tools import demo, encode, filter, images, microlens, movielens, table, verify
from dataset_tools.amazon import Converter
from dataset_tools.amazon_releases import RELEASES
from recbole_mm.errors import told

# A converter has a docstring, `add_arguments(parser)` and `run(arguments)`, which returns the
# dataset's name: a module, or an object where several sources are read alike.
CONVERTERS: dict[str, Any] = {
    "table": table,
    **{release.name: Converter(release) for release in RELEASES},
    "movielens": movielens,
    "microlens": microlens,
    "filter": filter,
    "demo": demo,
}
# Modules of the same kind that make no dataset; `INTERRUPTED` says what Ctrl-C leaves.
ON_DATASETS: dict[str, Any] = {"encode": encode, "images": images, "verify": verify}
_OUT = "dataset"  # where run_recbole_mm.py looks by itself


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit code: 0 done, 1 a user's mistake, 130 interrupted."""
    parsed = _parser().parse_args(arguments)
    try:
        with _stopped_cleanly() if parsed.converts else nullcontext():
            name = parsed.run(parsed)
    except KeyboardInterrupt:
        print(f"\nInterrupted; {parsed.interrupted}.", file=sys.stderr)
        return 130
    except Exception as error:
        if parsed.debug:
            raise
        print(told(error), file=sys.stderr)
        return 1
    if name is not None:
        print(f"Try: {_command(parsed.out, name)}")
    return 0


@contextmanager
def _stopped_cleanly() -> Iterator[None]:
    """SIGTERM is Ctrl-C here, which leaves no half of a dataset."""
    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _command(out: str, name: str) -> str:
    """What trains on the new dataset."""
    words = ["python", "run_recbole_mm.py", "--model=LRURec", f"--dataset={name}"]
    return shlex.join(words if Path(out) == Path(_OUT) else [*words, f"--data_path={out}"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dataset_tools",
        description="Makes, completes and checks datasets for RecBole-MM.",
    )
    known = {**CONVERTERS, **ON_DATASETS}
    commands = parser.add_subparsers(required=True, metavar="|".join(known))
    for name, module in known.items():
        text = (module.__doc__ or "").strip()
        command = commands.add_parser(
            name,
            help=text.splitlines()[0],
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name in CONVERTERS:
            command.add_argument("--out", default=_OUT, help=f"where datasets lie ({_OUT})")
            command.add_argument(
                "--force", action="store_true", help="replace the whole old folder"
            )
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        module.add_arguments(command)
        interrupted = getattr(module, "INTERRUPTED", "nothing was written")
        command.set_defaults(run=module.run, interrupted=interrupted, converts=name in CONVERTERS)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())

"""Makes datasets: `python -m dataset_tools table|demo --help`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from dataset_tools import demo, table
from recbole_mm.errors import UserError

# A converter is a module with a docstring, `add_arguments(parser)` and `run(arguments)`.
CONVERTERS = {
    "table": table,
    "demo": demo,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one converter. Returns the exit code: 0 done, 1 a user's mistake, 130 interrupted."""
    parsed = _parser().parse_args(arguments)
    try:
        parsed.run(parsed)
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted; nothing was written.", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dataset_tools", description="Makes datasets for RecBole-MM."
    )
    commands = parser.add_subparsers(required=True, metavar="|".join(CONVERTERS))
    for name, converter in CONVERTERS.items():
        text = (converter.__doc__ or "").strip()
        command = commands.add_parser(
            name,
            help=text.splitlines()[0],
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument("--out", default="dataset", help="where datasets lie (dataset)")
        command.add_argument("--force", action="store_true", help="replace the whole old folder")
        converter.add_arguments(command)
        command.set_defaults(run=converter.run)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())

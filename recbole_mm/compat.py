"""The only place that touches numpy's or RecBole's globals, so that RecBole 1.2.1 runs on today's
libraries."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterable

import numpy as np

from recbole_mm.errors import UserError

# Names that RecBole 1.2.1 still uses at call time and numpy has dropped.
_NUMPY_ALIASES = {
    "bool": np.bool_,
    "int": np.int64,
    "float": np.float64,
    "complex": np.complex128,
    "object": np.object_,
    "str": np.str_,
    "long": np.int64,
    "unicode": np.str_,
}


def restore_numpy_aliases() -> None:
    """Gives numpy back the aliases it lacks; those it has are left alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        for name, dtype in _NUMPY_ALIASES.items():
            if not hasattr(np, name):
                setattr(np, name, dtype)


def require_recbole() -> None:
    """Raises `UserError` when RecBole is not installed (pip leaves it out on Python 3.12 and
    later)."""
    if importlib.util.find_spec("recbole") is None:
        raise UserError(
            "RecBole is not installed (its ray pin has no wheel for Python 3.12 and later): "
            "run `pip install --no-deps recbole==1.2.1`."
        )


def silence_deprecations() -> None:
    """Hides the deprecation warnings that RecBole's own lines raise on every epoch."""
    warnings.filterwarnings("ignore", message=r".*GradScaler.*", category=FutureWarning)
    for module in (r"recbole\..*", r"colorama\..*", r"thop\..*"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=module)


def register_dataset_keys(keys: Iterable[str]) -> None:
    """Adds our keys to those that RecBole prints under "Dataset" and compares datasets by."""
    from recbole.utils.argument_list import dataset_arguments

    dataset_arguments.extend(key for key in keys if key not in dataset_arguments)


def reset_logging() -> None:
    """Closes the handlers of an earlier run: RecBole's `init_logger` only acts on a bare root
    logger."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        if type(handler).__module__.startswith(("logging", "colorlog")):
            root.removeHandler(handler)
            handler.close()


def add_in_a_fixed_order(wanted: bool) -> None:
    """Whether torch sums gradients of repeated rows (items, pictures) in the same order each time.

    On several CPU threads it otherwise does not, and a run or a resumed one ends in other decimals.
    Without `wanted`, and where an operation has no such form, torch goes its quick way.
    """
    import torch

    torch.use_deterministic_algorithms(wanted, warn_only=True)
    # On by default, for debugging: writes NaN into every new tensor before it is computed.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def do_not_trace_autograd() -> None:
    """RecBole's SINE turns anomaly detection on for the whole process when it is imported.

    Every operation then formats its stack, which more than doubles the time of a training step.
    """
    import torch

    torch.autograd.set_detect_anomaly(False)

"""What a result says about the machine and the software it was made with."""

from __future__ import annotations

import ctypes
import importlib.metadata
import platform
import resource
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import torch

_CLEAR_PEAK, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_PACKAGES = ("torch", "numpy", "pandas", "recbole", "transformers", "peft", "bitsandbytes")


def reset_peak_memory(device: torch.device) -> None:
    """Several models run in one process: each is to have its own peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):  # Linux alone can forget the peak of a process
        _CLEAR_PEAK.write_text("5", encoding="ascii")


def peak_memory_mb(device: torch.device) -> float:
    """The most memory held since the last reset, in MiB: the GPU's, or resident in the process."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    with suppress(OSError, StopIteration):
        lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
        peak = next(line for line in lines if line.startswith("VmHWM:"))
        return round(int(peak.split()[1]) / 2**10, 1)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, but bytes on macOS
    return round(most / (2**20 if sys.platform == "darwin" else 2**10), 1)


def give_back_memory() -> None:
    """Freed memory goes back to the system.

    The C library keeps what tensors of many sizes leave free between those that live: after an hour
    of batches of texts, several times what is needed.
    """
    with suppress(OSError, AttributeError):  # glibc alone has this
        ctypes.CDLL(None).malloc_trim(0)


def device_name(device: torch.device) -> str:
    """The GPU, or the processor with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"cpu ({torch.get_num_threads()} threads, {platform.machine()})"


def versions() -> dict[str, str]:
    """Of Python and of the packages that numbers depend on, where they are installed."""
    from recbole_mm import __version__

    found = {"recbole_mm": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """The commit of the checkout this package runs from, if it runs from one."""
    here = Path(__file__).resolve().parent.parent
    if not (here / ".git").exists():
        return None
    command = ["git", "-C", str(here), "rev-parse", "HEAD"]  # a fixed command
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    return done.stdout.strip() or None

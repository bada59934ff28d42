"""What is at hand of packages and of the Hugging Face hub, told before anything waits for it."""

from __future__ import annotations

import importlib.util
import urllib.error
import urllib.request
from pathlib import Path

from recbole_mm.errors import UserError

_PATIENCE_S = 5.0


def require(*packages: str) -> None:
    """Raises `UserError` that names the extra where one of the packages is not installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"This model needs the package '{package}': pip install 'recbole-mm[llm]'."
            )


def is_online(model: str) -> bool:
    """Whether the hub answers; asked once, because its client waits long for one that does not."""
    if Path(model).is_dir():
        return False
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    hub = urllib.request.Request(constants.ENDPOINT, method="HEAD")  # noqa: S310 (the user's hub)
    try:
        with urllib.request.urlopen(hub, timeout=_PATIENCE_S):  # noqa: S310
            return True
    except urllib.error.HTTPError:
        return True  # it answers, if with a complaint
    except OSError:
        return False

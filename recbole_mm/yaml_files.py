"""YAML files as RecBole reads them, and every mistake in one sentence."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from recbole_mm.errors import UserError


class Loader(yaml.SafeLoader):
    """Safe YAML that reads `1e-3` as a number, as RecBole's does, and a key only once."""

    def compose_mapping_node(self, anchor: dict[Any, yaml.Node]) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key '{key.value}' stands here a second time",
                    problem_mark=key.start_mark,
                )
            seen.add(key.value)
        return node


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?$"
        r"|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)
# A whole number stays an int: PyYAML asks the resolvers in order, so the int one must come first.
for _resolvers in Loader.yaml_implicit_resolvers.values():
    _resolvers.sort(key=lambda pair: pair[0] != "tag:yaml.org,2002:int")


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        UserError: it is not readable YAML, or no mapping of texts to values.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.load(text, Loader=Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(
            f"{path}{line}: this is not valid YAML ({getattr(error, 'problem', error)})."
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: byte {error.start + 1} is not UTF-8, save the file as UTF-8."
        ) from error
    except OSError as error:
        raise UserError(f"{path}: it cannot be read ({error.strerror}).") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected `key: value` lines, found a {type(content).__name__}.")
    for key in content:
        if not isinstance(key, str):
            raise UserError(
                f"{path}: the key {key!r} is no name (unquoted, yes, no, on and off are True and "
                "False)."
            )
    return content

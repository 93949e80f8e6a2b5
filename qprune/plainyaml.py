"""YAML that holds plain values only: what options files, and words of the command line, may be.

Read with the safe loader, in bounded time and memory: no more than a megabyte, no anchors and aliases (with which a few lines can stand for
billions of values), no dates, sets or bytes, and no key twice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from qprune.plainjson import shown

MOST_BYTES = 1 << 20
MOST_DEPTH = 32
# PyYAML raises the latter for tags that do not fit their text, as in `!!int ""`
_FAILURES = (yaml.YAMLError, ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError, RecursionError)


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise ValueError("aliases (*name) are not read; write the value again")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(keys)) != len(keys):
            raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} is there twice")
        return super().construct_mapping(node, deep)


def value_of(text: str) -> Any:
    """The value that a text stands for. Raises ValueError, in one line, for what is no YAML or no plain value."""
    try:
        if len(text) > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES} characters")
        value = yaml.load(text, _Loader)
        check_plain(value)
    except _FAILURES as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(reason[:300]) from None
    return value


def read_mapping(path: Path) -> dict[str, Any]:
    """The names and values of a file. Raises OSError if it cannot be read, ValueError if it holds anything else."""
    with path.open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    found = value_of(content.decode())
    if not isinstance(found, dict):
        raise ValueError(f"expected names and values, got {shown(found)}")
    return found


def dumped(values: Mapping[str, Any]) -> bytes:
    """The file that `read_mapping` reads these names and values from, in their order."""
    return yaml.safe_dump(dict(values), sort_keys=False).encode()


def check_plain(value: Any, depth: int = 0) -> None:
    """Raise ValueError unless a value is a text, a finite number, a truth value, nothing, or a list or a mapping with names of these."""
    if depth > MOST_DEPTH:
        raise ValueError(f"values are nested more than {MOST_DEPTH} deep")
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"expected a name, got {shown(key)}")
            check_plain(item, depth + 1)
    elif isinstance(value, list):
        for item in value:
            check_plain(item, depth + 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"expected a finite number, got {value}")
    elif isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 64:
        raise ValueError(f"a number of {value.bit_length()} bits is too large")
    elif value is not None and not isinstance(value, str | int | float | bool):
        raise ValueError(f"expected text, a number, a truth value, a list or names and values, got a {type(value).__name__}")

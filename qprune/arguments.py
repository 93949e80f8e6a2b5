"""Words of the command line, read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import typer

from qprune.plainyaml import value_of


def bits(text: str) -> tuple[int, ...]:
    """ "2,4,8" → (2, 4, 8); "" → ()."""
    try:
        return tuple(int(b) for b in text.split(",")) if text else ()
    except ValueError:
        raise typer.BadParameter(f"expected bits like 2,4,8, got {text!r}") from None


def pairs(text: str) -> tuple[tuple[int, int], ...]:
    """ "2/4,8/8" → ((2, 4), (8, 8)), weight bits before activation bits; "3" stands for 3/3; "" for none."""
    found = []
    for word in filter(None, text.replace(" ", "").split(",")):
        w, slash, a = word.partition("/")
        try:
            found.append((int(w), int(a if slash else w)))
        except ValueError:
            raise typer.BadParameter(f"expected pairs of weight and activation bits like 2/2,2/4,8/8, got {text!r}") from None
    return tuple(found)


def pair(text: str) -> tuple[int, int]:
    """ "3/3" → (3, 3)."""
    found = pairs(text)
    if len(found) != 1:
        raise typer.BadParameter(f"expected one pair of weight and activation bits like 3/3, got {text!r}")
    return found[0]


def numbers(text: str) -> tuple[float, ...]:
    """ "0.5,1" → (0.5, 1.0)."""
    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"expected numbers like 0.5,1, got {text!r}") from None


def settings(words: Sequence[str]) -> dict[str, Any]:
    """["samples=4", "estimator=score"] → {"samples": 4, "estimator": "score"}; values are YAML scalars or lists."""
    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        try:
            found[name.strip().replace("-", "_")] = value_of(value)
        except ValueError:
            equals = ""
        if not equals or not name.strip():
            raise typer.BadParameter(f"expected name=value, got {word!r}")
    return found


def words(text: str) -> tuple[str, ...]:
    """ "w3a3,w2a2" → ("w3a3", "w2a2"); with a semicolon anywhere, semicolons separate and commas belong to the words."""
    return tuple(word.strip() for word in text.split(";" if ";" in text else ",") if word.strip())


def method_settings(given: Sequence[str]) -> dict[str, dict[str, Any]]:
    """["zur.samples=4"] → {"zur": {"samples": 4}}; values as in `settings`."""
    found: dict[str, dict[str, Any]] = {}
    for name, value in settings(given).items():
        method, dot, option = name.partition(".")
        if not dot or not option:
            raise typer.BadParameter(f"expected method.name=value, got {name}={value}")
        found.setdefault(method.replace("_", "-"), {})[option] = value
    return found

"""The options of a run from a YAML file and from words key=value, checked by name and by type.

Where an option is given in several places, the last of these counts: the default, the file, key=value, a flag (--seeds 5). The entries of
method_options and data_options are options of their own, `method_options.samples=4`: each is taken from the last place that has it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import typer
import yaml

from qprune import arguments
from qprune.options import OptionError, RunOptions
from qprune.plainjson import shown
from qprune.plainyaml import check_plain, read_mapping, value_of
from qprune.search.driver import METHODS

TYPES = {field.name: str(field.type) for field in fields(RunOptions)}
"""The options of a run, and the types that `RunOptions` declares."""
MOST_TEXT = 4096  # characters of a name, a path or a budget
FLAGS = ("out", "threads", "overwrite", "resume", "checkpoint_minutes", "keep", "onnx", "config")
"""Options of the command alone: they do not change what a run computes, but for the last bits (threads)."""


def read_file(path: Path) -> dict[str, Any]:
    """The options that a YAML file sets, such as --print-config writes or options.yaml of a run folder is. Raises OptionError for a file
    that cannot be read, an unknown name, or a value of another type."""
    try:
        found = read_mapping(path)
    except OSError as error:
        raise OptionError(f"cannot read the configuration {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise OptionError(f"cannot read the configuration {path}: {error}") from None
    return checked(found, f"{path}: ")


def read_words(words: Iterable[str]) -> dict[str, Any]:
    """["seeds=5", "w_bits=2,4", "method_options.samples=4"] → {"seeds": 5, "w_bits": (2, 4), "method_options": {"samples": 4}}. Values are
    YAML; those of options that are text are taken as they are. Raises OptionError as `read_file`."""
    found: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        name, dot, entry = key.strip().replace("-", "_").partition(".")
        if not equals or not name or (dot and not entry):
            raise OptionError(f"expected key=value, got {shown(word)}")
        kind = _kind(name, "")
        if dot and kind != "Mapping[str, Any]":
            raise OptionError(f"{name} has no entries: expected {name}=value, got {shown(word)}")
        try:
            value = text if kind == "str" or (kind.startswith("tuple") and "[" not in text) else value_of(text)
        except ValueError as error:
            raise OptionError(f"{name}: expected a value of YAML, got {shown(text)} ({error})") from None
        found = over(found, checked({name: {entry: value} if dot else value}))
    return found


def checked(values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Options as `RunOptions` has them, from plain values: tuples for lists, "2,4" and "2/4,8/8" read. Raises OptionError for a name that
    is no option, with the nearest that is, and for a value of another type. where: what messages begin with."""
    found = {}
    for name, value in values.items():
        expected, read = _READERS[_kind(name, where)]
        try:
            found[name] = read(value)
        except (ValueError, OverflowError, typer.BadParameter):
            raise OptionError(f"{where}{name}: expected {expected}, got {shown(value)}") from None
    return found


def over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Both, the second counting where they have the same name; mappings by their entries."""
    both = {**below, **above}
    for name in below.keys() & above.keys():
        if isinstance(below[name], Mapping) and isinstance(above[name], Mapping):
            both[name] = {**below[name], **above[name]}
    return both


def merged(file: Path | None, words: Sequence[str], flags: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are set in any of the three places, by the order of the module's description."""
    return over(over(read_file(file) if file is not None else {}, read_words(words)), flags)


def comparable(began: RunOptions, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are given, in the form in which they can be compared with those that a run began with: entries that are not given
    are as they were, and no bits are those of its method."""
    whole = over({name: getattr(began, name) for name in given}, given)
    own = METHODS[began.method].default_bits
    return {name: value or own if name in ("w_bits", "a_bits") else value for name, value in whole.items()}


def dump(options: RunOptions) -> str:
    """A YAML file that, read again, sets the same options."""
    return yaml.safe_dump(options.as_dict(), sort_keys=False, allow_unicode=True)


def _kind(name: str, where: str) -> str:
    if name not in TYPES:
        near = get_close_matches(name, TYPES, 1, 0.5)
        hint = f"; give it as --{name.replace('_', '-')}" if name in FLAGS else f"; did you mean {near[0]}?" if near else ""
        raise OptionError(f"{where}{shown(name)} is no option of a run{hint}")
    return TYPES[name]


def _text(value: Any) -> str:
    if not isinstance(value, str) or "\0" in value or len(value) > MOST_TEXT:
        raise ValueError
    return value


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value.bit_length() > 63:
        raise ValueError
    return value


def _number(value: Any) -> float:
    # PyYAML takes 1e-3, which has no point, for text
    if isinstance(value, bool) or not isinstance(value, int | float | str) or not math.isfinite(float(value)):
        raise ValueError
    return float(value)


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _truth_or_none(value: Any) -> bool | None:
    return None if value is None else _truth(value)


def _list(value: Any) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        raise ValueError
    return value


def _bits(value: Any) -> tuple[int, ...]:
    if isinstance(value, str):
        return arguments.bits(value)
    return tuple(_whole(b) for b in ([value] if isinstance(value, int) else _list(value)))


def _pairs(value: Any) -> tuple[tuple[int, int], ...]:
    if isinstance(value, str):
        return arguments.pairs(value)
    w_and_a = [[_whole(b) for b in _list(pair)] for pair in _list(value)]
    return tuple((w, a) for w, a in w_and_a)


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError
    check_plain(dict(value))
    return dict(value)


_READERS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "str": ("text", _text),
    "int": ("a whole number", _whole),
    "float": ("a number", _number),
    "bool": ("true or false", _truth),
    "bool | None": ("true, false or null", _truth_or_none),
    "tuple[int, ...]": ("bits like [2, 4, 8]", _bits),
    "tuple[tuple[int, int], ...]": ("pairs of weight and activation bits like [[2, 2], [8, 8]]", _pairs),
    "Mapping[str, Any]": ("names and plain values", _mapping),
}

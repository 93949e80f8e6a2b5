"""The options of a run, a study, … from a YAML file and from words key=value, checked by name and by type.

Where an option is given in several places, the last of these counts: the default, the file, key=value, a flag (--seeds 5). The entries of
mappings are options of their own, `method_options.samples=4`: each is taken from the last place that has it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Protocol

import typer
import yaml

from qprune import arguments
from qprune.options import OptionError, RunOptions
from qprune.plainjson import shown
from qprune.plainyaml import check_plain, read_mapping, value_of
from qprune.search.driver import METHODS

MOST_TEXT = 4096  # characters of a name, a path or a budget


@dataclass(frozen=True)
class Form:
    """What options there are, and of which types: the fields of a dataclass.

    kind    the dataclass
    called  what its options are options of, for messages
    flags   options of the command alone, which are no fields: they do not change what is computed, but for the last bits (threads)
    """

    kind: type
    called: str
    flags: tuple[str, ...] = ()

    @property
    def types(self) -> dict[str, str]:
        """Name → the type that the dataclass declares."""
        return {field.name: str(field.type) for field in fields(self.kind)}


RUN = Form(RunOptions, "a run")


class Options(Protocol):
    """A dataclass of options."""

    def as_dict(self) -> dict[str, Any]: ...


def read_file(path: Path, form: Form = RUN) -> dict[str, Any]:
    """The options that a YAML file sets, such as --print-config writes or options.yaml of a folder is. Raises OptionError for a file that
    cannot be read, an unknown name, or a value of another type."""
    try:
        found = read_mapping(path)
    except OSError as error:
        raise OptionError(f"cannot read the configuration {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise OptionError(f"cannot read the configuration {path}: {error}") from None
    return checked(found, f"{path}: ", form)


def read_words(words: Iterable[str], form: Form = RUN) -> dict[str, Any]:
    """["seeds=5", "w_bits=2,4", "method_options.samples=4"] → {"seeds": 5, "w_bits": (2, 4), "method_options": {"samples": 4}}. Values are
    YAML; those of options that are text are taken as they are. Raises OptionError as `read_file`."""
    found: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        name, *entries = key.strip().split(".")
        name = name.replace("-", "_")
        if not equals or not name or not all(entries):
            raise OptionError(f"expected key=value, got {shown(word)}")
        kind = _type(name, "", form)
        if entries and not kind.startswith("Mapping"):
            raise OptionError(f"{name} has no entries: expected {name}=value, got {shown(word)}")
        try:
            value = text if kind == "str" or (kind.startswith("tuple") and "[" not in text) else value_of(text)
        except ValueError as error:
            raise OptionError(f"{name}: expected a value of YAML, got {shown(text)} ({error})") from None
        if entries:
            entries[-1] = entries[-1].replace("-", "_")
        for entry in reversed(entries):
            value = {entry: value}
        found = over(found, checked({name: value}, "", form))
    return found


def checked(values: Mapping[str, Any], where: str = "", form: Form = RUN) -> dict[str, Any]:
    """Options as the dataclass has them, from plain values: tuples for lists, "2,4" and "2/4,8/8" read. Raises OptionError for a name that
    is no option, with the nearest that is, and for a value of another type. where: what messages begin with."""
    found = {}
    for name, value in values.items():
        expected, read = _READERS[_type(name, where, form)]
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
            both[name] = over(below[name], above[name])
    return both


def merged(file: Path | None, words: Sequence[str], flags: Mapping[str, Any], form: Form = RUN) -> dict[str, Any]:
    """The options that are set in any of the three places, by the order of the module's description."""
    return over(over(read_file(file, form) if file is not None else {}, read_words(words, form)), flags)


def completed(began: Options, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are given; entries of mappings that are not given are as in those that something began with."""
    return over({name: getattr(began, name) for name in given}, given)


def comparable(began: RunOptions, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are given, in the form in which they can be compared with those that a run began with: entries that are not given
    are as they were, and no bits are those of its method."""
    whole = completed(began, given)
    own = METHODS[began.method].default_bits
    return {name: value or own if name in ("w_bits", "a_bits") else value for name, value in whole.items()}


def dump(options: Options) -> str:
    """A YAML file that, read again, sets the same options."""
    return yaml.safe_dump(options.as_dict(), sort_keys=False, allow_unicode=True)


def _type(name: str, where: str, form: Form) -> str:
    types = form.types
    if name not in types:
        near = get_close_matches(name, types, 1, 0.5)
        hint = f"; give it as --{name.replace('_', '-')}" if name in form.flags else f"; did you mean {near[0]}?" if near else ""
        raise OptionError(f"{where}{shown(name)} is no option of {form.called}{hint}")
    return types[name]


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


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, str):
        return arguments.pair(value)
    w, a = (_whole(b) for b in _list(value))
    return w, a


def _words(value: Any) -> tuple[str, ...]:
    return arguments.words(_text(value)) if isinstance(value, str) else tuple(_text(word) for word in _list(value))


def _numbers(value: Any) -> tuple[float, ...]:
    if isinstance(value, str):
        return arguments.numbers(value)
    return tuple(_number(item) for item in ([value] if isinstance(value, int | float) else _list(value)))


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError
    check_plain(dict(value))
    return dict(value)


def _mappings(value: Any) -> dict[str, dict[str, Any]]:
    return {name: _mapping(entries) for name, entries in _mapping(value).items()}


_READERS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "str": ("text", _text),
    "int": ("a whole number", _whole),
    "float": ("a number", _number),
    "bool": ("true or false", _truth),
    "bool | None": ("true, false or null", _truth_or_none),
    "tuple[int, ...]": ("bits like [2, 4, 8]", _bits),
    "tuple[tuple[int, int], ...]": ("pairs of weight and activation bits like [[2, 2], [8, 8]]", _pairs),
    "tuple[int, int]": ("a pair of weight and activation bits like [3, 3]", _pair),
    "tuple[str, ...]": ("words like [w3a3, w2a2]", _words),
    "tuple[float, ...]": ("numbers like [0.5, 1]", _numbers),
    "Mapping[str, Any]": ("names and plain values", _mapping),
    "Mapping[str, Mapping[str, Any]]": ("names, each with names and plain values", _mappings),
}

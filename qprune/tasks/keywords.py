"""The options of a data set: keyword arguments of its function, checked against its signature before it is called."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from .order import DataError

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a name", Path: "", type(None): "nothing"}


def check_keywords(name: str, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Raises DataError for options that the keyword-only parameters of `function` do not have, and for values of another type."""
    known = [key for key, parameter in inspect.signature(function).parameters.items() if parameter.kind is parameter.KEYWORD_ONLY]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise DataError(f"data set {name!r} has no option {', '.join(unknown)}; its options: {', '.join(known)}")
    hints = get_type_hints(function)
    for key, value in options.items():
        if not _fits(value, hints[key]):
            raise DataError(f"data set {name!r}, option {key}: expected {_described(hints[key])}, got {value!r}")


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in arguments)
    if origin in (tuple, Sequence):
        return isinstance(value, list | tuple) and all(_fits(item, arguments[0]) for item in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def _described(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(filter(None, (_described(one) for one in arguments)))
    if origin in (tuple, Sequence):
        return "a list, each " + _described(arguments[0])
    return _WORDS[hint]

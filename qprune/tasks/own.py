"""Data and networks of the user's own, named as module:function.

    --data my_data:flowers --model my_nets:small

The module is imported with the current folder in front of the search path, as `python -m` does. The function is called with those of the
keywords it takes: seed and the data options for data, num_classes, in_channels and image_size for networks.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..kernels import QPruneError
from .loaders import of_loaders
from .order import DataError
from .task import Task

_REFERENCE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


def is_reference(text: str) -> bool:
    """Does it have the form package.module:function?"""
    return _REFERENCE.fullmatch(text) is not None


def resolve(text: str, kind: type[QPruneError]) -> Callable[..., Any]:
    """The function that `text` names. Raises `kind` where there is none; what the module itself raises comes through."""
    module_name, _, function_name = text.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        meant = f"; write {text.replace('.py:', ':', 1)}" if module_name.endswith(".py") else ""
        raise kind(f"{text}: there is no module {error.name!r} in {here} or among the installed packages{meant}") from None
    found: Any = module
    for name in function_name.split("."):
        if not hasattr(found, name):
            near = difflib.get_close_matches(name, [known for known in dir(found) if callable(getattr(found, known))], n=3)
            raise kind(f"{text}: {module_name} has no {function_name!r}" + (f"; did you mean {' or '.join(near)}?" if near else ""))
        found = getattr(found, name)
    if not callable(found):
        raise kind(f"{text}: {function_name!r} is {type(found).__name__}, not a function")
    return found  # type: ignore[no-any-return]


def called(function: Callable[..., Any], text: str, offered: Mapping[str, Any], kind: type[QPruneError]) -> Any:
    """function(**those of `offered` that it takes). Raises `kind` if it must have others."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        raise kind(f"{text}: its parameters cannot be told; wrap it in a function of your own") from None
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY and p.default is p.empty]
    lacking = [*positional, *(name for name, p in named.items() if p.default is p.empty and name not in offered)]
    if lacking:
        raise kind(f"{text} must be given {', '.join(lacking)}; what it can be given by name is {', '.join(offered)}")
    return function(**{name: value for name, value in offered.items() if takes_all or name in named})


def takes(text: str, keyword: str) -> bool:
    """Does the data function that `text` names have a parameter of that name?"""
    function = resolve(text, DataError)
    try:
        return keyword in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


def task(text: str, seed: int, options: Mapping[str, Any]) -> Task:
    """What the function `text` makes of seed and options: a Task, or three loaders of (x, y), for train, val and test.

    Loaders may also come as a mapping with these names. Raises DataError for anything else, and for options that it does not take.
    """
    function = resolve(text, DataError)
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        parameters = {}  # type: ignore[assignment]
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    unknown = [name for name in options if name not in parameters and name != "num_classes" and not takes_all]
    if unknown:
        raise DataError(f"{text} takes no {', '.join(unknown)}; it takes {', '.join(parameters) or 'nothing'}")
    made = called(function, text, {"seed": seed, **options}, DataError)
    return made if isinstance(made, Task) else of_loaders(text, made, options.get("num_classes"))

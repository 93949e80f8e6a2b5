"""The options of a dataclass from the parameters of a command that have the names of its fields."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import typer

from qprune import arguments


def options_of(context: typer.Context, kind: type) -> dict[str, Any]:
    """All that the command has, as given or by default."""
    from qprune.config import checked

    found = {field.name: context.params[field.name] for field in fields(kind) if field.name in context.params}
    mappings = {field.name for field in fields(kind) if str(field.type).startswith("Mapping")}
    return checked({name: arguments.settings(value or ()) if name in mappings else value for name, value in found.items()})


def given_flags(context: typer.Context, kind: type) -> dict[str, Any]:
    """Those that were given on the command line, though they may say the default."""
    return {name: value for name, value in options_of(context, kind).items() if _given(context, name)}


def _given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"

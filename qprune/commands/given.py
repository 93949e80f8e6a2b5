"""The options of a command: from its parameters that are named as the fields of a dataclass, from --config and from KEY=VALUE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import typer

from qprune import arguments

if TYPE_CHECKING:
    from qprune.config import Options

Kind = TypeVar("Kind", bound="Options")


class Given(Generic[Kind]):
    """What a command was told, of the options of a dataclass.

    context   of a command that also has the parameters `config` and `overrides` (qprune.commands.shared)
    called    what the options are options of, for messages: "a run"
    together  parameters that set several fields at once

    form      these options
    set       those given anywhere, though they may say the default
    """

    def __init__(self, context: typer.Context, kind: type[Kind], called: str, together: Mapping[str, Sequence[str]] | None = None) -> None:
        from qprune.config import Form, checked, merged

        self.kind, parameters, types = kind, context.params, Form(kind, called).types
        self.form = Form(kind, called, tuple(name for name in parameters if name not in types))
        sets = {name: (name,) for name in types if name in parameters} | dict(together or {})
        sources = {name: parameter for parameter, names in sets.items() for name in names}
        self._all = checked({name: _plain(parameters[source], types[name]) for name, source in sources.items()}, "", self.form)
        flags = {name: value for name, value in self._all.items() if _on_command_line(context, sources[name])}
        self.set = merged(parameters["config"], parameters["overrides"] or (), flags, self.form)

    def options(self) -> Kind:
        """All options: those that are set, and the command's defaults of the others. Raises OptionError for what cannot be."""
        from qprune.config import over

        return self.kind(**over(self._all, self.set))


def show(options: Options) -> None:
    """Print them as a file for --config."""
    from qprune.config import dump

    typer.echo(dump(options), nl=False)


def _plain(value: Any, kind: str) -> Any:
    """Mappings from words name=value or method.name=value."""
    if not kind.startswith("Mapping"):
        return value
    return arguments.method_settings(value or ()) if kind.count("Mapping") > 1 else arguments.settings(value or ())


def _on_command_line(context: typer.Context, parameter: str) -> bool:
    source = context.get_parameter_source(parameter)
    return source is not None and source.name == "COMMANDLINE"

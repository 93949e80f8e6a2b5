"""What commands share whose work is done by any number of processes, in a folder where it can go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import typer

from qprune.commands import shared
from qprune.commands.given import Given, Kind

if TYPE_CHECKING:
    from pathlib import Path

    from qprune.experiment import Watcher
    from qprune.ranks import Ranks
    from qprune.resume.signals import Stop

REPEATED = 5.0
"""Seconds within which a signal is the one before, which a terminal and torchrun both send to every process."""


def agreed(
    given: Given[Kind], context: typer.Context, ranks: Ranks, comparable: Callable[[Any, Mapping[str, Any]], dict[str, Any]]
) -> Kind:
    """The options that all ranks have: with --resume those that the folder's work began with, which must not contradict what is given, if
    any began. comparable: see qprune.config."""
    from qprune.resume.folder import CHANGEABLE, RESULT, check_same, options_in

    out, threads = context.params["out"], context.params["threads"]
    began: Kind | None = ranks.from_main(options_in, out, given.form) if context.params["resume"] else None
    if began is not None:
        ranks.from_main(check_same, began, out, comparable(began, given.set), threads)
        if ranks.main and not context.params["print_config"] and (out / RESULT).exists():
            shared.console.print(f"{out} holds a finished run.")
    changed = {name: value for name, value in given.set.items() if name in CHANGEABLE}
    options = given.options() if began is None else replace(began, **changed)  # type: ignore[type-var]
    ranks.agree("configuration", str(options.as_dict()))
    return options


@contextmanager
def watched(folder: Path, seeds: int, batch_size: int, ranks: Ranks) -> Iterator[tuple[Watcher, Stop]]:
    """Who watches the work: on rank 0 bars, and TensorBoard in the folder where it is installed. And who may ask it to stop."""
    from qprune.console import Bars
    from qprune.resume.signals import Stop
    from qprune.watch import TENSORBOARD, Several, TensorBoard, has_tensorboard

    with Stop(patience=0.0 if ranks.alone else REPEATED).listening() as stop:
        if not ranks.main:
            yield Several([]), stop
            return
        with Bars(shared.console, seeds, batch_size) as bars:
            yield Several([bars, TensorBoard(folder / TENSORBOARD)] if has_tensorboard() else [bars]), stop

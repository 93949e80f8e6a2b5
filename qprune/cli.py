"""The command line: qprune search, export, compare, study, train, cost, report, bench."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

import typer

from qprune.commands.bench import bench
from qprune.commands.compare import compare
from qprune.commands.cost import cost
from qprune.commands.export import export
from qprune.commands.report import report
from qprune.commands.search import search
from qprune.commands.study import study
from qprune.commands.train import train
from qprune.errors import QPruneError
from qprune.ranks import RankError
from qprune.resume.signals import Stopped

app = typer.Typer(
    help="Choose how many bits every filter and activation of a convolutional network gets, within a budget.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
_TOLD = 3.0
"""Seconds in which torchrun ends the other processes when rank 0 fails: what fails all of them is then told once."""
for _command in (search, export, compare, study, train, cost, report, bench):
    app.command()(_command)


def main() -> None:
    """Run the command line. An error that qprune raises on purpose is one line on standard error, exit code 2."""
    _guarded(app)


def _guarded(command: Callable[..., Any]) -> None:
    rank = int(os.environ.get("RANK", "0"))
    try:
        command()
    except QPruneError as error:
        if rank:
            time.sleep(_TOLD)
        if not rank or not isinstance(error, RankError):
            sys.stderr.write(f"qprune: {f'rank {rank}: ' if rank else ''}{' '.join(str(error).split())}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("qprune: interrupted\n")
        sys.exit(130)
    except Stopped as stopped:
        if not rank:
            sys.stderr.write(f"qprune: {stopped}\n")
        sys.exit(stopped.exit_code)


if __name__ == "__main__":
    main()

"""qprune report: the page of a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qprune.commands import shared


def report(folder: Annotated[Path, typer.Argument(help="The folder of a search, a study or a comparison.")]) -> None:
    """Write report.html of a folder: of a search, finished or not, a study or a comparison."""
    from qprune.reporting import write_report

    shared.console.print(f"Report: {write_report(folder)}")

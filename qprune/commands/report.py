"""qprune report: the page of a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qprune.commands import shared


def report(folder: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Write report.html of a run folder, finished or not."""
    from qprune.report import write_report

    shared.console.print(f"Report: {write_report(folder)}")

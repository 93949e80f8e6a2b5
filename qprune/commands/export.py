"""qprune export: the network of a run in other formats."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qprune.commands import shared
from qprune.console import export_table


def export(
    folder: Annotated[Path, typer.Argument(help="The folder of a finished qprune search.")],
    formats: Annotated[str, typer.Option("--format", help="Some of onnx, qonnx, packed, torch, safetensors; or all.")] = "onnx",
    out: Annotated[Path | None, typer.Option(help="Folder for the files. Default: export in the run's folder.")] = None,
    seed: Annotated[int | None, typer.Option(help="Which of the run's seeds; default: the first.")] = None,
    samples: Annotated[int, typer.Option(help="Test samples on which files are compared with PyTorch.")] = 64,
    threads: shared.Threads = 0,
) -> None:
    """Write the network of a run in other formats, and compare what the files compute with PyTorch on the run's test data."""
    from qprune.errors import ExportError
    from qprune.exporting import export_run, formats_of

    shared.set_threads(threads)
    place, files = export_run(folder, formats_of(formats), out, seed, samples)
    shared.console.print(export_table(files))
    written = [file.file for file in files if file.error is None]
    if written:
        shared.console.print(f"In {place}: {', '.join(written)}")
    failed = [f"{file.format}: {file.error}" for file in files if file.error is not None]
    if failed:
        raise ExportError("; ".join(failed))

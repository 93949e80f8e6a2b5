"""Measure everything and print one table: `python -m benchmarks [--quick] [--markdown] [--out benchmarks/results/cpu.json]`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from . import machine, rows, table
from .measure import DEVICE, WrongResultError


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Time qprune against eager PyTorch and torch.compile.")
    parser.add_argument("--out", type=Path, help="write the numbers to this JSON file")
    parser.add_argument("--quick", action="store_true", help="three rounds instead of nine or more")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="threads of torch (default: %(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    described = machine.describe(DEVICE)
    if described["load"] > 0.5:
        print(
            f"this machine is busy (load {described['load']}): parallel code waits for its slowest thread, times will vary", file=sys.stderr
        )
    progress = Progress(
        SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=Console(stderr=True), transient=True
    )
    found = []
    with progress:
        task = progress.add_task("resnet20 step")
        try:
            for row in rows.measure(options.quick, DEVICE):
                found.append(row)
                progress.update(task, description=f"{len(found)} rows, last: {row.case}")
        except WrongResultError as error:
            print(f"not timed: {error}", file=sys.stderr)
            return 1
    described["load after"] = round(os.getloadavg()[0], 2)
    if options.markdown:
        print(table.markdown(found, described))
    else:
        Console().print(table.rich_table(found, described))
    if options.out is not None:
        command = " ".join(["python -m benchmarks", *(sys.argv[1:] if arguments is None else arguments)])
        table.write_json(options.out, found, described, command)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""How long checkpoints of a run take to write and to read, and how large they are: `python -m benchmarks.checkpoint`.

A search (EdMIPS: SGD with momentum, Adam for ranges and gates) and a float training, after one step on two small images, so that the
optimizers have their state. Saving is all that a run waits for: taking the state, checking that it is finite, copying, SHA-256, writing,
fsync, renaming. Loading is reading, SHA-256, and setting model, optimizers and random numbers. Medians of `--rounds`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import nn

from qprune.resume.checkpoints import Checkpoints
from qprune.resume.phase import Phase
from qprune.search.driver import Search
from qprune.tasks.train import Trainer
from qprune.usage import Meter

from . import machine
from . import table as tables
from .operations import network, searching
from .shapes import NETWORKS


@dataclass(frozen=True)
class Row:
    """parameters: numbers that are trained, gates and ranges included; bytes: of the file; save, load: median seconds."""

    network: str
    phase: str
    parameters: int
    bytes: int
    save: float
    load: float


def _float(name: str) -> tuple[nn.Module, Trainer]:
    net, x = network(name)
    trainer = Trainer(net, 1)
    trainer.run_epoch([(x, torch.zeros(len(x), dtype=torch.int64))])
    return net, trainer


def _search(name: str) -> tuple[nn.Module, Search]:
    net, x = network(name)
    search = searching(net, x)
    search.step(lambda m: F.cross_entropy(m(x), torch.zeros(len(x), dtype=torch.int64)))
    return search.model, search


KINDS: dict[str, Callable[[str], tuple[nn.Module, Any]]] = {"float": _float, "search": _search}


def measure(name: str, kind: str, folder: Path, rounds: int) -> Row:
    """Save and load in turn."""
    model, loop = KINDS[kind](name)
    meter, saving, loading, size = Meter(), [], [], 0
    generator = torch.Generator().manual_seed(0)
    with meter.phase(kind):
        for number in range(rounds):
            checkpoints = Checkpoints(folder)
            checkpoints.clear()
            phase = Phase(kind, model, loop, generator, meter, folder.parent, checkpoints)
            checkpoints.steps = number + 1
            started = time.perf_counter()
            phase.epoch()
            saving.append(time.perf_counter() - started)
            path = checkpoints.last()
            assert path is not None
            size = path.stat().st_size
            again = Checkpoints(folder)
            started = time.perf_counter()
            Phase(kind, model, loop, generator, meter, folder.parent, again)
            loading.append(time.perf_counter() - started)
            assert again.steps == number + 1
    parameters = sum(p.numel() for p in model.parameters())
    return Row(name, kind, parameters, size, statistics.median(saving), statistics.median(loading))


def table(rows: Sequence[Row], described: dict[str, Any]) -> Table:
    found = Table(title=machine.headline(described), title_justify="left")
    for column in ("network", "of", "parameters", "MB", "save, s", "load, s", "MB/s saved"):
        found.add_column(column, justify="left" if column in ("network", "of") else "right")
    for row in rows:
        found.add_row(
            row.network, row.phase, f"{row.parameters:,}", f"{row.bytes / 1e6:.1f}", f"{row.save:.3f}", f"{row.load:.3f}",
            f"{row.bytes / 1e6 / row.save:.0f}",
        )  # fmt: skip
    return found


def main(arguments: Sequence[str] | None = None, told: Callable[[Any], object] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint", description="Time and size of checkpoints.")
    parser.add_argument("--networks", default="resnet20,resnet50", help=f"some of {', '.join(NETWORKS)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write them (default: the system's temporary folder)")
    parser.add_argument("--out", type=Path, help="write the numbers to this JSON file")
    given = parser.parse_args(arguments)
    names = given.networks.split(",")
    if unknown := [name for name in names if name not in NETWORKS]:
        parser.error(f"--networks: expected some of {', '.join(NETWORKS)}, got {', '.join(unknown)}")
    described = machine.describe("cpu")
    with tempfile.TemporaryDirectory(dir=given.folder) as place:
        rows = [measure(name, kind, Path(place, "checkpoints"), given.rounds) for name in names for kind in KINDS]
    (told or Console().print)(table(rows, described))
    if given.out is not None:
        command = " ".join(["python -m benchmarks.checkpoint", *(sys.argv[1:] if arguments is None else arguments)])
        tables.write_json(given.out, [asdict(row) for row in rows], {**described, "load after": round(os.getloadavg()[0], 2)}, command)
    return 0


if __name__ == "__main__":
    sys.exit(main())

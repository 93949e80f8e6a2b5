"""What a run adds to the training loop that one would write by hand, per step.

    python -m benchmarks.driver
    python -m benchmarks.driver --network resnet8 --batch 8 --steps 10 --threads 1

A phase of a run is driven with all that `qprune search` puts around it: progress bars, metrics, watchers, checks for numbers that are not
finite, checkpoints, flags that ask to stop. Between two of its batches the loader makes one step of a loop without these, of the same
network with an optimizer of its own, so that a slow second of the machine counts for both. The ratio is the median over steps of the
ratios of neighbours. Fetching the batch counts for neither. The bare step of the search is the method's own arithmetic (mixtures,
expected cost, penalty, optimizers), with nothing around it. Checkpoints are told apart, as the share of a run that has one every ten
minutes.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from qprune.budget import Budget
from qprune.console import Bars
from qprune.experiment import Experiment
from qprune.options import RunOptions
from qprune.recipes import recipe_for
from qprune.resume.checkpoints import Checkpoints
from qprune.search.driver import Search
from qprune.tasks import train
from qprune.tasks.data import synthetic
from qprune.tasks.sources import network_of
from qprune.tasks.task import Batches, Part, Task
from qprune.watch import Several, TensorBoard, has_tensorboard

from . import machine
from . import table as tables

BareStep = Callable[[Tensor, Tensor], object]
MINUTES = 10.0
"""Between checkpoints, as runs have it by default."""


@dataclass(frozen=True)
class Setup:
    network: str = "resnet20"
    batch: int = 64
    steps: int = 30
    side: int = 32
    warm: int = 3


@dataclass(frozen=True)
class Row:
    """bare, driven  median seconds of a step
    ratio            median over steps of driven / bare; band: the tenth and ninetieth percentile
    cpu_ratio        the same of processor time, which other programs on the machine disturb less
    checkpoint       median seconds; share: of the time of a run that has one every ten minutes
    """

    phase: str
    network: str
    batch: int
    steps: int
    bare: float
    driven: float
    ratio: float
    band: tuple[float, float]
    cpu_ratio: float
    checkpoint: float
    share: float


class Turns:
    """The batches of a loader, and before each a bare step on it; taken: by phase, seconds of (bare, driven) steps, in order; cpu:
    the same in processor time."""

    def __init__(self, loader: Batches) -> None:
        self.loader, self.bare, self.name = loader, None, ""
        self.taken: dict[str, list[tuple[float, float]]] = {}
        self.cpu: dict[str, list[tuple[float, float]]] = {}

    def begin(self, name: str, bare: BareStep | None) -> None:
        """The phase that begins; without a bare step nothing is measured."""
        self.name, self.bare = name, bare

    def end(self) -> None:
        self.begin("", None)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        taken, cpu = self.taken.setdefault(self.name, []), self.cpu.setdefault(self.name, [])
        for x, y in self.loader:
            if self.bare is None:
                yield x, y
                continue
            moments = [_now()]
            self.bare(x, y)
            moments.append(_now())
            yield x, y
            moments.append(_now())
            for pairs, (start, between, end) in zip((taken, cpu), zip(*moments, strict=True), strict=True):
                pairs.append((between - start, end - between))


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


class TurnsTask(Task):
    """A task in memory whose training batches come from its `turns`."""

    def to(self, device: torch.device | str) -> TurnsTask:
        return self

    def loader(self, part: str | Part, batch_size: int, generator: torch.Generator | None = None, *args: Any, **more: Any) -> Batches:
        loader = super().loader(part, batch_size, generator, *args, **more)
        if generator is None:
            return loader
        self.__dict__["turns"].loader = loader
        return self.__dict__["turns"]


class Starts:
    """A watcher that says which phase begins, and that its only epoch is over."""

    def __init__(self, begun: Callable[[str], None], over: Callable[[], None]) -> None:
        self.begun, self.over = begun, over

    def phase(self, name: str, seed: int, steps: int, done: int = 0) -> None:
        self.begun(name)

    def step(self, values: Mapping[str, float]) -> None:
        """Nothing."""

    def epoch(self, values: Mapping[str, Any]) -> None:
        self.over()


def bare_float(net: nn.Module, lr: float, autocast: torch.dtype | None = None) -> BareStep:
    """Forward, backward, SGD, as a tutorial writes it."""
    decayed, plain, _ = train.parameter_groups(net.train())
    groups = [{"params": decayed, "weight_decay": 5e-4}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True)

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        with torch.autocast(x.device.type, dtype=autocast, enabled=autocast is not None):
            loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()

    return step


def bare_search(search: Search) -> BareStep:
    """The arithmetic of EdMIPS on the search's model, with optimizers that check nothing."""
    method = search.method
    model, optimizers, constraint = search.model.train(), method.optimizers, method.constraint
    optimizers.check = None

    def step(x: Tensor, y: Tensor) -> None:
        optimizers.zero_grad()
        with method.premix:
            loss = F.cross_entropy(model(x), y)
        slack = constraint.slack(method.expected_cost())
        (loss + constraint.penalty(slack)).backward()
        optimizers.step_weights()
        optimizers.step_arch()
        constraint.update(slack)

    return step


class _Timed(Checkpoints):
    """Seconds that every checkpoint took."""

    def save(self, phase: str, state: dict[str, Any], end: bool = False) -> Path:
        started = time.perf_counter()
        path = super().save(phase, state, end)
        self.__dict__.setdefault("seconds", {}).setdefault(phase, []).append(time.perf_counter() - started)
        return path


def measure(setup: Setup, folder: Path) -> list[Row]:
    """One row per kind of phase."""
    steps = setup.warm + setup.steps
    made = synthetic(image_size=setup.side, train=setup.batch * steps, val=setup.batch, test=setup.batch)
    task = TurnsTask(*(getattr(made, name) for name in made.__dataclass_fields__))
    turns = task.__dict__["turns"] = Turns(made.loader("train", setup.batch))
    options = RunOptions(
        data="synthetic", model=setup.network, method="edmips", batch_size=setup.batch, device="cpu",
        float_epochs=1, search_epochs=1, finetune_epochs=0,
    )  # fmt: skip
    torch.manual_seed(0)
    net = network_of(options, task)
    recipe = recipe_for(options, task.example())

    def bare(name: str) -> BareStep | None:
        if name == "float":
            return bare_float(copy.deepcopy(net), options.lr)
        if name == "search":
            mixed = recipe.prepare(copy.deepcopy(net), [task.example(setup.batch)])
            return bare_search(Search(mixed, Budget.parse(options.budget), "edmips", steps=steps))
        return None

    checkpoints = _Timed(folder / "checkpoints", MINUTES)
    with Path(os.devnull).open("w") as nowhere:
        bars = Bars(Console(file=nowhere, force_terminal=True), 1, setup.batch)
        watcher = Several([Starts(lambda name: turns.begin(name, bare(name)), turns.end), bars, *_tensorboard(folder)])
        experiment = Experiment(options, task, 0, folder, watcher, recipe, checkpoints)
        with bars:
            experiment.train("float", net, 1, options.lr)
            experiment.searched(net)
    return [_row(name, setup, turns, statistics.median(checkpoints.__dict__["seconds"][name])) for name in ("float", "search")]


def _tensorboard(folder: Path) -> list[TensorBoard]:
    return [TensorBoard(folder / "tensorboard")] if has_tensorboard() else []


def _row(name: str, setup: Setup, turns: Turns, checkpoint: float) -> Row:
    pairs, cpu = (taken[name][setup.warm :] for taken in (turns.taken, turns.cpu))
    ratios = sorted(driven / bare for bare, driven in pairs)
    of_cpu = statistics.median(driven / bare for bare, driven in cpu)
    tenth = len(ratios) // 10
    bare, driven = (statistics.median(values) for values in zip(*pairs, strict=True))
    return Row(
        name, setup.network, setup.batch, len(pairs), bare, driven, statistics.median(ratios), (ratios[tenth], ratios[-1 - tenth]),
        of_cpu, checkpoint, checkpoint / (60 * MINUTES),
    )  # fmt: skip


def table(rows: Sequence[Row], described: Mapping[str, Any]) -> Table:
    found = Table(title=machine.headline(dict(described)), title_justify="left")
    for column in ("phase", "bare step, ms", "in a run, ms", "ratio", "10 to 90 %", "of CPU time", "checkpoint, ms", "of ten minutes"):
        found.add_column(column, justify="left" if column == "phase" else "right")
    for row in rows:
        found.add_row(
            row.phase, f"{row.bare * 1e3:.1f}", f"{row.driven * 1e3:.1f}", f"{row.ratio:.3f}", f"{row.band[0]:.3f} to {row.band[1]:.3f}",
            f"{row.cpu_ratio:.3f}", f"{row.checkpoint * 1e3:.0f}", f"{row.share:.4%}",
        )  # fmt: skip
    return found


def main(arguments: Sequence[str] | None = None, told: Callable[[Any], object] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.driver", description="What a run adds to its training loop, per step.")
    defaults = Setup()
    for name, kind in (("network", str), ("batch", int), ("steps", int), ("side", int), ("warm", int)):
        parser.add_argument(f"--{name}", type=kind, default=getattr(defaults, name))
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--out", type=Path, help="write the numbers to this JSON file")
    given = vars(parser.parse_args(arguments))
    out, threads = given.pop("out"), given.pop("threads")
    if threads is not None:
        torch.set_num_threads(threads)
    described = machine.describe("cpu")
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Setup(**given), Path(folder))
    (told or Console().print)(table(rows, described))
    if out is not None:
        command = " ".join(["python -m benchmarks.driver", *(sys.argv[1:] if arguments is None else arguments)])
        tables.write_json(out, [asdict(row) for row in rows], {**described, "load after": round(os.getloadavg()[0], 2)}, command)
    return 0


if __name__ == "__main__":
    sys.exit(main())

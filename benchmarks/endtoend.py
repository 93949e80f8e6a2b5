"""`qprune bench --end-to-end`: the parts of a run, what they predict for a whole one, and what that takes.

Parts are measured one by one on noise of the given size (benchmarks/parts.py); qprune/scale.py predicts time and memory from them. Then a
whole run is made: float training, search, fine-tuning, uniform baseline, with evaluations and checkpoints. Under torchrun all ranks do
this together. Nothing is learnt from the noise; the numbers are about time and memory.

On a CPU memory is that of a short run before, in which freed memory goes back to the system at once. Otherwise glibc keeps much of it,
and how much more than its tensors a process holds is a matter of chance.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from qprune import ranks, scale
from qprune.errors import InputError
from qprune.experiment import MEASURED as EVALUATED
from qprune.experiment import Experiment
from qprune.options import RunOptions
from qprune.precision import AMP, device_of, switched
from qprune.ranks import Ranks
from qprune.resume.checkpoints import Checkpoints
from qprune.scale import Parts, Plan
from qprune.tasks.sources import task_of
from qprune.tasks.task import Task
from qprune.usage import Usage
from qprune.watch import Several

from . import allreduce, machine, parts
from . import table as tables
from .parts import PHASES, Memory, Rounds, Subject

TRAINED = {"float": "float epochs", "search": "search", "finetune": "fine-tuning", "uniform": "uniform baseline"}


@dataclass(frozen=True)
class Request:
    """batch: images of a step, over all ranks, in `accumulate` parts; steps: of an epoch; rounds: in which parts are timed."""

    model: str = "resnet20"
    batch: int = 64
    steps: int = 20
    image_size: int = 32
    method: str = "edmips"
    device: str = "auto"
    amp: str = ""
    epochs: int = 1
    accumulate: int = 1
    rounds: int = 7

    def options(self) -> RunOptions:
        for name in ("batch", "steps", "image_size", "epochs", "accumulate", "rounds"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(self, name)}")
        evaluated = max(EVALUATED, self.batch)
        images = {"image_size": self.image_size, "train": self.batch * self.steps, "val": evaluated, "test": evaluated}
        return RunOptions(
            data="synthetic", data_options=images, model=self.model, method=self.method, batch_size=self.batch, device=self.device,
            amp=self.amp, accumulate=self.accumulate, float_epochs=self.epochs, search_epochs=self.epochs, finetune_epochs=self.epochs,
        )  # fmt: skip


@dataclass(frozen=True)
class Line:
    """predicted, measured: seconds or bytes; steps of the phase, where it has any; share: of a processor that the process had per thread,
    in the run divided by while the parts were measured. It is below 1 if other programs took more of the machine during the run."""

    name: str
    unit: str
    predicted: float
    measured: float
    steps: int = 0
    share: float = 1.0

    @property
    def error(self) -> float:
        """(predicted - measured) / measured."""
        return (self.predicted - self.measured) / self.measured if self.measured else 0.0

    @property
    def error_of_processor_time(self) -> float:
        """The same of the time that the process computed."""
        return self.predicted / (self.share * self.measured) - 1 if self.measured else 0.0


def plan_of(options: RunOptions, who: Ranks) -> Plan:
    epochs = {
        "float": options.float_epochs, "search": options.search_epochs, "finetune": options.finetune_epochs,
        "uniform": options.search_epochs + options.finetune_epochs,
    }  # fmt: skip
    images = options.data_options
    return Plan(images["train"], options.batch_size, epochs, images["val"], who.count, accumulate=options.accumulate)


def added(memory: Memory, options: RunOptions, who: Ranks, phase: str) -> float:
    """Bytes that training of a phase adds to what is there when it begins: the model is. An evaluation may take more than a step."""
    name = PHASES[phase]
    images = options.batch_size / who.count / options.accumulate
    found = scale.memory(memory.sizes[name], images, who.count, 2 if AMP[options.amp] else 4)
    step = sum(size for part, size in found.items() if part != "weights")
    return max(step, found["gradients"] + found["optimizer"] + memory.evaluated[name] * EVALUATED / who.count)


def whole(options: RunOptions, task: Task, folder: Path, who: Ranks) -> tuple[float, float, dict[str, Usage]]:
    """Seconds of a run, its processor time, and what its phases took."""
    started, cpu = time.perf_counter(), time.process_time()
    checkpoints = Checkpoints(folder / "states", ranks=who)
    experiment = Experiment(options, task, options.seed, folder, Several([]), checkpoints=checkpoints, ranks=who)
    experiment.run()
    return time.perf_counter() - started, time.process_time() - cpu, experiment.meter.phases


@dataclass(frozen=True)
class Found:
    """All that was measured."""

    parts: Parts
    memory: Memory
    rounds: Rounds
    lines: list[Line]


def measure(request: Request, who: Ranks, folder: Path) -> Found:
    """Memory, on a CPU with a short run of its own; parts, half of the rounds before the run and half after it, so that a machine that
    becomes slower does for both; the run."""
    options = request.options()
    task, rounds = task_of(options), Rounds()
    subject = Subject(options, task, who)
    cpu = subject.device.type == "cpu"
    for name in ("short", "whole"):
        (folder / name).mkdir(parents=True)
    with parts.freed_at_once(cpu):
        with switched(options):
            subject.make(Rounds())
            memory = parts.memory_of(subject)
        short = replace(request, steps=2, epochs=1).options()
        taken = whole(short, task_of(short), folder / "short", who)[2] if cpu else {}
    half = math.ceil(request.rounds / 2)
    with switched(options):
        parts.time_all(subject, rounds, half, folder)
    seconds, processor, phases = whole(options, task, folder / "whole", who)
    with switched(options):
        parts.time_all(subject, rounds, half, folder)
        link = allreduce.measure(who, subject.device)
    found = parts.parts_of(subject, rounds, link)
    plan = plan_of(options, who)
    predicted = scale.run(found, plan)
    usual = rounds.processor / rounds.wall

    def line(name: str, predicted: float, seconds: float, processor: float, steps: int = 0) -> Line:
        return Line(name, "s", predicted, seconds, steps, processor / seconds / usual if cpu and seconds else 1.0)

    lines = [
        line(TRAINED[name], predicted[name], usage.seconds, usage.cpu_seconds, plan.epochs[name] * plan.steps)
        for name, usage in phases.items()
    ]
    within = [sum(getattr(usage, name) for usage in phases.values()) for name in ("seconds", "cpu_seconds")]
    lines.append(line("all else", predicted["once"], seconds - within[0], processor - within[1]))
    lines.append(line("total", predicted["total"], seconds, processor))
    for name, usage in (taken or phases).items():
        if usage.before:
            lines.append(Line(f"memory of {TRAINED[name]}", "B", added(memory, options, who, name), usage.memory - usage.before))
    return Found(found, memory, rounds, lines)


def table_of_parts(found: Found, options: RunOptions, who: Ranks) -> Table:
    """What was measured alone."""
    parts, images = found.parts, options.batch_size // who.count // options.accumulate
    table = Table(title="parts", title_justify="left")
    for column in ("part", "measured"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for phase, name in (("float", "float"), ("search", "search"), ("finetune", "fixed bits")):
        seconds = parts.step[phase].seconds(images)
        table.add_row(f"step, {name}, {images} images", f"{seconds * 1e3:.1f} ms, {images / seconds:,.0f} images/s")
    table.add_row(
        "driver, a step", f"{parts.driver * 1e3:.2f} ms, {parts.driver / parts.step['float'].seconds(images):.1%} of the float step"
    )
    table.add_row("loader alone", f"{1 / parts.loading:,.0f} images/s" if parts.loading else "")
    for phase, name in (("float", "float"), ("search", "search"), ("finetune", "fixed bits")):
        table.add_row(f"evaluation, {name}", f"{1 / parts.evaluation[phase]:,.0f} images/s")
        table.add_row(f"checkpoint, {name}", f"{parts.checkpoint[phase] * 1e3:.0f} ms")
    for phase in ("float", "search"):
        size = found.memory.sizes[PHASES[phase]]
        table.add_row(f"memory of an image, {phase}", f"{size.kept / 1e6:.2f} MB")
    if not who.alone:
        link = parts.link
        table.add_row(f"sum over {who.count} ranks", f"{link.bandwidth / 1e9:.2f} GB/s, latency {link.latency * 1e6:.0f} µs")
    return table


def table_of_lines(lines: Sequence[Line]) -> Table:
    table = Table(title="a whole run, predicted from the parts and measured", title_justify="left")
    for column in ("", "steps", "predicted", "measured", "error", "of processor time"):
        table.add_column(column, justify="right" if column else "left")
    for line in lines:
        values = [f"{v:.1f} s" if line.unit == "s" else f"{v / 1e6:.1f} MB" for v in (line.predicted, line.measured)]
        computed = f"{line.error_of_processor_time:+.1%}" if line.unit == "s" else ""
        table.add_row(line.name, str(line.steps or ""), *values, f"{line.error:+.1%}", computed)
    return table


def run(request: Request, out: Path | None, told: Callable[[Any], object] | None = None, command: str = "") -> int:
    """Measure, print on the first rank, write JSON there."""
    told = told or Console(soft_wrap=True).print
    with ranks.joined() as who, tempfile.TemporaryDirectory() as place:
        if request.batch % (who.count * request.accumulate):
            raise InputError(f"--batch: expected a multiple of {who.count} ranks x {request.accumulate} parts, got {request.batch}")
        options = request.options()
        kind = device_of(options.device).type
        described = machine.describe(kind) | {"ranks": who.count}
        found = measure(request, who, Path(place))
        if not who.main:
            return 0
        told(machine.headline(described) + (f", {who.count} ranks" if not who.alone else ""))
        told(f"{request.model}, {request.image_size} x {request.image_size}, batch {request.batch}, {request.method}")
        told(table_of_parts(found, options, who))
        told(table_of_lines(found.lines))
        if out is not None:
            described["load after"] = round(os.getloadavg()[0], 2)
            rows = [{**asdict(line), "error": line.error, "error of processor time": line.error_of_processor_time} for line in found.lines]
            tables.write_json(
                out, rows, described, command, request=asdict(request), parts=parts.as_dict(found.parts, found.memory, found.rounds)
            )
    return 0


def main(arguments: Sequence[str] | None = None, told: Callable[[Any], object] | None = None) -> int:
    import argparse

    parser = argparse.ArgumentParser(prog="python -m benchmarks.endtoend", description=__doc__)
    defaults = Request()
    for name, value in asdict(defaults).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path)
    given = vars(parser.parse_args(arguments))
    out, threads = given.pop("out"), given.pop("threads")
    if threads:
        torch.set_num_threads(threads)
    return run(
        Request(**given), out, told, " ".join(["python -m benchmarks.endtoend", *(sys.argv[1:] if arguments is None else arguments)])
    )


if __name__ == "__main__":
    sys.exit(main())

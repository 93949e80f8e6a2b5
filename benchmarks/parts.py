"""The parts that a run is made of, measured one by one: steps, data, evaluation, checkpoints, communication, memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qprune.budget import Budget
from qprune.nn.mixing import QuantizedLayer
from qprune.options import RunOptions
from qprune.precision import AMP, device_of, laid_out
from qprune.prepare import arch_parameters, quantizer_parameters
from qprune.ranks import Ranks
from qprune.recipes import recipe_for
from qprune.resume.checkpoints import Checkpoints
from qprune.resume.phase import Phase
from qprune.scale import Parts, Size, StepCost
from qprune.search.driver import METHODS, Search
from qprune.tasks.sources import network_of
from qprune.tasks.task import Task
from qprune.tasks.train import Trainer, evaluate
from qprune.usage import Meter

from . import allreduce
from .driver import bare_float
from .measure import alternate

PHASES = {"float": "float", "search": "search", "finetune": "fixed", "uniform": "fixed"}
"""Phase of a run → the network that is trained in it."""
EVALUATED = 256
"""Images at once in an evaluation of a run."""
CALIBRATED = DRIVEN = 4


@dataclass
class Stopwatch:
    """Seconds of what happens once, by name."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started


@dataclass(frozen=True)
class Measured:
    """parts: for qprune.scale; sizes: by network; evaluated: bytes per image of an evaluation, by network; once: seconds by name; rounds:
    seconds of every call that was timed, by name."""

    parts: Parts
    sizes: dict[str, Size]
    evaluated: dict[str, float]
    once: dict[str, float]
    rounds: dict[str, list[float]]


class Subject:
    """The three networks of a run of these options, and what trains them, on one rank and without the others."""

    def __init__(self, options: RunOptions, task: Task, who: Ranks) -> None:
        self.options, self.device, self.who = options, device_of(options.device), who
        self.task = task.to(self.device)
        self.watch = Stopwatch()
        example = self.task.example()
        torch.manual_seed(options.seed)
        net = network_of(options, self.task).to(self.device)
        if not options.channels_last:
            net.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        recipe = recipe_for(options, example)
        batches = [self.images(options.batch_size // who.count)[0]] * CALIBRATED
        with self.watch("check"):
            recipe.check(net)
        with self.watch("prepare"):
            mixed = recipe.prepare(net, batches)
        self.search = Search(
            mixed, Budget.parse(options.budget), options.method, steps=1000, weight_lr=options.search_lr, arch_lr=options.arch_lr,
            convention=options.convention, autocast=AMP[options.amp], cuda_graph=options.cuda_graph, **options.of_search(),
        )  # fmt: skip
        with self.watch("uniform"):
            _, fixed = recipe.uniform(net, self.search, batches)
        self.finish = lambda: recipe.finish(self.search, self.search.policy(), batches)
        self.networks = {"float": net, "search": mixed, "fixed": fixed}

    def images(self, count: int) -> tuple[Tensor, Tensor]:
        """A batch, on the device."""
        generator = torch.Generator().manual_seed(0)
        task = self.task
        x = torch.randn(count, task.in_channels, task.image_size, task.image_size, generator=generator).to(self.device)
        y = torch.randint(task.num_classes, (count,), generator=generator).to(self.device)
        return laid_out(x, self.options.channels_last), y

    def step(self, name: str, count: int) -> Callable[[], object]:
        """A step of one of the networks on so many images, which are there."""
        x, y = self.images(count)
        autocast = AMP[self.options.amp]
        if name == "search":
            other = (x, y) if METHODS[self.options.method].two_streams else ()

            def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
                return F.cross_entropy(model(x), y)

            return lambda: self.search.step(loss, loss if other else None, (x, y), other)
        bare = bare_float(self.networks[name], 1e-4, autocast)
        return lambda: bare(x, y)

    def driven(self, count: int) -> Callable[[], object]:
        """DRIVEN steps of the float network as a run makes them."""
        batch = self.images(count)
        trainer = Trainer(self.networks["float"], 1000, lr=1e-4, autocast=AMP[self.options.amp], channels_last=self.options.channels_last)
        return lambda: trainer.run_epoch([batch] * DRIVEN)


def measure(options: RunOptions, task: Task, who: Ranks, folder: Path, rounds: int) -> Measured:
    """All parts. folder: where checkpoints are written."""
    subject = Subject(options, task, who)
    count = options.batch_size // who.count
    few = max(1, count // 2)
    functions = {f"{name} {size}": subject.step(name, size) for name in subject.networks for size in {few, count}}
    timings = alternate({**functions, "driven": subject.driven(count)}, rounds, subject.device.type, least=0.0)
    with subject.watch("policy"):
        subject.finish()
    median = timings.median
    steps = {name: StepCost.through((few, median(f"{name} {few}")), (count, median(f"{name} {count}"))) for name in subject.networks}
    bare = timings.rounds[f"float {count}"]
    driver = statistics.median(a / DRIVEN - b for a, b in zip(timings.rounds["driven"], bare, strict=True))
    evaluation = {name: _evaluation(subject, net) for name, net in subject.networks.items()}
    parts = Parts(
        step={phase: steps[name] for phase, name in PHASES.items()},
        evaluation={phase: evaluation[name] for phase, name in PHASES.items()},
        gradients={phase: 4.0 * _trained(subject.networks[name]) for phase, name in PHASES.items()},
        checkpoint=_checkpoints(subject, folder),
        loading=_loading(subject, who),
        driver=max(driver, 0.0),
        link=allreduce.measure(who, subject.device),
        once=sum(subject.watch.seconds.values()),
    )
    sizes = {name: size(subject, name, count) for name in subject.networks}
    shown = {name: evaluated(subject, net) for name, net in subject.networks.items()}
    return Measured(parts, sizes, shown, subject.watch.seconds, timings.rounds)


def _trained(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters() if p.requires_grad)


def _evaluation(subject: Subject, net: nn.Module) -> float:
    """Seconds per image."""
    batch = subject.images(min(EVALUATED, len(subject.task.val)))
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        evaluate(net, [batch], channels_last=subject.options.channels_last)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds) / len(batch[1])


def _checkpoints(subject: Subject, folder: Path) -> dict[str, float]:
    """Seconds of a checkpoint of every phase, on the first rank, for which the others wait."""
    loops: dict[str, Any] = {name: Trainer(net, 1) for name, net in subject.networks.items() if name != "search"}
    for trainer in loops.values():
        trainer.run_epoch([subject.images(2)])
    loops["search"] = subject.search
    found, meter, generator = {}, Meter(), torch.Generator()
    for name, loop in loops.items():
        checkpoints = Checkpoints(folder / name)
        with meter.phase(name):
            phase = Phase(name, subject.networks[name], loop, generator, meter, folder, checkpoints)
            seconds = []
            for number in range(3):
                checkpoints.steps = number + 1
                started = time.perf_counter()
                phase.epoch()
                seconds.append(time.perf_counter() - started)
        found[name] = statistics.median(seconds)
    return {phase: found[name] for phase, name in PHASES.items()}


def _loading(subject: Subject, who: Ranks) -> float:
    """Seconds per image of this rank's share of a pass over the training images."""
    generator = torch.Generator().manual_seed(0)
    loader = subject.task.loader("train", subject.options.batch_size, generator, shard=who.shard)
    seconds = []
    for _ in range(3):
        started, images = time.perf_counter(), 0
        for _, y in loader:
            images += len(y)
        seconds.append((time.perf_counter() - started) / images)
    return statistics.median(seconds)


def size(subject: Subject, name: str, count: int) -> Size:
    """What a step of one of the networks keeps; bytes per image from a forward and backward pass of half of the images."""
    net = subject.networks[name].train()
    few = max(1, count // 2)
    x, y = subject.images(few)
    autocast = AMP[subject.options.amp]

    def run() -> None:
        with torch.autocast(subject.device.type, dtype=autocast, enabled=autocast is not None):
            loss = F.cross_entropy(net(x), y)
        loss.backward()

    adam = sum(p.numel() for p in {*arch_parameters(net), *quantizer_parameters(net)})
    # quantizers make weights once for the whole batch, which the convolutions keep
    made = sum(m.weight.numel() for m in net.modules() if isinstance(m, QuantizedLayer))
    whole = 4 * _trained(net) + (2 if autocast is not None else 4) * made
    net.zero_grad()
    kept = max(most(run) - whole, 0) / few
    net.zero_grad()
    return Size(_trained(net) - adam, adam, sum(b.numel() for b in net.buffers()), made, kept, float(x[0].nbytes))


def evaluated(subject: Subject, net: nn.Module) -> float:
    """Bytes per image that an evaluation takes at most, from a quarter of the images that a run evaluates at once."""
    x, y = subject.images(EVALUATED // 4)
    return most(lambda: evaluate(net, [(x, y)], channels_last=subject.options.channels_last)) / len(y)


def most(function: Callable[[], object]) -> int:
    """Bytes that a call adds at most to what is there before it: allocated on a GPU, resident on a CPU."""
    meter = Meter()
    function()
    with meter.phase(""):
        function()
    return max(meter.phases[""].memory - meter.phases[""].before, 0)


def as_dict(measured: Measured) -> dict[str, Any]:
    """For JSON."""
    sizes = {name: asdict(found) for name, found in measured.sizes.items()}
    return {**asdict(measured.parts), "sizes": sizes, "once by part": measured.once, "rounds": measured.rounds}

"""The parts that a run is made of, measured one by one: steps, data, evaluation, checkpoints, communication, memory."""

from __future__ import annotations

import ctypes
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qprune.budget import Budget
from qprune.checkpoint import save
from qprune.experiment import MEASURED as EVALUATED
from qprune.experiment import Experiment
from qprune.nn.mixing import QuantizedLayer
from qprune.options import RunOptions
from qprune.precision import AMP, device_of, laid_out
from qprune.prepare import arch_parameters, quantizer_parameters
from qprune.ranks import Ranks
from qprune.recipes import recipe_for
from qprune.resume.checkpoints import Checkpoints
from qprune.resume.phase import Phase
from qprune.scale import Link, Parts, Size, StepCost
from qprune.search.driver import METHODS, Search
from qprune.tasks.sources import network_of
from qprune.tasks.task import Task
from qprune.tasks.train import Trainer, evaluate
from qprune.usage import Meter
from qprune.watch import Several

from .driver import bare_float
from .measure import alternate

NETWORKS = ("float", "search", "fixed")
PHASES = {"float": "float", "search": "search", "finetune": "fixed", "uniform": "fixed"}
"""Phase of a run → the network that is trained in it."""
DRIVEN = 4
"""Steps of a run that are timed together."""


class Rounds:
    """Seconds of everything that was timed, by name; wall, processor: what the steps took in all."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.wall = self.processor = 0.0

    def of(self, name: str, function: Callable[[], Any]) -> Any:
        """Call, and note how long that takes."""
        started = time.perf_counter()
        result = function()
        self.seconds[name].append(time.perf_counter() - started)
        return result

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])


class Subject:
    """The three networks of a run of these options and what trains them, on one rank and without the others.

    count  images that a rank computes at once; few: half of them
    """

    def __init__(self, options: RunOptions, task: Task, who: Ranks) -> None:
        self.options, self.device, self.who = options, device_of(options.device), who
        self.task = task.to(self.device)
        self.count = options.batch_size // who.count // options.accumulate
        self.few = max(1, self.count // 2)

    def make(self, rounds: Rounds) -> None:
        """The networks anew, as a run makes them."""
        options = self.options
        torch.manual_seed(options.seed)
        self.net = rounds.of("once: network", lambda: network_of(options, self.task).to(self.device))
        if not options.channels_last:
            self.net.to(memory_format=torch.contiguous_format)
        recipe = recipe_for(options, self.task.example())
        self.batches = [self.images(self.count)[0]] * 4
        rounds.of("once: check", lambda: recipe.check(self.net))
        mixed = rounds.of("once: prepare", lambda: recipe.prepare(self.net, self.batches))
        self.search = Search(
            mixed, Budget.parse(options.budget), options.method, steps=10**6, weight_lr=1e-4, arch_lr=1e-4,
            convention=options.convention, autocast=AMP[options.amp], cuda_graph=options.cuda_graph, **options.of_search(),
        )  # fmt: skip
        fixed = rounds.of("once: uniform", lambda: recipe.uniform(self.net, self.search, self.batches))[1]
        self.recipe, self.networks = recipe, {"float": self.net, "search": mixed, "fixed": fixed}

    def measure_and_save(self, final: nn.Module, folder: Path) -> None:
        """What a run ends with."""
        experiment = Experiment(self.options, self.task, self.options.seed, folder, Several([]), self.recipe, ranks=self.who)
        self.who.from_main(save, final, folder / "model.safetensors")
        for name, net in (("float", self.net), ("searched", final), ("uniform", self.networks["fixed"])):
            experiment.measure(name, net)

    def images(self, count: int) -> tuple[Tensor, Tensor]:
        """A batch, on the device."""
        generator, task = torch.Generator().manual_seed(0), self.task
        x = torch.randn(count, task.in_channels, task.image_size, task.image_size, generator=generator).to(self.device)
        y = torch.randint(task.num_classes, (count,), generator=generator).to(self.device)
        return laid_out(x, self.options.channels_last), y

    def step(self, name: str, count: int) -> Callable[[], object]:
        """A step of one of the networks on so many images, which are there."""
        x, y = self.images(count)
        if name != "search":
            bare = bare_float(self.networks[name], 1e-4, AMP[self.options.amp])
            return lambda: bare(x, y)
        other = (x, y) if METHODS[self.options.method].two_streams else ()

        def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(model(x), y)

        return lambda: self.search.step(loss, loss if other else None, (x, y), other)

    def driven(self, count: int) -> Callable[[], object]:
        """DRIVEN steps of the float network as a run makes them."""
        batch = self.images(count)
        options = self.options
        trainer = Trainer(self.net, 10**6, lr=1e-4, autocast=AMP[options.amp], channels_last=options.channels_last)
        return lambda: trainer.run_epoch([batch] * DRIVEN)

    def forward_backward(self, name: str, count: int) -> Callable[[], None]:
        net, autocast = self.networks[name].train(), AMP[self.options.amp]
        x, y = self.images(count)

        def run() -> None:
            with torch.autocast(self.device.type, dtype=autocast, enabled=autocast is not None):
                loss = F.cross_entropy(net(x), y)
            loss.backward()

        return run


def time_all(subject: Subject, rounds: Rounds, times: int, folder: Path) -> None:
    """Add a few rounds of every part. folder: where checkpoints are written."""
    subject.make(rounds)
    sizes = sorted({subject.few, subject.count})
    functions = {f"{name} {size}": subject.step(name, size) for name in NETWORKS for size in sizes}
    started, cpu = time.perf_counter(), time.process_time()
    timings = alternate(functions, times, subject.device.type, least=0.0)
    rounds.wall += time.perf_counter() - started
    rounds.processor += time.process_time() - cpu
    for name, seconds in timings.rounds.items():
        rounds.seconds[name] += seconds
    rounds.seconds["driver"] += _driver(subject, functions[f"float {subject.count}"], times)
    final = rounds.of("once: finish", lambda: subject.recipe.finish(subject.search, subject.search.policy(), subject.batches))
    rounds.of("once: end", lambda: subject.measure_and_save(final, folder))
    rounds.of("once: phases", lambda: [_begin_a_phase() for _ in PHASES])
    images = subject.images(EVALUATED)
    for net in (*NETWORKS, *NETWORKS):
        rounds.of(f"evaluate {net}", lambda net=net: evaluate(subject.networks[net], [images], channels_last=subject.options.channels_last))
    for name in NETWORKS:
        _checkpoints(subject, name, rounds, folder)
    loader = subject.task.loader("train", subject.options.batch_size, torch.Generator().manual_seed(0), shard=subject.who.shard)
    for _ in range(2):
        rounds.of("loading", lambda: [None for _ in loader])


def _driver(subject: Subject, bare: Callable[[], object], times: int) -> list[float]:
    """Seconds that a step of a run takes longer than a bare one: of the processor on a CPU, since a few milliseconds of a step are easily
    lost in what other programs do."""
    cpu, driven, found = subject.device.type == "cpu", subject.driven(subject.count), []

    def now() -> float:
        if cpu:
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    driven()
    for _ in range(times):
        started = now()
        for _ in range(DRIVEN):
            bare()
        between = now()
        driven()
        found.append(((now() - between) - (between - started)) / DRIVEN)
    return found


def _begin_a_phase() -> None:
    """Memory that is not used any more is given back, so that a phase is measured alone."""
    with Meter().phase(""):
        pass


def _checkpoints(subject: Subject, name: str, rounds: Rounds, folder: Path) -> None:
    loop: Any = subject.search if name == "search" else Trainer(subject.networks[name], 1)
    if name != "search":
        loop.run_epoch([subject.images(2)])
    meter = Meter()
    with meter.phase(name):
        checkpoints = Checkpoints(folder / name)
        checkpoints.clear()
        phase = Phase(name, subject.networks[name], loop, torch.Generator(), meter, folder, checkpoints)
        for number in range(3):
            checkpoints.steps = number + 1
            rounds.of(f"checkpoint {name}", phase.epoch)


def parts_of(subject: Subject, rounds: Rounds, link: Link) -> Parts:
    """Medians, for qprune.scale: of the slowest rank, for which the others wait. All ranks call this."""
    few, count = subject.few, subject.count

    def median(name: str) -> float:
        return max(subject.who.gathered(rounds.median(name)))

    steps = {name: StepCost.through((few, median(f"{name} {few}")), (count, median(f"{name} {count}"))) for name in NETWORKS}
    images = len(subject.task.train) / subject.who.count
    evaluation = {name: median(f"evaluate {name}") / EVALUATED for name in NETWORKS}
    return Parts(
        step={phase: steps[name] for phase, name in PHASES.items()},
        evaluation={phase: evaluation[name] for phase, name in PHASES.items()},
        gradients={phase: 4.0 * _trained(subject.networks[name]) for phase, name in PHASES.items()},
        checkpoint={phase: median(f"checkpoint {name}") for phase, name in PHASES.items()},
        loading=median("loading") / images,
        driver=max(median("driver"), 0.0),
        link=link,
        once=sum(median(name) for name in rounds.seconds if name.startswith("once: ")),
    )


def _trained(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters() if p.requires_grad)


@dataclass(frozen=True)
class Memory:
    """sizes: for qprune.scale, by network; evaluated: bytes per image that an evaluation takes at most, by network."""

    sizes: dict[str, Size]
    evaluated: dict[str, float]


def memory_of(subject: Subject) -> Memory:
    """Bytes per image from a forward and backward pass of half of the images, and an evaluation of a quarter of those of a run."""
    sizes, evaluated = {}, {}
    shown, channels_last = [subject.images(EVALUATED // 4)], subject.options.channels_last
    item = 2 if AMP[subject.options.amp] is not None else 4
    for name, net in subject.networks.items():
        adam = sum(p.numel() for p in {*arch_parameters(net), *quantizer_parameters(net)})
        # quantizers make weights once for the whole batch, which the convolutions keep
        made = sum(m.weight.numel() for m in net.modules() if isinstance(m, QuantizedLayer))
        net.zero_grad()
        kept = (most(subject.forward_backward(name, subject.few), net) - 4 * _trained(net) - item * made) / subject.few
        buffers = sum(b.numel() for b in net.buffers())
        image = float(subject.images(1)[0].nbytes)
        sizes[name] = Size(_trained(net) - adam, adam, buffers, made, max(kept, 0.0), image)
        evaluated[name] = most(lambda net=net: evaluate(net, shown, channels_last=channels_last), net) / (EVALUATED // 4)
    return Memory(sizes, evaluated)


def most(function: Callable[[], object], net: nn.Module) -> int:
    """Bytes that a call adds at most to what is there before it, the network without gradients: allocated on a GPU, resident on a CPU."""
    meter = Meter()
    function()
    net.zero_grad()
    with meter.phase(""):
        function()
    net.zero_grad()
    return max(meter.phases[""].memory - meter.phases[""].before, 0)


@contextmanager
def freed_at_once(on: bool) -> Iterator[None]:
    """Within, glibc returns tensors of a megabyte and more to the system when they are freed, so that resident memory is what tensors take.
    Steps are slow meanwhile. It is of no use once a process has freed much: what lies free in it is used first. Afterwards glibc keeps all
    that is freed of tensors below 32 MB: left to itself it gives some back by chance, in some steps and not in others, and asking for it
    again takes a tenth of a step and more. Elsewhere nothing changes."""
    if not on or sys.platform != "linux":
        yield
        return
    set_option, trim_threshold, mmap_threshold = ctypes.CDLL(None).mallopt, -1, -3
    set_option(mmap_threshold, 1 << 20)
    try:
        yield
    finally:
        set_option(mmap_threshold, 32 << 20)
        set_option(trim_threshold, 2**31 - 1)


def as_dict(parts: Parts, memory: Memory, rounds: Rounds) -> dict[str, Any]:
    """For JSON."""
    sizes = {name: {**asdict(size), "evaluated": memory.evaluated[name]} for name, size in memory.sizes.items()}
    found = asdict(parts)
    found["link"] = {name: value if value < float("inf") else None for name, value in found["link"].items()}
    return {**found, "sizes": sizes, "rounds": dict(rounds.seconds)}

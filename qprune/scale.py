"""How long a run takes and how much memory it needs, on one device or on several: a model, from parts that were measured or assumed.

    parts = Parts(step={"float": StepCost(0.01, 0.001), ...}, ...)      # `qprune bench --end-to-end` measures them
    times = run(parts, Plan(images=1_281_167, batch=1024, epochs={"float": 90, "search": 30}, ranks=8))

A step computes, and its gradients are summed over the ranks in buckets, most of them while the backward pass still runs; the batch after
comes from worker processes meanwhile. A phase adds the passes over the validation images and the checkpoints. Seconds and bytes throughout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

BUCKET = 25 << 20
"""Bytes of gradients that DistributedDataParallel sums at once."""
AGREEMENTS = 3
"""Small sums and messages in every step of several ranks: are all losses finite, is a checkpoint due or a stop asked for, buffers."""
NUMBER = 4
"""Bytes of a parameter, of its gradient, and of each number that an optimizer keeps for it."""


@dataclass(frozen=True)
class Link:
    """What sums tensors over ranks.

    bandwidth  bytes per second that a rank sends while it receives as many
    latency    seconds of a sum of a few bytes between two ranks; every doubling of the ranks takes it once more
    """

    bandwidth: float = math.inf
    latency: float = 0.0

    def all_reduce(self, size: float, ranks: int, calls: int = 1) -> float:
        """Seconds for `size` bytes in so many calls: a rank of a ring sends 2 (N - 1) / N of them."""
        if ranks == 1:
            return 0.0
        return calls * self.latency * math.log2(ranks) + 2 * (ranks - 1) / ranks * size / self.bandwidth


@dataclass(frozen=True)
class StepCost:
    """Seconds of a training step on one device whose batch is there: fixed + per_image · images.

    backward  share of it that is the backward pass, during which gradients are summed
    host      seconds in which the host asks a GPU for all of it; no step takes less
    """

    fixed: float
    per_image: float
    backward: float = 2 / 3
    host: float = 0.0

    @classmethod
    def through(cls, few: tuple[int, float], many: tuple[int, float]) -> StepCost:
        """From the images and seconds of two steps: exact for the larger one, and neither share is negative."""
        if few[0] == many[0]:
            return cls(0.0, many[1] / many[0])
        slope = min(max((many[1] - few[1]) / (many[0] - few[0]), 0.0), many[1] / many[0])
        return cls(many[1] - slope * many[0], slope)

    def seconds(self, images: float) -> float:
        return max(self.fixed + self.per_image * images, self.host)


@dataclass(frozen=True)
class Parts:
    """What a run is made of; those of a phase by its name: float, search, finetune, uniform.

    step        of each phase
    evaluation  seconds per image, of each phase's network
    gradients   bytes that are summed over the ranks in every step
    checkpoint  seconds of one
    loading     seconds that a process takes to make one training image
    workers     processes per rank that do so beside the steps; 0: images are made between the steps
    driver      seconds that a step takes on top, for metrics, checks and progress
    link        between the ranks
    agreements  sums of a few numbers over the ranks in every step, that nothing overlaps with; two more for every normalisation whose
                statistics are those of all ranks
    once        seconds of what is no phase
    """

    step: Mapping[str, StepCost]
    evaluation: Mapping[str, float] = field(default_factory=dict)
    gradients: Mapping[str, float] = field(default_factory=dict)
    checkpoint: Mapping[str, float] = field(default_factory=dict)
    loading: float = 0.0
    workers: int = 0
    driver: float = 0.0
    link: Link = field(default_factory=Link)
    agreements: int = AGREEMENTS
    once: float = 0.0


@dataclass(frozen=True)
class Plan:
    """What is run: images of a training pass and of an evaluation after each, images of a step over all ranks, epochs of every phase.

    minutes     between checkpoints within an epoch; 0: none. There is one at the end of every epoch and of every phase
    accumulate  parts of a rank's images that are computed one after the other; gradients are summed over the ranks during the last
    """

    images: int
    batch: int
    epochs: Mapping[str, int]
    evaluated: int = 0
    ranks: int = 1
    minutes: float = 10.0
    accumulate: int = 1

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return math.ceil(self.images / self.batch)

    @property
    def per_rank(self) -> float:
        """Images of a rank in a step."""
        return self.batch / self.ranks


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step.

    communication  what the backward pass does not hide of it
    loading        of a batch, by a rank's processes
    beside         processes of their own do that while steps run
    launching      the host is slower than the GPU, and computing is its time
    """

    computing: float
    communication: float
    driver: float
    loading: float
    beside: bool
    launching: bool = False

    @property
    def busy(self) -> float:
        return self.computing + self.communication + self.driver

    @property
    def waiting(self) -> float:
        """For the batch."""
        return max(self.loading - self.busy, 0.0) if self.beside else self.loading

    @property
    def seconds(self) -> float:
        return self.busy + self.waiting

    @property
    def dominant(self) -> str:
        """computing, launching, communication, driver or loading: what takes most of the step, or loading where it sets the pace of all."""
        if self.beside and self.waiting > 0:
            return "loading"
        names = ("computing", "communication", "driver", *(() if self.beside else ("loading",)))
        found = max(names, key=lambda name: getattr(self, name))
        return "launching" if found == "computing" and self.launching else found


@dataclass(frozen=True)
class PhaseTime:
    """Seconds of a phase. waiting: steps do for batches, and is not in training."""

    training: float
    waiting: float
    evaluation: float
    checkpoints: float

    @property
    def seconds(self) -> float:
        return self.training + self.waiting + self.evaluation + self.checkpoints


def step(parts: Parts, plan: Plan, phase: str, images: float | None = None) -> StepTime:
    """One step of a phase; images: of a rank, if not those of the plan."""
    images = plan.per_rank if images is None else images
    cost, size = parts.step[phase], parts.gradients.get(phase, 0.0)
    part = cost.seconds(images / plan.accumulate)
    calls = math.ceil(size / BUCKET)
    summed = parts.link.all_reduce(size, plan.ranks, calls)
    last = parts.link.all_reduce(size / max(calls, 1), plan.ranks)  # the bucket of the first layers is full when the backward pass ends
    shown = max(summed - cost.backward * part, last if calls else 0.0)
    shown += parts.agreements * parts.link.all_reduce(0, plan.ranks)
    loading = parts.loading * images / max(parts.workers, 1)
    return StepTime(plan.accumulate * part, shown, parts.driver, loading, parts.workers > 0, 0 < cost.host == part)


def phase(parts: Parts, plan: Plan, name: str) -> PhaseTime:
    """A whole phase: its epochs, the evaluation after each, and checkpoints."""
    epochs = plan.epochs.get(name, 0)
    if not epochs:
        return PhaseTime(0.0, 0.0, 0.0, 0.0)
    last = plan.images - (plan.steps - 1) * plan.batch
    whole, short = step(parts, plan, name), step(parts, plan, name, last / plan.ranks)
    training = epochs * ((plan.steps - 1) * whole.busy + short.busy)
    waiting = epochs * ((plan.steps - 1) * whole.waiting + short.waiting)
    evaluation = epochs * parts.evaluation.get(name, 0.0) * plan.evaluated / plan.ranks
    within = int((training + waiting) / epochs / (60 * plan.minutes)) if plan.minutes else 0
    checkpoints = parts.checkpoint.get(name, 0.0) * (epochs * (1 + within) + 1)
    return PhaseTime(training, waiting, evaluation, checkpoints)


def run(parts: Parts, plan: Plan) -> dict[str, float]:
    """Seconds of every phase, of what is none ("once"), and of all together ("total")."""
    found = {name: phase(parts, plan, name).seconds for name in plan.epochs} | {"once": parts.once}
    return found | {"total": sum(found.values())}


@dataclass(frozen=True)
class Size:
    """What a rank keeps: numbers by kind, and bytes per image.

    weights    trained by SGD with momentum (of a search: all that are neither gates nor ranges)
    adam       trained by Adam: gates of all candidates, ranges of quantizers
    buffers    statistics of normalisations and the like
    mixed      weights of layers with candidates, whose mixture the step keeps
    kept       bytes per image at the peak of a step: activations that wait for the backward pass, the gradients of some, scratch memory
    image      bytes of an image
    """

    weights: int
    adam: int = 0
    buffers: int = 0
    mixed: int = 0
    kept: float = 0.0
    image: float = 0.0


def memory(size: Size, images: float, ranks: int = 1, item: int = NUMBER) -> dict[str, float]:
    """Bytes of one rank by part, in training with so many images at once; item: bytes of an activation.

    Three batches of images are there: that of the step, the one that is copied meanwhile, and the one before it. With several ranks
    gradients are there twice, in the parameters and in the buckets that are summed.
    """
    trained = size.weights + size.adam
    found = {
        "weights": NUMBER * (trained + size.buffers),
        "gradients": NUMBER * trained * (2 if ranks > 1 else 1),
        "optimizer": NUMBER * (size.weights + 2 * size.adam),
        "mixed weights": item * size.mixed,
        "activations": size.kept * images,
        "batches": 3 * size.image * images,
    }
    return {name: float(value) for name, value in found.items()}


def largest_batch(size: Size, available: float, ranks: int = 1, item: int = NUMBER) -> int:
    """The most images of a rank in a step with which everything fits into so many bytes; 0 if not even one does."""
    fixed = sum(memory(size, 0, ranks, item).values())
    per_image = sum(memory(size, 1, ranks, item).values()) - fixed
    return max(int((available - fixed) / per_image), 0) if per_image else 0

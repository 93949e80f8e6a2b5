"""Where the numbers of a run go while it runs, besides metrics.jsonl: several watchers at once, TensorBoard, or a logger of your own."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from qprune.experiment import Watcher

log = logging.getLogger("qprune")
TENSORBOARD = "tensorboard"
EVERY = 20
"""Steps between two values of a step; values of epochs are all logged."""


class Logger(Protocol):
    """What takes numbers by name: a run of wandb or trackio, or an object of your own."""

    def log(self, values: dict[str, float], step: int) -> Any: ...


class Several:
    """Tells all of its watchers."""

    def __init__(self, watchers: Sequence[Watcher]) -> None:
        self.watchers = watchers

    def phase(self, name: str, seed: int, steps: int, done: int = 0) -> None:
        for watcher in self.watchers:
            watcher.phase(name, seed, steps, done)

    def step(self, values: Mapping[str, float]) -> None:
        for watcher in self.watchers:
            watcher.step(values)

    def epoch(self, values: Mapping[str, Any]) -> None:
        for watcher in self.watchers:
            watcher.epoch(values)


class Logged:
    """Gives a logger the numbers of every epoch, and of every 20th step, named <phase>/<value>; from the second seed on
    seed-<seed>/<phase>/<value>.

    The step goes up over all phases and seeds, as wandb wants it; phases that were over before a run was resumed are not counted. A logger
    that fails is reported and not asked again: the run goes on.
    """

    def __init__(self, logger: Logger) -> None:
        self.logger: Logger | None = logger
        self.first: int | None = None
        self.name, self.start, self.done, self.steps = "", 0, 0, 0

    def phase(self, name: str, seed: int, steps: int, done: int = 0) -> None:
        self.first = seed if self.first is None else self.first
        self.start, self.done, self.steps = self.start + self.steps, done, steps
        self.name = name if seed == self.first else f"seed-{seed}/{name}"

    def step(self, values: Mapping[str, float]) -> None:
        self.done += 1
        if self.done % EVERY == 0:
            self._log({f"{name}-step": value for name, value in values.items()})

    def epoch(self, values: Mapping[str, Any]) -> None:
        self._log({name: value for name, value in values.items() if name not in ("phase", "seed")})

    def at(self) -> int:
        return self.start + self.done

    def _log(self, values: Mapping[str, Any]) -> None:
        numbers = {f"{self.name}/{name}": float(value) for name, value in values.items() if _finite(value)}
        if self.logger is None or not numbers:
            return
        try:
            self.logger.log(numbers, step=self.at())
        except Exception as error:
            log.warning("qprune: %s failed and gets no more numbers (%s: %s)", type(self.logger).__name__, type(error).__name__, error)
            self.logger = None


class TensorBoard(Logged):
    """Event files for TensorBoard in a folder, made when the first phase begins. The step is that of the phase, so that the curves of a run
    that was resumed go on where they were."""

    def __init__(self, folder: Path) -> None:
        super().__init__(_Events(folder))

    def at(self) -> int:
        return self.done


class _Events:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.writer: Any = None

    def log(self, values: dict[str, float], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if self.writer is None:
            self.writer = SummaryWriter(str(self.folder))
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()


def has_tensorboard() -> bool:
    """The package tensorboard can be imported."""
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: F401
    except (ImportError, AttributeError):
        return False
    return True


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

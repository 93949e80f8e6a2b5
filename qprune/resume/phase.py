"""One training loop of a run: where it is, what a checkpoint holds of it, and how it goes on from one."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qprune.errors import CheckpointError
from qprune.passes import Passes
from qprune.ranks import ALONE
from qprune.resume.checkpoints import Checkpoints
from qprune.resume.hidden import hidden_state, load_hidden_state
from qprune.resume.randomness import restore, snapshot
from qprune.resume.signals import Stopped
from qprune.usage import Meter, Usage

METRICS = "metrics.jsonl"


class Loop(Protocol):
    """A Trainer or a Search: its history has an entry per finished epoch, and "running" in its state tells how far the present one is."""

    history: list[Any]

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Phase(Passes):
    """A phase of one seed: `model` trained by `loop`, with batches from `generator`.

    folder       of the seed, with metrics.jsonl
    checkpoints  None: none are made, and `step`, `epoch` and `end` do nothing
    needed       the loop itself is needed after its end; else only the model

    Made when model and loop are as the phase begins with them. Where there is a checkpoint of the phase, they are set to it, as are the
    random numbers; `ended` tells whether it is that of the phase's end, and `earlier` what the phase took until then. `tried` is False
    from a checkpoint to the first step after it: an error there is that of the checkpoint (`unfit`).
    """

    def __init__(
        self, name: str, model: nn.Module, loop: Loop, generator: torch.Generator, meter: Meter, folder: Path,
        checkpoints: Checkpoints | None, needed: bool = False,
    ) -> None:  # fmt: skip
        self.name, self.model, self.loop, self.generator, self.meter = name, model, loop, generator, meter
        self.folder, self.checkpoints, self.needed = folder, checkpoints, needed
        self.ranks = ALONE if checkpoints is None else checkpoints.ranks
        self.earlier: Usage | None = None
        self.ended = False
        self.tried = True
        self.done = 0
        self._start: dict[str, Any] | None = None
        self._left: dict[str, Any] | None = None
        if checkpoints is not None:
            before = checkpoints.steps
            self._load(checkpoints)
            self.done = checkpoints.steps - before

    def _load(self, checkpoints: Checkpoints) -> None:
        state = checkpoints.load(self.name)
        if state is not None:
            try:
                self._set(state)
            except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
                raise self.unfit(error) from None
            self.tried = self.ended
        if not self.ended:
            checkpoints.forget_later()
            self.ranks.from_main(_cut, self.folder / METRICS, checkpoints.metrics)

    def unfit(self, error: Exception) -> CheckpointError:
        """What to raise for an error that the phase's checkpoint leads to."""
        assert self.checkpoints is not None
        why = " ".join(str(error).split())[:300]
        what = f"the checkpoint of phase {self.name} in {self.checkpoints.folder} does not fit this run"
        if not self.tried:
            what, why = f"{what}, or the run is at fault: the first step failed", f"{type(error).__name__}: {why}"
        return CheckpointError(f"{what} ({why}); go on with the code and the versions that it began with, or begin another run")

    def _set(self, state: dict[str, Any]) -> None:
        """Model, loop and random numbers as they were."""
        if len(state["ranks"]) != self.ranks.count:
            raise ValueError(f"it is of {len(state['ranks'])} processes, and there are {self.ranks.count}")
        own = state["ranks"][self.ranks.rank]
        self.model.load_state_dict(state["model"])
        if state["loop"] is not None:
            self.loop.load_state_dict({**state["loop"], "running": own["running"], "model": state["model"]})
        load_hidden_state(self.model, state["hidden"])
        restore(own["now"], self.generator)
        self.ended, self.earlier = state["end"], Usage(**state["usage"])
        if self.ended:
            self.meter.phases[self.name] = self.earlier
        elif own["running"] is not None:
            self._left = own

    def begin(self) -> None:
        """Note the random numbers that the pass draws its order with, or set those that it drew it with."""
        if self._left is not None:
            restore(self._left["start"], self.generator)
            self._start = self._left["start"]
        elif self.checkpoints is not None:
            self._start = snapshot(self.generator)

    def ready(self) -> None:
        """Of a pass that goes on: set the random numbers of the checkpoint."""
        if self._left is not None:
            restore(self._left["now"], self.generator)
            self._left = None

    def step(self) -> None:
        """A step is done. Raises Stopped, with everything saved, if that was asked for."""
        self.tried = True
        if self.checkpoints is not None:
            self.checkpoints.steps += 1
            if self.checkpoints.wanted():
                self._save()
            self._check_stop()

    def epoch(self) -> None:
        """An epoch is done, and recorded."""
        if self.checkpoints is not None:
            self._save()
            self.checkpoints.wanted()
            self._check_stop()

    def end(self, usage: Usage) -> None:
        """The phase is over."""
        if self.checkpoints is not None:
            self._save(usage)
            self.checkpoints.wanted()
            self._check_stop()

    def last_good(self) -> str:
        """Where the last good state is, as the end of an error's message; "" where there is none."""
        last = None if self.checkpoints is None else self.checkpoints.last()
        return "" if last is None else f"; the last good state is in {last}"

    @property
    def place(self) -> str:
        """Words for where the phase is: epochs and steps count from 1."""
        running = self.loop.state_dict()["running"]
        if running is None:
            return f"phase {self.name}, after epoch {len(self.loop.history)}"
        return f"phase {self.name}, epoch {len(self.loop.history) + 1}, step {running['batches']}"

    def _check_stop(self) -> None:
        assert self.checkpoints is not None
        if self.checkpoints.asked:
            raise Stopped(self.checkpoints.asked, f"stopped at {self.place}")

    def _save(self, usage: Usage | None = None) -> None:
        """A checkpoint, unless a number of the model is not finite: the one before is then the last good one. usage: of the phase, which
        is over."""
        assert self.checkpoints is not None
        model = self.model.state_dict()
        tensors = [value for value in model.values() if isinstance(value, Tensor) and value.is_floating_point()]
        if not self.ranks.all(all(bool(torch.isfinite(value).all()) for value in tensors)):
            return
        end = usage is not None
        loop = {name: value for name, value in self.loop.state_dict().items() if name != "model"}
        running = loop.pop("running")
        own = {"running": _on_cpu(running), "start": self._start if running is not None else None, "now": snapshot(self.generator)}
        self.checkpoints.metrics = _size(self.folder / METRICS)
        state = {
            "phase": self.name,
            "model": model,
            "hidden": hidden_state(self.model),
            "loop": loop if self.needed or not end else None,
            "ranks": self.ranks.gathered(own),
            "metrics": self.checkpoints.metrics,
            "usage": asdict(usage or self.meter.so_far()),
        }
        self.checkpoints.save(self.name, state, end)


def _on_cpu(value: Any) -> Any:
    """Numbers of one process, for another: devices are not theirs."""
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    return value.detach().cpu() if isinstance(value, Tensor) else value


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _cut(path: Path, length: int) -> None:
    """Take from the file what was written after the state that is gone on from."""
    try:
        if _size(path) > length:
            os.truncate(path, length)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from None

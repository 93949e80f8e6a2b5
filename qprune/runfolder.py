"""A finished run read back from its folder: options, data, and the network that was found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from qprune.checkpoint import load
from qprune.errors import CheckpointError
from qprune.nn.slim import extract, slim, state_of
from qprune.options import RunOptions
from qprune.policy import Policy
from qprune.result import read_result
from qprune.resume.folder import OPTIONS, RESULT, stored_options
from qprune.space import PRUNED
from qprune.tasks import models
from qprune.tasks.sources import task_of
from qprune.tasks.task import Task

NETWORK = "model.safetensors"


@dataclass(frozen=True)
class FinishedRun:
    """place: the folder of one seed; build: gives the float network that `model` was made of, with random weights."""

    folder: Path
    place: Path
    seed: int
    options: RunOptions
    task: Task
    model: nn.Module
    build: Callable[[], nn.Module]


def seeds_of(folder: str | Path) -> list[int]:
    """The seeds of a finished run; the first one's files lie in the folder itself. Raises CheckpointError as `open_run`."""
    options = _checked(Path(folder))
    return [options.seed + i for i in range(options.seeds)]


def open_run(folder: str | Path, seed: int | None = None) -> FinishedRun:
    """The run in the folder, with the network of one seed (None: the first), in eval mode.

    Raises CheckpointError for a folder that holds no finished run of `qprune search`, and says what it holds instead; and for a seed that
    the run has not.
    """
    folder = Path(folder)
    seeds = seeds_of(folder)
    seed = seeds[0] if seed is None else seed
    if seed not in seeds:
        raise CheckpointError(f"{folder} has no seed {seed}; it has {', '.join(map(str, seeds))}")
    options = _checked(folder)
    place = folder if seed == seeds[0] else folder / f"seed-{seed}"
    task = task_of(options)
    build = _builder(options, task, place)
    return FinishedRun(folder, place, seed, options, task, load(place / NETWORK, build).eval(), build)


def _checked(folder: Path) -> RunOptions:
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; expected the folder of a finished qprune search")
    for mark, what in (("study.db", "a study"), ("trials.csv", "a study"), ("cells.csv", "a comparison"), ("queue.db", "a comparison")):
        if (folder / mark).exists():
            raise CheckpointError(f"{folder} holds {what}, not a run; expected the folder of a finished qprune search")
    path = folder / OPTIONS
    if not path.exists() or not path.stat().st_size:
        what = "a network of qprune train" if path.exists() and (folder / NETWORK).exists() else "no run"
        raise CheckpointError(f"{folder} holds {what}; expected the folder of a finished qprune search")
    options = stored_options(folder)
    assert options is not None
    if not (folder / RESULT).exists():
        raise CheckpointError(f"the run in {folder} is unfinished; go on with: qprune search --resume --out {folder}")
    read_result(folder)
    return options


def _builder(options: RunOptions, task: Task, place: Path) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        return models.for_task(options.model, task)

    def narrowed() -> nn.Module:
        net = slim(build(), task.example(), **options.of_network())
        layers = Policy.load(place / "policy.json").layers
        full = state_of(net).widths
        widths = {name: sum(b != PRUNED for b in layers[name].per_filter(full[name])) for name in full if name in layers}
        return extract(net, widths)

    return narrowed if options.method == "slimmable" else build

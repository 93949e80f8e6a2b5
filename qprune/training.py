"""A float network trained in a folder of its own: options, checkpoints, and going on as a search run does."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qprune.checkpoint import save
from qprune.config import Form
from qprune.errors import CheckpointError
from qprune.experiment import Experiment, Watcher
from qprune.files import write_atomically
from qprune.options import OptionError, RunOptions, plain
from qprune.plainjson import parse
from qprune.precision import check, switched
from qprune.resume.checkpoints import Checkpoints
from qprune.resume.folder import RESULT, STATES, begin, check_same, held, options_in, take_up
from qprune.resume.randomness import be_deterministic
from qprune.resume.signals import Stop, Stopped
from qprune.seeds import environment, open_folder
from qprune.tasks.sources import task_of
from qprune.tasks.train import evaluate

FORMAT = 1
MODEL = "model.safetensors"


@dataclass(frozen=True)
class TrainOptions:
    """epochs, batch_size, lr   passes over the training part, samples per step, peak learning rate
    seed                     of the weights and the batches
    others                   as in RunOptions
    """

    data: str = "digits"
    model: str = "resnet8"
    epochs: int = 40
    batch_size: int = 64
    lr: float = 0.1
    seed: int = 0
    data_dir: str = ""
    data_options: Mapping[str, Any] = field(default_factory=dict)
    weights: str = ""
    deterministic: bool = False
    device: str = "auto"
    amp: str = ""
    channels_last: bool = True
    compile: bool = False
    tf32: bool | None = None

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise OptionError(f"epochs must be positive, got {self.epochs}")
        self.run_options()

    def run_options(self) -> RunOptions:
        """Of a search run whose float network is trained like this."""
        shared = {f.name for f in dataclasses.fields(RunOptions)} & {f.name for f in dataclasses.fields(self)}
        return RunOptions(float_epochs=self.epochs, **{name: getattr(self, name) for name in shared})

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as YAML and JSON hold them."""
        return {name: plain(value) for name, value in dataclasses.asdict(self).items()}


FORM = Form(TrainOptions, "a training")


def stored_options(folder: Path) -> TrainOptions | None:
    """The options of the training that the folder holds; None if none was begun. Raises CheckpointError for a damaged file."""
    found: TrainOptions | None = options_in(folder, FORM)
    return found


def run(
    options: TrainOptions,
    folder: Path,
    watcher: Watcher,
    overwrite: bool = False,
    *,
    resume: bool = False,
    minutes: float = 10.0,
    keep: int = 3,
    stop: Stop | None = None,
) -> dict[str, Any]:
    """Train, and write the folder: options.yaml, environment.json, metrics.jsonl, model.safetensors, result.json; meanwhile there are
    checkpoints. Returns result.json's content, with test and validation accuracy in 0 … 1.

    The network is the one that a search run with the same options and seed begins with. Arguments and errors are those of
    qprune.seeds.run.
    """
    if minutes < 0 or keep < 1:
        raise OptionError(f"expected checkpoint minutes from 0 and at least 1 checkpoint to keep, got {minutes} and {keep}")
    with held(folder):
        try:
            began = stored_options(folder) if resume else None
            if began is not None:
                check_same(began, folder, options.as_dict())
                done = finished(folder)
                if done is not None:
                    return done
                take_up(folder, environment(options.device))
            check(options.run_options())
            surroundings = environment(options.device)
            if options.deterministic:
                be_deterministic()
            task = task_of(options)
            if began is None:
                open_folder(folder, overwrite)
                begin(folder, options, surroundings)
            states = Checkpoints(folder / STATES, minutes, keep, stop)
            experiment = Experiment(options.run_options(), task, options.seed, folder, watcher, checkpoints=states)
            result = {"format": FORMAT, "kind": "train", "options": options.as_dict(), "environment": surroundings, **_trained(experiment)}
            write_atomically(folder / RESULT, json.dumps(result, indent=1).encode())
            states.clear()
            return result
        except Stopped as stopped:
            raise Stopped(stopped.number, f"{stopped}; go on with: qprune train --resume --out {folder}") from None


def _trained(experiment: Experiment) -> dict[str, Any]:
    """Write the network, and say what it is worth."""
    options = experiment.options
    with switched(options):
        net = experiment.network()
        experiment.train("float", net, options.float_epochs, options.lr)
        save(net, experiment.folder / MODEL)
        parts = {"test_accuracy": "test", "val_accuracy": "val"}
        found = {
            name: evaluate(net, experiment.task.loader(part, 256), channels_last=options.channels_last)[1] for name, part in parts.items()
        }
    return {**found, "seconds": experiment.meter.phases["float"].seconds}


def finished(folder: Path) -> dict[str, Any] | None:
    """The result of a training that is over; None if it is not. Raises CheckpointError for a damaged one."""
    path = folder / RESULT
    if not path.exists():
        return None
    try:
        found = parse(path.read_text())
        if not isinstance(found, dict) or found.get("kind") != "train" or not isinstance(found.get("test_accuracy"), float):
            raise ValueError("it is not the result of a training")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({' '.join(str(error).split())}); delete it to go on") from None
    return found

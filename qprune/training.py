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
from qprune.precision import switched
from qprune.ranks import ALONE, Ranks
from qprune.resume.folder import RESULT
from qprune.resume.session import Terms, session
from qprune.resume.signals import Stop
from qprune.tasks.sources import task_of

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
    accumulate: int = 1
    sync_bn: bool = False

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
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Train, and write the folder: options.yaml, environment.json, metrics.jsonl, model.safetensors, result.json; meanwhile there are
    checkpoints. Returns result.json's content, with test and validation accuracy in 0 … 1.

    The network is the one that a search run with the same options and seed begins with. Arguments and errors are those of
    qprune.seeds.run.
    """
    terms = Terms(overwrite, resume, minutes, keep, stop, ranks)
    with session(folder, options, FORM, options.run_options(), "train", finished, terms) as work:
        if work.done is not None:
            return work.done
        task = task_of(options)
        work.begin()
        states = work.checkpoints(folder)
        experiment = Experiment(options.run_options(), task, options.seed, folder, watcher, checkpoints=states, ranks=ranks)
        made = {"format": FORMAT, "kind": "train", "options": options.as_dict(), "environment": work.environment(), **_trained(experiment)}
        ranks.from_main(write_atomically, folder / RESULT, json.dumps(made, indent=1).encode())
        states.clear()
        return made


def _trained(experiment: Experiment) -> dict[str, Any]:
    """Write the network, and say what it is worth."""
    options = experiment.options
    with switched(options):
        net = experiment.network()
        experiment.train("float", net, options.float_epochs, options.lr)
        experiment.ranks.from_main(save, net, experiment.folder / MODEL)
        accuracies = {f"{part}_accuracy": experiment.accuracy(net, part) for part in ("test", "val")}
    return {**accuracies, "seconds": experiment.meter.phases["float"].seconds, "damaged_images": experiment.damaged_images()}


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

"""One trial: the float network of its seed, made into the configuration, trained, and measured on validation and test data."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qprune.study.floats import trained_once
from qprune.study.grid import Point
from qprune.study.kinds import KINDS, Kind
from qprune.study.options import StudyOptions
from qprune.tasks.sources import task_of
from qprune.tasks.train import evaluate, fit

_STREAMS = 1_000_003  # more than a grid has points: every (seed, point) has a stream of random numbers of its own


class Bench:
    """What the trials of one process share: data, grid, and the folder with the float networks."""

    def __init__(self, options: StudyOptions, folder: Path, kind: Kind | None = None) -> None:
        self.options, self.folder = options, folder
        self.task = task_of(options) if kind is None else kind.task
        self.kind = KINDS[options.kind](options, self.task) if kind is None else kind
        self.points: list[Point] = self.kind.points()

    def run(self, index: int, seed: int) -> tuple[float, dict[str, Any]]:
        """Train point `index` with `seed`. Returns its validation accuracy and its result: accuracies, losses, seconds, where it ran."""
        started = time.perf_counter()
        trained, digest = self.float_network(seed)
        ready = time.perf_counter()
        point = self.points[index]
        generator = torch.Generator().manual_seed(seed * _STREAMS + index)
        torch.manual_seed(seed * _STREAMS + index)
        net = self.kind.network(trained, point, generator)
        history = fit(net, self._loader(generator), self.options.epochs, lr=self.options.lr)
        fitted = time.perf_counter()
        val_loss, val_accuracy = evaluate(net, self.task.loader("val", 256))
        test_loss, test_accuracy = evaluate(net, self.task.loader("test", 256))
        return val_accuracy, {
            "label": point.label,
            "cost": point.cost,
            "val_accuracy": val_accuracy,
            "test_accuracy": test_accuracy,
            "val_loss": val_loss,
            "test_loss": test_loss,
            "train_loss": history[-1]["loss"],
            "seconds": {"float": ready - started, "train": fitted - ready, "evaluate": time.perf_counter() - fitted},
            "float_network": digest,
            "host": platform.node(),
            "pid": os.getpid(),
        }

    def float_network(self, seed: int) -> tuple[nn.Module, str]:
        """The trained float network of a seed and a digest of its tensors; trained by the first process that needs it, others wait."""

        def train() -> nn.Module:
            torch.manual_seed(seed)
            net = self.kind.float_network()
            fit(net, self._loader(torch.Generator().manual_seed(seed)), self.options.float_epochs, lr=self.options.float_lr)
            return net

        return trained_once(self.folder / f"float-{seed}.safetensors", self.kind.float_network, train)

    def _loader(self, generator: torch.Generator) -> Any:
        return self.task.loader("train", self.options.batch_size, generator)

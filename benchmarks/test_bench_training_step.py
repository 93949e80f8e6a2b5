"""A training step of resnet20 with its convolutions mixed, against the plain network and the layer written in PyTorch operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from qprune.benchmarks import training
from qprune.benchmarks.measure import DEVICE
from qprune.tasks.models import resnet8, resnet20


@pytest.mark.parametrize("name", training.IMPLEMENTATIONS)
@pytest.mark.parametrize("case", training.CASES, ids=lambda case: case.name)
def test_bench_training_step(case: training.Case, name: str, benchmark: Any, timed: Callable[..., None], smoke: bool) -> None:
    benchmark.group = case.name
    batch, network = (2, resnet8) if smoke else (64, resnet20)
    step = training.step(case, name, DEVICE, batch, network)
    if name in ("eager", "branches", "qprune"):
        training.check(case.name, step, training.step(case, "reference", DEVICE, batch, network))
    timed(step, rounds=9, batch=batch, layout="channels_last", implementation=name)

"""What every benchmark shares: the device and its clock, the machine in extra_info, and a small form for --benchmark-disable."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from . import machine, measure
from .measure import DEVICE


def pytest_configure(config: pytest.Config) -> None:
    # --benchmark-only overrides the project's default of --benchmark-disable
    if config.getoption("benchmark_only", False):
        config.option.benchmark_disable = False


@pytest.fixture(scope="session", autouse=True)
def _threads(request: pytest.FixtureRequest) -> None:
    smoke = request.config.getoption("benchmark_disable")
    torch.set_num_threads(1 if smoke else min(2, os.cpu_count() or 1))


@pytest.fixture(scope="session")
def described() -> dict[str, Any]:
    return machine.describe(DEVICE)


@pytest.fixture
def smoke(benchmark: Any) -> bool:
    """Under --benchmark-disable every target runs once: small shapes, and no compiler."""
    return bool(benchmark.disabled)


@pytest.fixture
def timed(benchmark: Any, described: dict[str, Any]) -> Callable[..., None]:
    """timed(function, rounds, **facts): time a call, a GPU's on its own clock and each after a flush of the cache."""

    def run(function: Callable[[], Any], rounds: int, **facts: Any) -> None:
        benchmark.extra_info.update({**described, **facts})
        benchmark.pedantic(function, setup=measure.flush_cache(DEVICE), rounds=rounds, warmup_rounds=2)

    return run

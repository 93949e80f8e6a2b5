"""What every benchmark shares: the device and its clock, the machine in extra_info, and a small form for --benchmark-disable."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from qprune.benchmarks import cases, machine, measure
from qprune.benchmarks.cases import DIRECTIONS, Case
from qprune.benchmarks.measure import DEVICE


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seconds", type=float, default=0.0, help="skip the benchmarks that have not begun after so many seconds")


@pytest.fixture(scope="session")
def _start() -> float:
    return time.perf_counter()


@pytest.fixture(autouse=True)
def _in_time(request: pytest.FixtureRequest, _start: float) -> None:
    limit = request.config.getoption("--seconds")
    if limit and time.perf_counter() - _start > limit:
        pytest.skip(f"{limit:g} s are over")


def pytest_configure(config: pytest.Config) -> None:
    # --benchmark-only overrides the project's default of --benchmark-disable
    if config.getoption("benchmark_only", False):
        config.option.benchmark_disable = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=measure.clock(DEVICE)))
        # these come from inside the compiler
        item.add_marker(pytest.mark.filterwarnings("ignore:The .grad attribute"))
        item.add_marker(pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"))


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


@pytest.fixture
def measured(benchmark: Any, timed: Callable[..., None], smoke: bool) -> Callable[[Case, str, str], None]:
    """measured(case, direction, implementation): check it, then time it. Groups are operation, shape, direction."""

    def run(case: Case, direction: str, name: str) -> None:
        if reason := case.missing():
            pytest.skip(reason)
        case = case.smaller() if smoke else case
        benchmark.group = f"{case.kernel}, {case.name}, {DIRECTIONS[direction]}"
        call = cases.call(case, name, direction, DEVICE, compiler="eager" if smoke else cases.INDUCTOR)
        if name not in case.unchecked:
            cases.check(case, name, call(), cases.reference(case, direction, DEVICE))
        work = case.work(direction)
        facts = {"bytes": work.bytes, "flops": work.flops, "dtype": str(case.dtype), "layout": "channels_last", "implementation": name}
        timed(call, rounds=50, case=case.name, direction=direction, **facts)

    return run

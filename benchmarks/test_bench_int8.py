"""The convolution on integer codes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from qprune.benchmarks import selection
from qprune.benchmarks.cases import Case
from qprune.benchmarks.measure import DEVICE


@pytest.mark.parametrize("case, direction, name", selection.of("int8", DEVICE), ids=selection.label)
def test_bench_int8(case: Case, direction: str, name: str, measured: Callable[[Case, str, str], None]) -> None:
    measured(case, direction, name)

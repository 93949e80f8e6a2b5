"""The mixed convolution with joint candidates."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from qprune.benchmarks import selection
from qprune.benchmarks.cases import Case
from qprune.benchmarks.measure import DEVICE


@pytest.mark.parametrize("case, direction, name", selection.of("mixed_conv2d", DEVICE), ids=selection.label)
def test_bench_conv(case: Case, direction: str, name: str, measured: Callable[[Case, str, str], None]) -> None:
    measured(case, direction, name)

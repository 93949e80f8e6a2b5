"""mix_quantize on activations and on one weight."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from qprune.benchmarks import selection
from qprune.benchmarks.cases import Case
from qprune.benchmarks.measure import DEVICE


@pytest.mark.parametrize("case, direction, name", selection.of("mix_quantize", DEVICE), ids=selection.label)
def test_bench_mix_quantize(case: Case, direction: str, name: str, measured: Callable[[Case, str, str], None]) -> None:
    measured(case, direction, name)

"""mix_quantize on weights and on activations: forward, and forward with backward."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from . import measure, mixing
from .measure import DEVICE

pytestmark = [
    pytest.mark.benchmark(timer=measure.clock(DEVICE)),
    # both come from inside the compiler
    pytest.mark.filterwarnings("ignore:The .grad attribute"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]


@pytest.mark.parametrize("name", mixing.IMPLEMENTATIONS)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("case", mixing.CASES, ids=lambda case: case.name)
def test_bench_mix_quantize(case: mixing.Case, backward: bool, name: str, benchmark: Any, timed: Callable[..., None], smoke: bool) -> None:
    benchmark.group = f"mix_quantize, {case.name}, {'forward + backward' if backward else 'forward'}"
    if smoke:
        case = dataclasses.replace(case, shape=(4, *case.shape[1:]))
    call = mixing.call(case, name, backward, DEVICE, compiler="eager" if smoke else mixing.INDUCTOR)
    mixing.check(case, name, call, DEVICE)
    timed(
        call, rounds=50, shape=case.shape, dtype="float32", layout="channels_last" if len(case.shape) == 4 else "rows", implementation=name
    )

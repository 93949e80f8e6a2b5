"""Tests that try many files, each made from a seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from qprune.errors import QPruneError

SEEDS = st.integers(0, 2**64 - 1)


def fuzz(examples: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The same seeds in every run of the tests."""
    phases = [Phase.generate]  # a smaller seed is no simpler file
    same = settings(max_examples=examples, deadline=None, derandomize=True, database=None, phases=phases)
    return lambda test: same(given(seed=SEEDS)(test))


def refused(call: Callable[[], Any]) -> bool:
    """The call raises one of qprune's errors, with a message of one line and not too long; any other error is the test's."""
    try:
        call()
    except QPruneError as error:
        assert 0 < len(str(error)) < 20_000
        return True
    return False

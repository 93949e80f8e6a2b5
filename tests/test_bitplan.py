"""Widths under a budget: the paper's greedy plan step by step, the exact one against all plans."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qprune.errors import InfeasibleBudgetError, InputError
from qprune.search.bitplan import plan_bits

Errors = dict[str, dict[int, float]]


def least_error(errors: Errors, nnz: dict[str, int], budget: int) -> float:
    def cost(widths: tuple[int, ...]) -> int:
        return sum(bits * n for bits, n in zip(widths, nnz.values(), strict=True))

    plans = itertools.product(*errors.values())
    return min(sum(errors[name][bits] for name, bits in zip(errors, plan, strict=True)) for plan in plans if cost(plan) <= budget)


def problem(seed: int, layers: int = 5) -> tuple[Errors, dict[str, int], int]:
    random = np.random.default_rng(seed)
    nnz = {str(i): int(n) for i, n in enumerate(random.integers(5, 60, layers))}
    errors = {name: {b: float(n * random.uniform(0.5, 2) * random.uniform(0.2, 0.4) ** b) for b in range(1, 6)} for name, n in nnz.items()}
    return errors, nnz, int(random.uniform(1.2, 4) * sum(nnz.values()))


def test_increments_by_error_saved_per_bit() -> None:
    errors = {"a": {1: 10.0, 2: 6.0, 3: 5.5}, "b": {1: 8.0, 2: 2.0, 3: 1.0}}
    nnz = {"a": 10, "b": 20}  # a: 0.4, 0.05 per bit; b: 0.3, 0.05
    assert plan_bits(errors, nnz, 30).bits == {"a": 1, "b": 1}
    plan = plan_bits(errors, nnz, 45)
    assert plan.bits == {"a": 2, "b": 1} and plan.error == 14 and plan.cost == 40
    assert plan.bound == pytest.approx(14 - 0.3 * 5) and plan.gap == pytest.approx(1.5 / 12.5)
    plan = plan_bits(errors, nnz, 60)
    assert plan.bits == {"a": 2, "b": 2} and plan.gap == 0
    assert plan_bits(errors, nnz, 70).bits == {"a": 3, "b": 2}
    assert plan_bits(errors, nnz, 10**6).bits == {"a": 3, "b": 3}


def test_a_layer_whose_increment_does_not_fit_is_frozen() -> None:
    """b's first increment (20 bits) does not fit into 15; a's, less efficient, does. b's others are not tried."""
    errors = {"a": {1: 4.0, 2: 3.0}, "b": {1: 40.0, 2: 10.0, 3: 9.0}}
    plan = plan_bits(errors, {"a": 10, "b": 20}, 45)
    assert plan.bits == {"a": 2, "b": 1} and plan.cost == 40


def test_dominated_widths_and_those_above_the_hull_are_left_out() -> None:
    errors = {"a": {1: 10.0, 2: 9.5, 3: 1.0, 4: 1.0, 5: 2.0}}
    assert plan_bits(errors, {"a": 1}, 2).bits == {"a": 1}  # 2 bits are above the line from 1 to 3
    assert plan_bits(errors, {"a": 1}, 2, method="exact").bits == {"a": 2}
    assert plan_bits(errors, {"a": 1}, 8).bits == {"a": 3}  # 4 and 5 bits bring nothing
    assert plan_bits({"a": {1: 3.0, 8: 0.5}}, {"a": 0}, 0).bits == {"a": 8}  # widths of a layer without weights cost nothing


def test_codebooks_can_be_charged() -> None:
    errors = {"a": {1: 10.0, 2: 5.0, 3: 2.0}}
    assert plan_bits(errors, {"a": 100}, 320).bits == {"a": 3}
    plan = plan_bits(errors, {"a": 100}, 399, charge_codebooks=True)
    assert plan.bits == {"a": 2} and plan.cost == 200 + 4 * 32
    assert plan_bits(errors, {"a": 100}, 556, charge_codebooks=True).bits == {"a": 3}


@pytest.mark.parametrize("seed", range(12))
def test_exact_plans_are_the_best_of_all(seed: int) -> None:
    errors, nnz, budget = problem(seed)
    least = least_error(errors, nnz, budget)
    exact, greedy = plan_bits(errors, nnz, budget, method="exact"), plan_bits(errors, nnz, budget)
    assert exact.error == pytest.approx(least, rel=2e-5)
    assert exact.bound <= least * (1 + 1e-9) and greedy.bound == pytest.approx(exact.bound)
    assert greedy.error >= exact.error * (1 - 1e-9) and exact.cost <= budget


def test_the_scale_of_the_errors_does_not_matter() -> None:
    errors, nnz, budget = problem(3)
    small = {name: {b: 1e-9 * e for b, e in of.items()} for name, of in errors.items()}
    assert plan_bits(small, nnz, budget, method="exact").bits == plan_bits(errors, nnz, budget, method="exact").bits


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 50), st.lists(st.floats(0, 1e3), min_size=1, max_size=8)), min_size=1, max_size=6),
    st.integers(0, 1500),
    st.booleans(),
)
def test_budget_is_never_exceeded(layers: list[tuple[int, list[float]]], budget: int, charge: bool) -> None:
    nnz = {str(i): n for i, (n, _) in enumerate(layers)}
    errors = {str(i): dict(enumerate(of, 1)) for i, (_, of) in enumerate(layers)}
    needed = sum(nnz.values()) + charge * 64 * len(layers)
    if budget < needed:
        with pytest.raises(InfeasibleBudgetError) as caught:
            plan_bits(errors, nnz, budget, charge)
        assert caught.value.cheapest == needed
        return
    plan = plan_bits(errors, nnz, budget, charge)
    assert plan.cost == sum(b * nnz[name] + charge * 32 * 2**b for name, b in plan.bits.items()) <= budget
    assert plan.error == pytest.approx(sum(errors[name][b] for name, b in plan.bits.items())) and plan.bound <= plan.error


def test_errors_say_what_is_needed() -> None:
    errors = {"a": {1: 1.0, 2: 0.5}}
    with pytest.raises(InfeasibleBudgetError, match="a budget of 9 bits is below the 10 that the smallest widths need"):
        plan_bits(errors, {"a": 10}, 9)
    with pytest.raises(InputError, match="layer a: got no count of its weights"):
        plan_bits(errors, {}, 9)
    with pytest.raises(InputError, match="layer a: got an error of nan at 2 bits"):
        plan_bits({"a": {1: 1.0, 2: math.nan}}, {"a": 1}, 9)
    with pytest.raises(InputError, match="got method 'best'"):
        plan_bits(errors, {"a": 1}, 9, method="best")  # type: ignore[arg-type]

"""Which codebook width every layer gets within a budget of bits: a multiple-choice knapsack over the errors of all widths.

The projection onto quantized weights in ANNC (Yang et al., CVPR 2020, as its programs do it), and its exact solution.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from qprune.errors import InfeasibleBudgetError, InputError
from qprune.search.knapsack import Choices, solve

CODEBOOK_ENTRY_BITS = 32


@dataclass(frozen=True)
class BitPlan:
    """One width per layer.

    bits   {layer: bits of a weight}
    error  Σ error of the chosen widths
    cost   bits of all weights (and codebooks, where charged), never above the budget
    bound  no plan within the budget has a lower error: the optimum of the linear relaxation
    """

    bits: dict[str, int]
    error: float
    cost: int
    bound: float

    @property
    def gap(self) -> float:
        """By what share of the bound the error exceeds it; infinite where the bound is 0 and the error is not."""
        excess = self.error - self.bound
        return excess / self.bound if self.bound > 0 else math.inf if excess > 0 else 0.0


@dataclass(frozen=True)
class _Item:
    cost: int
    error: float
    bits: int


@dataclass(frozen=True)
class _Increment:
    layer: str
    item: _Item
    cost: int
    gain: float


def plan_bits(
    errors: Mapping[str, Mapping[int, float]],
    nnz: Mapping[str, int],
    budget: float,
    charge_codebooks: bool = False,
    method: Literal["greedy", "exact"] = "greedy",
) -> BitPlan:
    """The widths of small total error whose cost is within the budget.

    errors            {layer: {bits: squared error of the layer's weights at that width}}
    nnz               {layer: number of weights that are coded}
    budget            bits
    charge_codebooks  add 32 · 2^bits per layer to bits · nnz
    method            "greedy": the paper's. Of every layer the lower convex hull of (cost, error); from the cheapest widths on, the hull's
                      increments of all layers by error saved per bit; a layer whose increment does not fit gets no further ones.
                      "exact": the least error, to a relative 1e-5, by a mixed-integer programme (ours)

    Equal efficiencies are taken in the order of the layers. Raises InfeasibleBudgetError if the cheapest widths exceed the budget.
    """
    if method not in ("greedy", "exact"):
        raise InputError(f"plan_bits: got method {method!r}, expected 'greedy' or 'exact'")
    items = {name: _items(name, of, nnz, charge_codebooks) for name, of in errors.items()}
    needed = sum(choices[0].cost for choices in items.values())
    if needed > budget:
        raise InfeasibleBudgetError(
            f"a budget of {budget:.6g} bits is below the {needed} that the smallest widths need; raise the budget or keep fewer weights",
            float(needed),
            float(budget),
        )
    plan, bound = _greedy(items, int(budget))
    if method == "exact":
        plan = _exact(items, budget, plan, bound)
    return BitPlan(
        {name: item.bits for name, item in plan.items()}, _error(plan), sum(item.cost for item in plan.values()), min(bound, _error(plan))
    )


def _items(name: str, errors: Mapping[int, float], nnz: Mapping[str, int], charge: bool) -> list[_Item]:
    """A layer's widths by rising cost, without those whose error is no lower than a cheaper one's."""
    if name not in nnz or not errors:
        raise InputError(
            f"layer {name}: got {'no count of its weights' if errors else 'no width'}, expected a count and at least one width"
        )
    kept: list[_Item] = []
    for item in sorted(
        (_Item(bits * nnz[name] + charge * CODEBOOK_ENTRY_BITS * 2**bits, float(error), bits) for bits, error in errors.items()),
        key=lambda item: (item.cost, item.error, item.bits),
    ):
        if not math.isfinite(item.error) or item.error < 0:
            raise InputError(f"layer {name}: got an error of {item.error} at {item.bits} bits, expected a finite number from 0 on")
        if not kept or item.error < kept[-1].error:
            kept.append(item)
    return kept


def _hull(items: list[_Item]) -> list[_Item]:
    """The lower convex hull of (cost, error)."""
    hull: list[_Item] = []
    for item in items:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], item):
            hull.pop()
        hull.append(item)
    return hull


def _slope(a: _Item, b: _Item) -> float:
    """Error saved per bit from a to b."""
    return (a.error - b.error) / (b.cost - a.cost)


def _greedy(items: Mapping[str, list[_Item]], budget: int) -> tuple[dict[str, _Item], float]:
    """The paper's plan, and the error of the linear relaxation, which takes the first increment that does not fit in part and stops."""
    hulls = {name: _hull(choices) for name, choices in items.items()}
    plan = {name: hull[0] for name, hull in hulls.items()}
    increments = [
        _Increment(name, b, b.cost - a.cost, a.error - b.error) for name, hull in hulls.items() for a, b in itertools.pairwise(hull)
    ]
    left, bound = budget - sum(item.cost for item in plan.values()), _error(plan)
    frozen: set[str] = set()
    for step in sorted(increments, key=lambda step: -step.gain / step.cost):
        if not frozen:
            bound -= step.gain * min(1.0, left / step.cost)
        if step.layer in frozen or step.cost > left:
            frozen.add(step.layer)
        else:
            plan[step.layer] = step.item
            left -= step.cost
    return plan, max(bound, 0.0)


def _exact(items: Mapping[str, list[_Item]], budget: float, greedy: dict[str, _Item], bound: float) -> dict[str, _Item]:
    """The best plan found by HiGHS or the greedy one; errors are in units of the bound, so that HiGHS' tolerances are relative to it."""
    unit = max(bound, 1e-9 * _error(greedy))
    if _error(greedy) <= bound or unit == 0:
        return greedy
    choices = [
        Choices(np.array([-item.error / unit for item in of]), np.array([[float(item.cost)] for item in of])) for of in items.values()
    ]
    picks = solve(choices, np.array([float(budget)]))
    if picks is None:
        return greedy
    found = {name: of[pick] for (name, of), pick in zip(items.items(), picks, strict=True)}
    return min(greedy, found, key=_error)


def _error(plan: Mapping[str, _Item]) -> float:
    return sum(item.error for item in plan.values())

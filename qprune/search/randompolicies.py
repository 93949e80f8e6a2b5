"""Random policies of about the same cost, to compare a search with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qprune.budget import Budget
from qprune.errors import InfeasibleBudgetError, InputError
from qprune.policy import Policy
from qprune.record import record_of
from qprune.search.extraction import ranking, unit_policy
from qprune.search.unitcost import UnitCost

_ATTEMPTS = 20
_BISECTIONS = 20


def random_policies(
    model: nn.Module,
    budget: Budget,
    n: int,
    generator: torch.Generator,
    convention: str = "product",
    low: float = 0.9,
    high: float = 1.1,
) -> list[Policy]:
    """n policies of a model of units with low ≤ cost / limit ≤ high, for every limit.

    As the random search of Zur et al. (1904.09872): random counts until the cost is in the range 0.9 to 1.1, the first layer at its most
    expensive candidate. Ours: random counts of many layers all cost nearly the same, which need not be in the range. So each layer's
    probabilities are uniform on the simplex times exp(−t · bits of a candidate), with t such that their expected cost is the middle of the
    range. Filters take candidates in random order.

    generator  on the CPU. Raises InfeasibleBudgetError if no draw gets into the range.
    """
    if n < 1 or not 0 < low < high:
        raise InputError(f"random_policies: expected n ≥ 1 and 0 < low < high, got n={n}, low={low}, high={high}")
    record = record_of(model)
    geometry = UnitCost(model, (), convention).geometry
    limits = budget.limits(geometry, record.fixed if record is not None else {}, convention)
    draws = _Draws(UnitCost(model, tuple(limits), convention, torch.device("cpu")), list(limits.values()), generator)
    found: list[Policy] = []
    reached: list[float] = []
    while len(found) < n:
        choices, ratio = draws.one((low + high) / 2)
        if bool(((ratio >= low) & (ratio <= high)).all()):
            found.append(unit_policy(model, {name: choice[0] for name, choice in choices.items()}))
            reached.clear()
            continue
        reached.append(float(ratio.max()))
        if len(reached) == _ATTEMPTS:
            closest = min(reached, key=lambda value: abs(value - 1))
            limit = next(iter(limits.values()))
            raise InfeasibleBudgetError(
                f"no random policy costs {low:g} to {high:g} times the budget in {_ATTEMPTS} draws, the closest costs {closest:.3g} times; "
                "choose a budget within the candidates' range, or widen low and high",
                min(reached) * limit,
                limit,
            )
    return found


class _Draws:
    """Random configurations, tilted towards few or many bits until their cost is about a target."""

    def __init__(self, costs: UnitCost, limits: list[float], generator: torch.Generator) -> None:
        self.costs, self.generator = costs, generator
        self.limits = torch.tensor(limits, dtype=torch.float64)
        self.filters = {name: costs.geometry.layers[name].filters for name in costs.units}
        self.first = next(name for name in costs.geometry.layers if name in costs.units)

    def one(self, target: float) -> tuple[dict[str, Tensor], Tensor]:
        """(candidates [1, F] per unit, cost over limits [fields])."""
        simplex = {name: -self._uniform(len(bits.weight)).log() for name, bits in self.costs.bits.items()}
        places = {name: self._uniform(filters) for name, filters in self.filters.items()}
        low, high = -20.0, 20.0
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            ratio = self._ratio(self._choices(simplex, places, middle))
            low, high = (middle, high) if float(ratio.max()) > target else (low, middle)
        choices = self._choices(simplex, places, high)
        return choices, self._ratio(choices)

    def _choices(self, simplex: dict[str, Tensor], places: dict[str, Tensor], tilt: float) -> dict[str, Tensor]:
        choices = {}
        for name, bits in self.costs.bits.items():
            order = ranking(bits.weight, bits.out)
            if name == self.first:
                choices[name] = order[-1].expand(1, self.filters[name])
                continue
            size = (bits.weight * bits.out) / (bits.weight * bits.out).max()
            p = simplex[name] * torch.exp(-tilt * size)
            together = getattr(self.costs.units[name].gate, "together", False)
            ends = (p / p.sum())[order].cumsum(0)[:-1].contiguous()
            place = places[name][:1].expand(self.filters[name]).contiguous() if together else places[name]
            choices[name] = order[torch.searchsorted(ends, place, right=True)].unsqueeze(0)
        return choices

    def _ratio(self, choices: dict[str, Tensor]) -> Tensor:
        return self.costs(choices)[0] / self.limits

    def _uniform(self, count: int) -> Tensor:
        return torch.rand(count, generator=self.generator, dtype=torch.float64).clamp_min(1e-300)

"""Widths within a budget: from the searched configuration to the likeliest one near it that fits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qprune.errors import InfeasibleBudgetError
from qprune.search.widths import NetworkWidths


def check_limit(space: NetworkWidths, limit: float) -> None:
    """Raise InfeasibleBudgetError unless the narrowest network is within `limit` multiplications."""
    least = int(space.structure.flops(space.widths_of(space.narrowest().unsqueeze(0))))
    if least > limit:
        raise InfeasibleBudgetError(
            f"no widths meet the budget: macs is limited to {limit:.6g} in convolutions, the narrowest network needs {least:.6g}; "
            "raise the budget or add smaller ratios",
            least,
            limit,
        )


@torch.no_grad()
def fit_widths(space: NetworkWidths, limit: float, spend: bool = True) -> dict[str, int]:
    """Layer → width, with exact multiplications of all convolutions (SlimStructure.flops) within `limit`.

    Ours (the original has no budget). From the extracted configuration: while it is too expensive, the move that loses least likelihood
    per multiplication saved; then, within the limit, moves that gain likelihood; then, with `spend`, what is left of the limit is spent,
    least loss of likelihood per multiplication first. Greedy, so not always the likeliest configuration of all. Raises
    InfeasibleBudgetError if even the narrowest network is too expensive.
    """
    check_limit(space, limit)

    def cost(states: Tensor) -> Tensor:
        return space.structure.flops(space.widths_of(states)).double()

    def better(state: Tensor, rate: Callable[[Tensor, Tensor, Tensor], Tensor], wider: bool = False) -> Tensor | None:
        """The move with the highest rate(new costs, change in cost, change in log-likelihood); None if all are −inf. wider: of those that
        make no layer narrower."""
        moved = space.neighbours(state)
        if wider:
            here = space.widths_of(state.unsqueeze(0))
            moved = moved[(space.widths_of(moved) >= here).all(1)]
            if not len(moved):
                return None
        here = torch.cat([state.unsqueeze(0), moved])
        costs, likelihood = cost(here), space.log_likelihood(here)
        rates = rate(costs[1:], costs[1:] - costs[0], likelihood[1:] - likelihood[0])
        best = int(rates.argmax())
        return moved[best] if rates[best] > -torch.inf else None

    def narrowing(costs: Tensor, change: Tensor, gain: Tensor) -> Tensor:
        return torch.where(change < 0, _ratio(gain, -change), -torch.inf)

    def likelier(costs: Tensor, change: Tensor, gain: Tensor) -> Tensor:
        return torch.where((costs <= limit) & (gain > 1e-9), gain, -torch.inf)

    def widening(costs: Tensor, change: Tensor, gain: Tensor) -> Tensor:
        return torch.where((costs <= limit) & (change > 0), _ratio(gain, change), -torch.inf)

    state = space.extract()
    while float(cost(state.unsqueeze(0))) > limit:
        found = better(state, narrowing)
        state = space.narrowest() if found is None else found
    while (found := better(state, likelier)) is not None:
        state = found
    while spend and (found := better(state, widening, wider=True)) is not None:
        state = found
    widths = space.widths_of(state.unsqueeze(0))[0].tolist()
    return dict(zip(space.structure.names, widths, strict=True))


def _ratio(gain: Tensor, amount: Tensor) -> Tensor:
    """Gain per amount where likelihood falls; where it rises, moves are compared by their gain alone, before all others."""
    return torch.where(gain > 0, gain, gain / amount.clamp_min(1e-300)).clamp_min(-1e300)

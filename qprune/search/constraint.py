"""The budget as a term of the loss: an augmented Lagrangian on the expected cost."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qprune.search.expected import Expected


class Constraint:
    """λ·s + (ρ/2)·max(0, s)² per limit, with s = log(expected cost / limit) and λ ≥ 0 raised by rate·s after every step.

    The logarithm makes the pull independent of how far above the budget a search starts. While the expected cost is above the limit λ
    grows; below it λ shrinks towards 0, so a met budget costs nothing. The budget itself is kept by `allocate`, whatever this term reached.

    limits  name of a field of Expected → limit
    rate    dual step size, per optimizer step
    rho     weight of the quadratic term
    """

    def __init__(self, limits: Mapping[str, float], rate: float = 0.02, rho: float = 1.0, start: float = 0.1) -> None:
        self.limits, self.rate, self.rho = dict(limits), rate, rho
        self.multipliers = dict.fromkeys(self.limits, start)

    def slack(self, cost: Expected) -> dict[str, Tensor]:
        """s per limit; positive above the budget."""
        return {name: torch.log(getattr(cost, name) / limit) for name, limit in self.limits.items()}

    def penalty(self, slack: Mapping[str, Tensor]) -> Tensor:
        terms = [self.multipliers[name] * s + self.rho / 2 * s.clamp_min(0).square() for name, s in slack.items()]
        return torch.stack(terms).sum()

    def update(self, slack: Mapping[str, Tensor]) -> None:
        """The dual step."""
        for name, s in slack.items():
            self.multipliers[name] = max(0.0, self.multipliers[name] + self.rate * float(s.detach()))

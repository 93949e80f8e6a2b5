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
    device  where the multipliers live, so that a step needs nothing from the host
    """

    def __init__(
        self, limits: Mapping[str, float], rate: float = 0.02, rho: float = 1.0, start: float = 0.1, device: torch.device | None = None
    ) -> None:
        self.limits, self.rate, self.rho = dict(limits), rate, rho
        self._limit = torch.tensor(list(self.limits.values()), dtype=torch.float64, device=device)
        self._multiplier = torch.full_like(self._limit, start)

    @property
    def multipliers(self) -> dict[str, float]:
        """λ per limit, read back from the device."""
        return dict(zip(self.limits, self._multiplier.tolist(), strict=True))

    @multipliers.setter
    def multipliers(self, values: Mapping[str, float]) -> None:
        self._multiplier.copy_(torch.tensor([values[name] for name in self.limits], dtype=torch.float64))

    def slack(self, cost: Expected) -> Tensor:
        """s of every limit, in their order; positive above the budget."""
        return torch.log(torch.stack([getattr(cost, name) for name in self.limits]) / self._limit)

    def penalty(self, slack: Tensor) -> Tensor:
        return (self._multiplier * slack + self.rho / 2 * slack.clamp_min(0).square()).sum()

    @torch.no_grad()
    def update(self, slack: Tensor) -> None:
        """The dual step."""
        self._multiplier.add_(self.rate * slack.detach()).clamp_min_(0)

    @torch.no_grad()
    def worst(self, slack: Tensor) -> tuple[Tensor, Tensor]:
        """Expected cost over budget, and λ, of the limit that is exceeded most."""
        s, i = slack.detach().max(0)
        return s.exp(), self._multiplier.gather(0, i.unsqueeze(0)).squeeze(0)

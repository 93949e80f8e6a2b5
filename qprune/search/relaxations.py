"""Estimators that differentiate the loss itself, at mixing coefficients in place of choices. Both are biased, with little variance."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from qprune.errors import InputError
from qprune.search.distributions import draw
from qprune.search.estimation import Estimate, Estimator, Problem, estimate, mean_and_variance


class Relaxation(Estimator):
    """Averages S gradients, each of one forward and one backward pass. Estimated variance: unbiased, the sample variance over S."""

    unbiased: ClassVar[bool] = False
    hard: bool

    @abstractmethod
    def coefficients(self, logits: Tensor, filters: int, generator: torch.Generator | None) -> Tensor:
        """p [F, K] with a gradient to the logits [K]."""

    def __call__(self, problem: Problem, generator: torch.Generator | None = None) -> Estimate:
        distributions = self.softmax_distributions(problem)
        terms, losses = [], []
        for _ in range(self.samples):
            with torch.enable_grad():
                leaves = [d.logits.detach().requires_grad_() for d in distributions]
                p = [self.coefficients(leaf, d.trials, generator) for leaf, d in zip(leaves, distributions, strict=True)]
                loss = problem.relaxed(p, self.hard)
                terms.append(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))
            losses.append(loss.detach().double())
        parts = [mean_and_variance(torch.stack(gradients).double()) for gradients in zip(*terms, strict=True)]
        return estimate(parts, distributions, torch.stack(losses))


class GumbelSoftmax(Relaxation):
    """p = softmax((logits + Gumbel noise) / temperature) in every row (Jang et al. 1611.01144; Maddison et al. 1611.00712).

    The gradient is exact for the expected loss at these p, not at the choices; they meet as the temperature goes to 0, where the variance
    grows without bound.

    temperature  > 0
    hard         evaluate at the one-hot arg-max of p, a draw from the softmax, with the gradient of p (straight-through Gumbel-softmax)
    """

    name = "gumbel"

    def __init__(self, samples: int = 1, temperature: float = 1.0, hard: bool = False) -> None:
        super().__init__(samples)
        if not 0 < temperature < math.inf:
            raise InputError(f"temperature: expected a positive number, got {temperature!r}")
        self.temperature, self.hard = temperature, hard

    def coefficients(self, logits: Tensor, filters: int, generator: torch.Generator | None) -> Tensor:
        device = None if generator is None else generator.device
        uniform = torch.rand(filters, logits.numel(), generator=generator, device=device, dtype=torch.float64).clamp_min_(2.0**-54)
        noise = -(-uniform.log()).log()
        soft = ((logits + noise.to(logits, non_blocking=True)) / self.temperature).softmax(-1)
        return _straight_through(soft.argmax(-1), soft) if self.hard else soft


class StraightThrough(Relaxation):
    """The loss at a draw, with the gradient of the softmax in place of the draw's (Bengio et al. 1308.3432).

    Unbiased where the loss is linear in every row of p while the others stand, which a network's is not between its choices.
    """

    name = "straight-through"
    hard = True

    def __init__(self, samples: int = 1) -> None:
        super().__init__(samples)

    def coefficients(self, logits: Tensor, filters: int, generator: torch.Generator | None) -> Tensor:
        soft = logits.softmax(-1).expand(filters, -1)
        return _straight_through(draw(soft[0].detach(), (filters,), generator), soft)


def _straight_through(choice: Tensor, soft: Tensor) -> Tensor:
    return F.one_hot(choice, soft.size(-1)).to(soft.dtype) + (soft - soft.detach())

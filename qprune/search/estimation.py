"""What a gradient estimator for discrete choices is: the problem that it is given, and what it returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from qprune.errors import InputError
from qprune.search.distributions import Distribution, SoftmaxDistribution


class Problem(Protocol):
    """A loss of drawn configurations, on one mini-batch."""

    @property
    def distributions(self) -> Sequence[Distribution]:
        """Independent of each other: a configuration is one draw from each."""

    def losses(self, draws: Sequence[Tensor]) -> Tensor:
        """Float64 [S], without gradients. draws[l] is [S, …], S draws of distribution l."""

    def relaxed(self, p: Sequence[Tensor], hard: bool) -> Tensor:
        """A scalar, differentiable with respect to every p[l] [F_l, K_l], whose rows are mixing coefficients of the candidates. With
        hard=True every row is one-hot. Only the relaxations call it."""


@dataclass
class Estimate:
    """An estimated gradient of the expected loss.

    gradients    per distribution, shape and dtype of its logits
    variances    per distribution, the estimated variance of every component of its gradient (of the estimate, not of one sample); NaN where
                 the samples are too few to tell
    losses       of every configuration that was evaluated, float64 [evaluations]
    evaluations  number of losses on the mini-batch; a relaxation's includes a backward pass
    """

    gradients: list[Tensor]
    variances: list[Tensor]
    losses: Tensor
    evaluations: int


class Estimator(ABC):
    """Call it with a problem and a generator for an Estimate. Does not change logits or their .grad.

    unbiased  True if the mean estimate is the gradient of the expected loss for every problem
    """

    name: str
    unbiased: ClassVar[bool]

    def __init__(self, samples: int = 8) -> None:
        self.samples = samples
        if samples < self.fewest:
            raise InputError(f"estimator {self.name!r} needs at least {self.fewest} samples, got {samples}")

    @property
    def fewest(self) -> int:
        """The smallest number of samples that gives an estimate."""
        return 1

    @abstractmethod
    def __call__(self, problem: Problem, generator: torch.Generator | None = None) -> Estimate: ...

    def softmax_distributions(self, problem: Problem) -> list[SoftmaxDistribution]:
        """The problem's distributions; raises InputError if one is not parameterised by a softmax."""
        found = [d for d in problem.distributions if isinstance(d, SoftmaxDistribution)]
        if len(found) != len(problem.distributions):
            others = {type(d).__name__ for d in problem.distributions if not isinstance(d, SoftmaxDistribution)}
            raise InputError(
                f"estimator {self.name!r} needs distributions over candidates, got {', '.join(sorted(others))}: use 'score' or 'score-loo'"
            )
        return found


def mean_and_variance(terms: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the first dimension of independent terms [S, …], and the estimated variance of that mean; NaN for S = 1."""
    mean = terms.mean(0)
    return mean, terms.var(0) / len(terms) if len(terms) > 1 else torch.full_like(mean, torch.nan)


def estimate(parts: Sequence[tuple[Tensor, Tensor]], distributions: Sequence[Distribution], losses: Tensor) -> Estimate:
    """An Estimate of (gradient, variance) per distribution, cast to the logits' dtype."""
    gradients = [gradient.to(d.logits.dtype) for (gradient, _), d in zip(parts, distributions, strict=True)]
    variances = [variance.to(d.logits.dtype) for (_, variance), d in zip(parts, distributions, strict=True)]
    return Estimate(gradients, variances, losses, losses.numel())

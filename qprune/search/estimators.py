"""Estimators of the gradient of an expected loss with respect to the logits of discrete choices: the score function, and the list of
all."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from qprune.errors import InputError
from qprune.search.estimation import Estimate, Estimator, Problem, estimate, mean_and_variance
from qprune.search.paths import RandomPath, SharedPath, TripleAlphas
from qprune.search.relaxations import GumbelSoftmax, StraightThrough

__all__ = [
    "ESTIMATORS",
    "Estimate",
    "Estimator",
    "GumbelSoftmax",
    "LeaveOneOutScore",
    "Problem",
    "RandomPath",
    "ScoreFunction",
    "SharedPath",
    "StraightThrough",
    "TripleAlphas",
    "make_estimator",
]


class ScoreFunction(Estimator):
    """g = mean_s (L_s − b_s) ∇ log P(draw_s), for S configurations that are drawn from all distributions together. Unbiased.

    For filter counts ∇ log P = n − F p, so that the components of a gradient sum to 0.

    samples   S
    baseline  None: b_s = 0, as Zur et al. (1904.09872). The variance then is about L̄² F p (1 − p) / S, however little the losses differ
              "loo": b_s = mean of the other samples' losses (leave-one-out; Kool et al. 2019), still unbiased, S ≥ 2. g is the sample
              covariance of loss and score, with variance about Var(L) F p (1 − p) / S

    Estimated variance: unbiased for both. Without a baseline it is the sample variance of the S terms over S. With it the terms depend on
    each other; from E ∇ log P = 0 the same quantity v has the mean Var(g) − E[g]²/(S − 1)², hence (v + g²/(S − 1)²) / (1 + 1/(S − 1)²).
    """

    unbiased: ClassVar[bool] = True

    def __init__(self, samples: int = 8, baseline: str | None = None) -> None:
        if baseline not in (None, "loo"):
            raise InputError(f"baseline: expected None or 'loo', got {baseline!r}")
        self.baseline = baseline
        self.name = "score" if baseline is None else "score-loo"
        super().__init__(samples)

    @property
    def fewest(self) -> int:
        return 1 if self.baseline is None else 2

    def __call__(self, problem: Problem, generator: torch.Generator | None = None) -> Estimate:
        distributions = problem.distributions
        draws = [d.sample(self.samples, generator) for d in distributions]
        losses = problem.losses(draws).double()
        weights = losses if self.baseline is None else (losses - losses.mean()) * (self.samples / (self.samples - 1))
        return estimate([self._part(weights, d.score(drawn)) for d, drawn in zip(distributions, draws, strict=True)], distributions, losses)

    def _part(self, weights: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
        gradient, variance = mean_and_variance(weights.view(-1, *[1] * (score.dim() - 1)) * score)
        if self.baseline is not None:
            shrink = 1 / (self.samples - 1) ** 2
            variance = (variance + shrink * gradient.square()) / (1 + shrink)
        return gradient, variance


class LeaveOneOutScore(ScoreFunction):
    """ScoreFunction with baseline "loo"."""

    def __init__(self, samples: int = 8) -> None:
        super().__init__(samples, "loo")


ESTIMATORS: dict[str, type[Estimator]] = {
    "score": ScoreFunction,
    "score-loo": LeaveOneOutScore,
    "random-path": RandomPath,
    "shared-path": SharedPath,
    "triple": TripleAlphas,
    "gumbel": GumbelSoftmax,
    "straight-through": StraightThrough,
}


def make_estimator(name: str, **options: Any) -> Estimator:
    """The estimator of a name, with the options of its class."""
    if name not in ESTIMATORS:
        raise InputError(f"unknown estimator {name!r}; expected one of {', '.join(ESTIMATORS)}")
    return ESTIMATORS[name](**options)

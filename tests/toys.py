"""Searches small enough to enumerate: two layers of two candidates, and the exact gradient of their expected loss."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qprune.search.distributions import Distribution, FilterCounts
from qprune.search.estimators import Estimate, Estimator, Problem

LOGITS = ([1.1, -0.6], [-0.4, 0.7])
TABLE = torch.tensor([[0.3, 2.7, 2.9], [2.2, 0.4, 0.1], [3.6, 3.5, 0.8]], dtype=torch.float64)
"""An arbitrary loss for (filters of layer 0 at candidate 0, filters of layer 1 at candidate 0)."""


@dataclass
class Toy:
    """Two layers of two candidates; the loss is a table over the number of filters at candidate 0. The relaxed loss meets it at choices."""

    table: Tensor
    distributions: Sequence[Distribution]
    asked: list[int] = field(default_factory=list)

    def losses(self, draws: Sequence[Tensor]) -> Tensor:
        self.asked.append(len(draws[0]))
        assert all(d.dtype == torch.int64 and len(d) == len(draws[0]) for d in draws)
        return self.table[draws[0][:, 0], draws[1][:, 0]]

    def relaxed(self, p: Sequence[Tensor], hard: bool) -> Tensor:
        """The table, interpolated by polynomials in the sums of p."""
        first, second = (_lagrange(q[:, 0].sum(), n) for q, n in zip(p, self.table.shape, strict=True))
        return first @ self.table @ second


def _lagrange(x: Tensor, points: int) -> Tensor:
    terms = [math.prod(((x - j) / (i - j) for j in range(points) if j != i), start=torch.ones_like(x)) for i in range(points)]
    return torch.stack(terms)


def toy(filters: int = 2, table: Tensor = TABLE, logits: Sequence[Sequence[float]] = LOGITS) -> Toy:
    layers = [FilterCounts(torch.tensor(values, dtype=torch.float64), filters) for values in logits]
    return Toy(table[: filters + 1, : filters + 1], layers)


def expected_loss(problem: Toy, logits: Sequence[Tensor]) -> Tensor:
    """E[L] of independent filters, by enumerating every choice of every filter."""
    total = torch.zeros((), dtype=torch.float64)
    filters = [d.trials for d in problem.distributions if isinstance(d, FilterCounts)]
    log_p = [values.log_softmax(0) for values in logits]
    for choice in itertools.product(*(itertools.product(range(2), repeat=f) for f in filters)):
        likelihood = torch.stack([lp[list(c)].sum() for lp, c in zip(log_p, choice, strict=True)]).sum().exp()
        total = total + likelihood * problem.table[tuple(c.count(0) for c in choice)]
    return total


def exact_gradient(problem: Toy, expectation: Callable[[Toy, Sequence[Tensor]], Tensor] = expected_loss) -> list[Tensor]:
    leaves = [d.logits.clone().requires_grad_() for d in problem.distributions]
    return list(torch.autograd.grad(expectation(problem, leaves), leaves))


class Scripted(FilterCounts):
    """Draws what it is told to."""

    script: Iterator[list[int]]

    def sample(self, samples: int, generator: torch.Generator | None = None) -> Tensor:
        first = torch.tensor([next(self.script) for _ in range(samples)])
        return torch.stack([first, self.filters - first], 1)


def distribution_of_estimates(estimator: Estimator, filters: int, draws: Sequence[int]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Over all that can be drawn, draws[l] times from layer l: the estimates' mean, their variance, and the mean of the reported variance.

    Every list holds one vector per layer. Exact: nothing is random.
    """
    layers = [Scripted(torch.tensor(values, dtype=torch.float64), filters) for values in LOGITS]
    problem = Toy(TABLE[: filters + 1, : filters + 1], layers)
    weights, gradients, variances = [], [], []
    choice = [layer.probabilities[0].item() for layer in layers]
    pmf = [[math.comb(filters, n) * q**n * (1 - q) ** (filters - n) for n in range(filters + 1)] for q in choice]
    for script in itertools.product(*(itertools.product(range(filters + 1), repeat=d) for d in draws)):
        for layer, values in zip(layers, script, strict=True):
            layer.script = iter(values)
        found = estimator(problem)
        assert all(next(layer.script, None) is None for layer in layers)
        weights.append(math.prod(pmf[i][n] for i, values in enumerate(script) for n in values))
        gradients.append(torch.stack(found.gradients))
        variances.append(torch.stack(found.variances))
    w = torch.tensor(weights, dtype=torch.float64).view(-1, 1, 1)
    torch.testing.assert_close(w.sum().item(), 1.0)
    g, v = torch.stack(gradients), torch.stack(variances)
    mean = (w * g).sum(0)
    return list(mean), list((w * (g - mean).square()).sum(0)), list((w * v).sum(0))


def assert_equal(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, atol=1e-12, rtol=1e-10)


def standard_errors(found: Estimate, expected: Sequence[Tensor]) -> float:
    """The largest deviation of a component, in units of its reported standard error."""
    off = [((g - e).abs() / v.sqrt()).max() for g, e, v in zip(found.gradients, expected, found.variances, strict=True)]
    return max(off).item()


def run(estimator: Estimator, problem: Problem, seed: int = 0) -> Estimate:
    return estimator(problem, torch.Generator().manual_seed(seed))

"""How many losses it takes to see which candidate is better: gradient estimators on a loss whose gradient is known.

    python examples/estimator_variance.py

A layer of 16 filters chooses among 4 equally likely candidates. A filter at the first one makes the loss 0.004 higher; the loss of a drawn
network is 1.5 on average, with a standard deviation of 0.05 from everything else. Takes one to two minutes on one core.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qprune.search.distributions import FilterCounts
from qprune.search.estimators import (
    Estimate,
    Estimator,
    GumbelSoftmax,
    RandomPath,
    ScoreFunction,
    SharedPath,
    StraightThrough,
    TripleAlphas,
)

FILTERS, CANDIDATES, MEAN, NOISE, EFFECT = 16, 4, 1.5, 0.05, 0.004
DEVIATION = FILTERS * (1 / CANDIDATES) * (1 - 1 / CANDIDATES)
GRADIENT = EFFECT * DEVIATION


class Layer:
    """L = 1.5 + 0.004 (n_0 − 4) + noise. A second layer of the same size stands for the rest of the network.

    together  True: the noise is another number for every evaluation, as if it came from all choices together. False: it is the sum of what
              the filters of the other layer do, independent of the first layer's
    """

    def __init__(self, together: bool, seed: int = 0) -> None:
        self.together = together
        self.layer, self.rest = (FilterCounts(torch.zeros(CANDIDATES, dtype=torch.float64), FILTERS) for _ in range(2))
        self.distributions = (self.layer, self.rest)
        self.generator = torch.Generator().manual_seed(seed)

    def losses(self, draws: Sequence[Tensor]) -> Tensor:
        return self._loss(draws[0][:, 0].double(), draws[1][:, 0].double())

    def relaxed(self, p: Sequence[Tensor], hard: bool) -> Tensor:
        return self._loss(p[0][:, 0].sum(), p[1][:, 0].sum())

    def _loss(self, first: Tensor, rest: Tensor) -> Tensor:
        mean = FILTERS / CANDIDATES
        noise = torch.randn(first.shape, generator=self.generator, dtype=torch.float64) if self.together else (rest - mean) / DEVIATION**0.5
        return MEAN + EFFECT * (first - mean) + NOISE * noise


def score_table() -> None:
    """The variance of the score function, by formula and measured."""
    print("| baseline | std per sample: formula | measured | samples for signal-to-noise 1: formula | measured |")
    print("|---|--:|--:|--:|--:|")
    measured = []
    for label, baseline, square in (("none (Zur et al.)", None, MEAN**2), ("leave-one-out", "loo", 0.0)):
        formula = DEVIATION * (square + NOISE**2)
        variance = _variance_per_evaluation(ScoreFunction(400_000, baseline)(Layer(together=True), torch.Generator().manual_seed(1)))
        measured.append(variance)
        needed = [f"{v / GRADIENT**2:,.0f}" for v in (formula, variance)]
        print(f"| {label} | {math.sqrt(formula):.3f} | {math.sqrt(variance):.3f} | {needed[0]} | {needed[1]} |")
    print(f"\nRatio of the measured variances: {measured[0] / measured[1]:.0f}\n")


def _variance_per_evaluation(found: Estimate) -> float:
    """Of the first component: the estimate's variance times the losses that it took."""
    return found.variances[0][0].item() * found.evaluations


def estimator_table() -> None:
    """All estimators on the same problem, per evaluated loss."""
    rows: list[tuple[str, Estimator]] = [
        ("score", ScoreFunction(100_000)),
        ("score-loo", ScoreFunction(100_000, "loo")),
        ("random-path, T of the network", RandomPath(20_000)),
        ("random-path, T of the layer", RandomPath(20_000, "layer")),
        ("shared-path, T of the network", SharedPath(20_000)),
        ("shared-path, T of the layer", SharedPath(20_000, "layer")),
        ("triple", TripleAlphas(20_000)),
        ("gumbel, temperature 1", GumbelSoftmax(2_000)),
        ("gumbel, temperature 0.1", GumbelSoftmax(2_000, 0.1)),
        ("gumbel, temperature 1, hard", GumbelSoftmax(2_000, 1.0, True)),
        ("straight-through", StraightThrough(2_000)),
    ]
    print("| estimator | evaluations at least | mean of g_0 | std per evaluation | for signal-to-noise 1 | std, noise of other layers |")
    print("|---|--:|--:|--:|--:|--:|")
    for label, estimator in rows:
        least = type(estimator)(estimator.fewest)(Layer(together=True), torch.Generator().manual_seed(0)).evaluations
        found = [estimator(Layer(together), torch.Generator().manual_seed(2)) for together in (True, False)]
        mean, (first, second) = found[0].gradients[0][0].item(), map(_variance_per_evaluation, found)
        print(f"| {label} | {least} | {mean:+.4f} | {first**0.5:.4f} | {first / GRADIENT**2:,.1f} | {second**0.5:.4f} |")
    print(f"\nExact gradient: {GRADIENT:+.4f}\n")


def search_table(steps: int = 1000, runs: int = 40) -> None:
    """A search with the settings of the original: SGD, learning rate 0.1 · 0.999^t, one estimate of S samples per step."""
    print("| estimator | S | probability of the worse candidate after the search: mean | std over runs | lower than at the start |")
    print("|---|--:|--:|--:|--:|")
    for baseline in (None, "loo"):
        for samples in (3, 20, 300):
            final = torch.tensor([_search(ScoreFunction(samples, baseline), steps, seed) for seed in range(runs)])
            lower = (final < 1 / CANDIDATES).double().mean().item()
            name = "score" if baseline is None else "score-loo"
            print(f"| {name} | {samples} | {final.mean():.3f} | {final.std():.3f} | {lower:.0%} |")
    print(f"| exact gradient | | {_search(None, steps, 0):.3f} | | |")


def _search(estimator: Estimator | None, steps: int, seed: int) -> float:
    problem, generator = Layer(together=True, seed=seed), torch.Generator().manual_seed(1000 + seed)
    logits = problem.layer.logits
    worse = torch.eye(CANDIDATES, dtype=torch.float64)[0]
    for step in range(steps):
        if estimator is None:
            p = problem.layer.probabilities
            gradient = EFFECT * FILTERS * p[0] * (worse - p)
        else:
            gradient = estimator(problem, generator).gradients[0]
        logits -= 0.1 * 0.999**step * gradient
    return problem.layer.probabilities[0].item()


if __name__ == "__main__":
    torch.set_num_threads(1)
    score_table()
    estimator_table()
    search_table()

"""Estimators that force a whole layer to one candidate and draw the rest of the network: differences of mean losses.

From the programs of Zur et al. (1904.09872), of the time when a layer had one choice. With V_li the expected loss while all of layer l is
at candidate i, they estimate

    g_li = p_li (V_li − T),        T = Σ_j p_lj V_lj.

Where a layer is one choice (F = 1), V_li is the conditional expectation of the loss, T the expected loss, and g the exact gradient. With
F > 1 filters that choose independently, g is another quantity: the gradient, for layer l, of the expected loss of a network in which the
filters of layer l share one choice. The two agree where the loss is a sum over the filters of the layer, and differ by what the filters
do together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from qprune.errors import InputError
from qprune.search.distributions import SoftmaxDistribution
from qprune.search.estimation import Estimate, Estimator, Problem, estimate, mean_and_variance

CENTERS = ("network", "layer")


class RandomPath(Estimator):
    """The mean loss of S paths for every layer and candidate, each with paths of its own: S Σ_l K_l evaluations.

    samples  S per layer and candidate
    center   what T is: "network": the mean of Σ_j p_mj V_mj over all layers m, as the original; "layer": the layer's own, so that
             Σ_i g_li = 0. Where a layer is one choice the expectation is the same

    Estimated variance: unbiased, from the sample variances (S − 1) of the losses that enter with their weights in g.
    """

    name = "random-path"
    unbiased: ClassVar[bool] = False
    shared: ClassVar[bool] = False

    def __init__(self, samples: int = 8, center: str = "network") -> None:
        super().__init__(samples)
        if center not in CENTERS:
            raise InputError(f"center: expected one of {', '.join(CENTERS)}, got {center!r}")
        self.center = center

    def __call__(self, problem: Problem, generator: torch.Generator | None = None) -> Estimate:
        distributions = self.softmax_distributions(problem)
        p = [d.probabilities for d in distributions]
        values = [forced_losses(problem, distributions, i, self.samples, self.shared, generator) for i in range(len(p))]
        variances = self._variances_of_shared(values, p) if self.shared else self._variances([mean_and_variance(v)[1] for v in values], p)
        gradients = self._gradients([v.mean(0) for v in values], p)
        return estimate(list(zip(gradients, variances, strict=True)), distributions, torch.cat([v.flatten() for v in values]))

    def _gradients(self, means: Sequence[Tensor], p: Sequence[Tensor]) -> list[Tensor]:
        own = torch.stack([(q * mean).sum() for q, mean in zip(p, means, strict=True)])
        total = own.mean().expand_as(own) if self.center == "network" else own
        return [q * (mean - t) for q, mean, t in zip(p, means, total, strict=True)]

    def _variances(self, spreads: Sequence[Tensor], p: Sequence[Tensor]) -> list[Tensor]:
        """Of g, from the variances of independent V_li: V_li has the weight p_li (1 − c p_li), V_mj the weight −p_li c p_mj."""
        own = torch.stack([(q.square() * spread).sum() for q, spread in zip(p, spreads, strict=True)])
        c = self._weight(len(p))
        total = c**2 * own.sum().expand_as(own) if self.center == "network" else own
        return [q.square() * (spread * (1 - 2 * c * q) + t) for q, spread, t in zip(p, spreads, total, strict=True)]

    def _variances_of_shared(self, values: Sequence[Tensor], p: Sequence[Tensor]) -> list[Tensor]:
        """Of g, where the samples of different candidates belong together: V_li − c Σ_j p_lj V_lj is averaged path by path."""
        totals = [v @ q for q, v in zip(p, values, strict=True)]
        spread = torch.stack([mean_and_variance(total)[1] for total in totals])
        c = self._weight(len(p))
        others = c**2 * (spread.sum() - spread) if self.center == "network" else torch.zeros_like(spread)
        paired = [mean_and_variance(v - c * total.unsqueeze(1))[1] for v, total in zip(values, totals, strict=True)]
        return [q.square() * (v + rest) for q, v, rest in zip(p, paired, others, strict=True)]

    def _weight(self, layers: int) -> float:
        """c: the weight in T of the layer's own Σ_j p_lj V_lj."""
        return 1 / layers if self.center == "network" else 1.0


class SharedPath(RandomPath):
    """As RandomPath, with the same S paths for all candidates of a layer (common random numbers): what the rest of the network does to the
    loss of all candidates cancels in their differences. With center="network" only to the 1/(number of layers) part, since T then contains
    paths of other layers: take "layer" for the benefit.
    """

    name = "shared-path"
    shared: ClassVar[bool] = True


class TripleAlphas(RandomPath):
    """As RandomPath, but V_li = (V' + p_{l−1,i} p_{l+1,i} V'') / 2, with V' the mean loss of ⌊S/2⌋ paths with layer l at candidate i, and
    V'' of the other S − ⌊S/2⌋ with layers l − 1, l and l + 1 all at i. S ≥ 2; with S ≥ 4 the variance is known.

    Biased, also where a layer is one choice: V'' is weighted by probabilities, so that a positive loss favours candidates that the
    neighbours avoid. Layers are neighbours in the order of the problem's distributions. Ours, since the source does not say: a neighbour
    that does not exist (first and last layer) or has no candidate i is drawn like the others, without its factor.
    """

    name = "triple"

    @property
    def fewest(self) -> int:
        return 2

    def __call__(self, problem: Problem, generator: torch.Generator | None = None) -> Estimate:
        distributions = self.softmax_distributions(problem)
        p = [d.probabilities for d in distributions]
        half = self.samples // 2
        means, spreads, losses = [], [], []
        for i, q in enumerate(p):
            neighbours = [m for m in (i - 1, i + 1) if 0 <= m < len(p)]
            alone = forced_losses(problem, distributions, i, half, False, generator)
            together = forced_losses(problem, distributions, i, self.samples - half, False, generator, neighbours)
            factor = torch.ones_like(q)
            for m in neighbours:
                common = min(len(q), len(p[m]))
                factor[:common] *= p[m][:common]
            (first, spread), (second, other) = mean_and_variance(alone), mean_and_variance(together)
            means.append((first + factor * second) / 2)
            spreads.append((spread + factor.square() * other) / 4)
            losses += [alone.flatten(), together.flatten()]
        parts = list(zip(self._gradients(means, p), self._variances(spreads, p), strict=True))
        return estimate(parts, distributions, torch.cat(losses))


def forced_losses(
    problem: Problem,
    distributions: Sequence[SoftmaxDistribution],
    layer: int,
    samples: int,
    shared: bool,
    generator: torch.Generator | None,
    neighbours: Sequence[int] = (),
) -> Tensor:
    """Losses [S, K] while every choice of a layer is forced to each candidate in turn; the other layers are drawn.

    shared      one set of S paths for all candidates, instead of one for each
    neighbours  other layers that are forced to the same candidate, where they have it
    """
    candidates = distributions[layer].logits.numel()
    draws = []
    for m, distribution in enumerate(distributions):
        forced = distribution.pure()[: candidates if m == layer or m in neighbours else 0]
        rows = [forced.repeat_interleave(samples, 0)]
        free = candidates - len(forced)
        if free:
            drawn = distribution.sample(samples if shared else samples * free, generator)
            rows += [drawn] * free if shared else [drawn]
        draws.append(torch.cat(rows))
    return problem.losses(draws).double().view(candidates, samples).t()

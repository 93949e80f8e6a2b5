"""What a search over filters draws from: how many filters of a layer get each candidate, and which filters those are.

Zur et al., "Towards Learning of Filter-Level Heterogeneous Compression of Convolutional Neural Networks" (1904.09872): the logits of a
layer parameterise a multinomial distribution over the counts of its filters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qprune.errors import CheckpointError, InputError

FROZEN_LOGIT = 1000.0


class Distribution(ABC):
    """A distribution over configurations of a part of a network, with logits to learn.

    logits  a leaf tensor or a parameter, floating point
    """

    logits: Tensor

    @abstractmethod
    def sample(self, samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Independent draws [samples, …], int64, on the logits' device. The random numbers are drawn on the generator's device, so that one
        CPU generator gives all ranks and devices the same."""

    @abstractmethod
    def score(self, drawn: Tensor) -> Tensor:
        """∇ log P(drawn) with respect to the logits, float64 [S, *logits.shape], for draws [S, …]. Its mean over draws is 0."""

    @abstractmethod
    def extract(self) -> Tensor:
        """The configuration to use after the search, without randomness: one draw, without the first dimension."""


class SoftmaxDistribution(Distribution):
    """A distribution whose logits [K] are turned into probabilities of K candidates, for one or more independent choices.

    trials  number of choices that share the logits
    """

    trials: int

    @property
    def probabilities(self) -> Tensor:
        """p = softmax(logits), float64 [K], without gradient."""
        return self.logits.detach().double().softmax(-1)

    @abstractmethod
    def pure(self) -> Tensor:
        """The K draws [K, …] in which every choice falls on the same candidate."""


class FilterCounts(SoftmaxDistribution):
    """n ~ Multinomial(F, softmax(logits)): how many of a layer's F filters get each candidate. A draw is [S, K], int64, with sum F.

    logits   [K]
    filters  F
    """

    def __init__(self, logits: Tensor, filters: int) -> None:
        if logits.dim() != 1 or not logits.is_floating_point() or logits.numel() == 0:
            raise InputError(f"FilterCounts: logits must be a floating-point vector [K], got {logits.dtype} {tuple(logits.shape)}")
        if filters < 1:
            raise InputError(f"FilterCounts: expected at least one filter, got {filters}")
        self.logits, self.trials = logits, filters

    @property
    def filters(self) -> int:
        return self.trials

    @torch.no_grad()
    def sample(self, samples: int, generator: torch.Generator | None = None) -> Tensor:
        return counts_of(draw(self.probabilities, (samples, self.filters), generator), self.logits.numel())

    @torch.no_grad()
    def score(self, drawn: Tensor) -> Tensor:
        """n − F p."""
        return drawn.double() - self.filters * self.probabilities

    @torch.no_grad()
    def pure(self) -> Tensor:
        k = self.logits.numel()
        return self.filters * torch.eye(k, dtype=torch.int64, device=self.logits.device)

    @torch.no_grad()
    def extract(self) -> Tensor:
        """The paper's counts [K]: n_k = floor(p_k F), and the whole remainder (up to K − 1 filters) to the last candidate.

        A product that is within 1e-6 F of the next integer counts as that integer: p comes from float32 logits.
        """
        counts = self._shares().floor().long()
        counts[-1] += self.filters - counts.sum()
        return counts

    @torch.no_grad()
    def extract_largest(self) -> Tensor:
        """Ours: n_k = floor(p_k F), and the remainder one by one to the candidates with the largest fractional parts, the first of
        equals."""
        share = self._shares()
        counts = share.floor().long()
        rank = (share - counts).argsort(descending=True, stable=True).argsort()
        return counts + (rank < self.filters - counts.sum())

    def _shares(self) -> Tensor:
        """p F, raised by what rounding may have taken."""
        return self.filters * self.probabilities + min(1e-6 * self.filters, 0.5 / self.logits.numel())


def draw(p: Tensor, shape: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
    """Independent candidates with probabilities p [K]: int64 of the given shape, on p's device. No wait for the device."""
    device = None if generator is None else generator.device
    uniform = torch.rand(shape, generator=generator, device=device, dtype=torch.float64).to(p.device, non_blocking=True)
    return torch.searchsorted(p.double().cumsum(-1)[:-1].contiguous(), uniform, right=True)


def counts_of(choice: Tensor, candidates: int) -> Tensor:
    """How often each candidate occurs: int64 [..., K] for choices [..., F]."""
    counts = torch.zeros(*choice.shape[:-1], candidates, dtype=torch.int64, device=choice.device)
    return counts.scatter_add_(-1, choice, torch.ones_like(choice))


@torch.no_grad()
def assign(counts: Tensor, order: Tensor | None = None, ranking: Tensor | None = None) -> Tensor:
    """Which candidate every filter gets: int64 [..., F] for counts [..., K].

    order    None: the first n_0 filters get candidate 0, the next n_1 candidate 1, … (Zur et al.). Ours: [F], the filters from least to
             most sensitive; they get the candidates in this order
    ranking  [K], the candidates from cheapest to most expensive, if they are not listed so
    """
    candidates = counts.size(-1)
    if ranking is not None and ranking.shape != (candidates,):
        raise InputError(f"assign: ranking must hold the {candidates} candidates, got shape {tuple(ranking.shape)}")
    if order is None:
        filters = int(counts.reshape(-1, candidates)[0].sum())
    elif order.dim() == 1:
        filters = order.numel()
    else:
        raise InputError(f"assign: order must be a vector of filters [F], got shape {tuple(order.shape)}")
    ranked = counts if ranking is None else counts[..., ranking]
    ends = ranked.cumsum(-1).contiguous()
    places = torch.arange(filters, device=counts.device).expand(*counts.shape[:-1], filters).contiguous()
    found = torch.searchsorted(ends, places, right=True)
    if ranking is not None:
        found = ranking[found]
    return found if order is None else torch.empty_like(found).scatter_(-1, order.expand_as(found), found)


class Freezer:
    """Ends the search of a layer whose choice is clear: a candidate with probability above `limit` in `steps` updates in a row gets the
    logit 1000 and all others 0, so that its probability is exactly 1.

    The rule stands in the original program, but was not used there.
    """

    def __init__(self, limit: float = 0.8, steps: int = 10) -> None:
        if not 0.5 <= limit < 1:
            raise InputError(f"freeze limit: expected a probability in [0.5, 1), got {limit}")
        if steps < 1:
            raise InputError(f"freeze steps: expected at least 1, got {steps}")
        self.limit, self.steps = limit, steps
        self._counters: list[Tensor] = []

    @torch.no_grad()
    def update(self, logits: Sequence[Tensor]) -> None:
        """Count, and freeze in place, after a step of the logits. Nothing is read back from the device."""
        if not self._counters:
            self._counters = [torch.zeros_like(t, dtype=torch.int64) for t in logits]
        if [c.shape for c in self._counters] != [t.shape for t in logits]:
            raise InputError(f"Freezer: counts {len(self._counters)} distributions, got logits of {len(logits)} or of other shapes")
        for i, t in enumerate(logits):
            counter = self._counters[i].to(t.device)
            self._counters[i] = counter = torch.where(t.double().softmax(-1) > self.limit, counter + 1, 0)
            full = counter >= self.steps
            t.copy_(torch.where(full.any(-1, keepdim=True), FROZEN_LOGIT * full, t))

    @property
    def frozen(self) -> list[bool]:
        """Which distributions are frozen, read back from the device; empty before the first update."""
        return [bool((counter >= self.steps).any()) for counter in self._counters]

    def state_dict(self) -> dict[str, Any]:
        return {"limit": self.limit, "steps": self.steps, "counters": list(self._counters)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if (state["limit"], state["steps"]) != (self.limit, self.steps):
            was = f"limit={state['limit']}, steps={state['steps']}"
            raise CheckpointError(f"freeze rule: the state was made with {was}, this search has limit={self.limit}, steps={self.steps}")
        self._counters = list(state["counters"])

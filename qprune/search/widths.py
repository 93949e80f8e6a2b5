"""What a search over widths draws from: how many filters every layer of a slim network keeps.

Zur et al. (1904.09872), the pruning search. Their program has four distributions, of which the two over ratios stop with an error.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from qprune.errors import InputError
from qprune.nn.slimtrace import SlimStructure
from qprune.search.distributions import Distribution, FilterCounts


class RatioChoice(FilterCounts):
    """One ratio for one layer: softmax over K. A draw is one-hot, int64 [S, K]."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__(logits, 1)

    @torch.no_grad()
    def extract(self) -> Tensor:
        """The likeliest; the first of equals."""
        return F.one_hot(self.probabilities.argmax(), self.logits.numel())


class RatioCounts(FilterCounts):
    """How many of a network's layers have each of K ratios: multinomial counts [S, K]."""

    @torch.no_grad()
    def extract(self) -> Tensor:
        """floor(p_k · layers), and the remainder to the smallest ratio, the first."""
        counts = (self.trials * self.probabilities + 1e-6).floor().long()
        counts[0] += self.trials - counts.sum()
        return counts


class BinomialWidths(Distribution):
    """w = 1 + Binomial(C − 1, σ(α)) independently for every one of some layers that share α. A draw is [S, layers], int64, 1 … C.

    logits   [1], α
    filters  C
    layers   that share α
    """

    def __init__(self, logits: Tensor, filters: int, layers: int = 1) -> None:
        if logits.shape != (1,) or not logits.is_floating_point():
            raise InputError(f"BinomialWidths: logits must be one floating-point number [1], got {logits.dtype} {tuple(logits.shape)}")
        if filters < 1 or layers < 1:
            raise InputError(f"BinomialWidths: expected at least one filter and one layer, got {filters} and {layers}")
        self.logits, self.filters, self.layers = logits, filters, layers

    @property
    def mean(self) -> Tensor:
        """1 + (C − 1) σ(α), float64 [1]."""
        return 1 + (self.filters - 1) * self.logits.detach().double().sigmoid()

    @torch.no_grad()
    def sample(self, samples: int, generator: torch.Generator | None = None) -> Tensor:
        shape = (samples, self.layers, self.filters - 1)
        device = None if generator is None else generator.device
        uniform = torch.rand(shape, generator=generator, device=device, dtype=torch.float64).to(self.logits.device)
        return 1 + (uniform < self.logits.double().sigmoid()).sum(-1)

    @torch.no_grad()
    def score(self, drawn: Tensor) -> Tensor:
        """Σ over layers of w − (1 + (C − 1) σ(α)), [S, 1]."""
        return (drawn.double() - self.mean).sum(-1, keepdim=True)

    @torch.no_grad()
    def extract(self) -> Tensor:
        """The mean, rounded, for every layer."""
        return self.mean.round().long().expand(self.layers).clone()

    def log_probabilities(self) -> Tensor:
        """log P(w) for w = 1 … C, float64 [C]."""
        n = self.filters - 1
        k, alpha = torch.arange(self.filters, dtype=torch.float64, device=self.logits.device), self.logits.detach().double()
        choose = torch.lgamma(torch.tensor(n + 1.0, dtype=torch.float64)) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
        return choose + k * F.logsigmoid(alpha) + (n - k) * F.logsigmoid(-alpha)


class NetworkWidths(ABC):
    """The joint distribution of the widths of a network's L layers, made of independent parts with logits of their own, all 0 at first.

    A state is what the fit to a budget (see qprune.search.fitting) moves through: integers that stand for widths.

    parts  the distributions that learn
    """

    name: ClassVar[str]
    parts: list[Distribution]

    def __init__(self, structure: SlimStructure, ratios: Sequence[float], device: torch.device | None = None) -> None:
        self.structure, self.device = structure, device
        self.ratios = tuple(sorted(ratios))
        # [L, K]: the widths of the homogeneous networks
        self.table = torch.stack([structure.vector(structure.homogeneous(r)) for r in self.ratios], 1).to(device)

    def new_logits(self, size: int) -> Tensor:
        return torch.zeros(size, device=self.device, requires_grad=True)

    @abstractmethod
    def widths(self, draws: Sequence[Tensor]) -> Tensor:
        """Draws of every part [S, …] → widths [S, L], in the order of the structure's layers."""

    @abstractmethod
    def state(self, draws: Sequence[Tensor]) -> Tensor:
        """Draws of every part [S, …] → states [S, D]."""

    @abstractmethod
    def widths_of(self, states: Tensor) -> Tensor:
        """States [n, D] → widths [n, L]."""

    @abstractmethod
    def log_likelihood(self, states: Tensor) -> Tensor:
        """Float64 [n] for states [n, D]."""

    @abstractmethod
    def neighbours(self, state: Tensor) -> Tensor:
        """States [n, D] one move away from [D]. The narrowest state can be reached from every one by moves that make it cheaper."""

    @abstractmethod
    def narrowest(self) -> Tensor:
        """The cheapest state [D]."""

    def extract(self) -> Tensor:
        """The state [D] to use after the search if there is no budget."""
        return self.state([part.extract().unsqueeze(0) for part in self.parts])[0]


class IndependentWidths(NetworkWidths):
    """Every layer chooses among widths of its own, independently once the logits are given. A state is an index per layer."""

    candidates: list[Tensor]

    @abstractmethod
    def log_probabilities(self) -> list[Tensor]:
        """Per layer, of each of its candidates, float64."""

    def widths(self, draws: Sequence[Tensor]) -> Tensor:
        return self.widths_of(self.state(draws))

    def widths_of(self, states: Tensor) -> Tensor:
        return torch.stack([c[i] for c, i in zip(self.candidates, states.unbind(-1), strict=True)], -1)

    def log_likelihood(self, states: Tensor) -> Tensor:
        columns = zip(self.log_probabilities(), states.unbind(-1), strict=True)
        return torch.stack([table[i] for table, i in columns]).sum(0)

    def narrowest(self) -> Tensor:
        return torch.zeros(len(self.candidates), dtype=torch.int64, device=self.device)

    def neighbours(self, state: Tensor) -> Tensor:
        """Any other width of one layer, or one and the same of all layers that an identity shortcut adds up: a step of one such layer alone
        may cost more than it saves, in shortcuts."""
        position = {name: i for i, name in enumerate(self.structure.names)}
        singles = [(name,) for name in self.structure.names]
        moves = []
        for group in dict.fromkeys([*singles, *self.structure.streams()]):
            columns = [position[name] for name in group]
            count = min(len(self.candidates[i]) for i in columns)
            moved = state.repeat(count, 1)
            moved[:, columns] = torch.arange(count, device=self.device).unsqueeze(1)
            moves.append(moved[(moved != state).any(1)])
        return torch.cat(moves)


class CategoricalWidths(IndependentWidths):
    """A softmax over K ratios per layer."""

    name = "categorical"

    def __init__(self, structure: SlimStructure, ratios: Sequence[float], device: torch.device | None = None) -> None:
        super().__init__(structure, ratios, device)
        self.parts = [RatioChoice(self.new_logits(len(self.ratios))) for _ in structure.names]
        self.candidates = list(self.table)

    def state(self, draws: Sequence[Tensor]) -> Tensor:
        return torch.stack([drawn.argmax(-1) for drawn in draws], -1)

    def log_probabilities(self) -> list[Tensor]:
        return [part.logits.detach().double().log_softmax(-1) for part in self.parts]


class BinomialLayers(IndependentWidths):
    """One α per layer."""

    name = "binomial"

    def __init__(self, structure: SlimStructure, ratios: Sequence[float], device: torch.device | None = None) -> None:
        super().__init__(structure, ratios, device)
        self.groups = self.sharing()
        self.binomials = [BinomialWidths(self.new_logits(1), structure.filters[group[0]], len(group)) for group in self.groups]
        self.parts = list(self.binomials)
        self.candidates = [torch.arange(1, filters + 1, device=device) for filters in structure.filters]

    def sharing(self) -> list[list[int]]:
        """The layers (by number) of every α."""
        return [[i] for i in range(len(self.structure.names))]

    def state(self, draws: Sequence[Tensor]) -> Tensor:
        placed = torch.empty(len(draws[0]), len(self.candidates), dtype=torch.int64, device=self.device)
        for group, drawn in zip(self.groups, draws, strict=True):
            placed[:, group] = drawn - 1
        return placed

    def log_probabilities(self) -> list[Tensor]:
        per_layer: dict[int, Tensor] = {}
        for group, binomial in zip(self.groups, self.binomials, strict=True):
            per_layer |= dict.fromkeys(group, binomial.log_probabilities())
        return [per_layer[i] for i in range(len(self.candidates))]


class BlockBinomial(BinomialLayers):
    """One α for all layers that have the same number of filters at full width: one per stage."""

    name = "block-binomial"

    def sharing(self) -> list[list[int]]:
        filters = self.structure.filters
        return [[i for i, f in enumerate(filters) if f == width] for width in dict.fromkeys(filters)]


class MultinomialWidths(NetworkWidths):
    """One softmax over K ratios for the whole network, counts of layers, and layers in their order: the first n_0 get the smallest ratio,
    the next n_1 the second, … A state is the counts [K].

    As the original does it, early layers are always the narrow ones.
    """

    name = "multinomial"

    def __init__(self, structure: SlimStructure, ratios: Sequence[float], device: torch.device | None = None) -> None:
        super().__init__(structure, ratios, device)
        self.counts = RatioCounts(self.new_logits(len(self.ratios)), len(structure.names))
        self.parts = [self.counts]

    def state(self, draws: Sequence[Tensor]) -> Tensor:
        return draws[0]

    def widths(self, draws: Sequence[Tensor]) -> Tensor:
        return self.widths_of(draws[0])

    def widths_of(self, states: Tensor) -> Tensor:
        layers = torch.arange(len(self.table), device=self.device).expand(len(states), -1).contiguous()
        index = torch.searchsorted(states.cumsum(-1), layers, right=True)
        return self.table[layers, index]

    def log_likelihood(self, states: Tensor) -> Tensor:
        n = states.double()
        choose = torch.lgamma(n.sum(-1) + 1) - torch.lgamma(n + 1).sum(-1)
        return choose + (n * self.counts.logits.detach().double().log_softmax(-1)).sum(-1)

    def narrowest(self) -> Tensor:
        counts = torch.zeros(len(self.ratios), dtype=torch.int64, device=self.device)
        counts[0] = len(self.table)
        return counts

    def neighbours(self, state: Tensor) -> Tensor:
        """Any number of layers from one ratio to another, and the narrowest state."""
        moves = [self.narrowest()]
        for i, available in enumerate(state.tolist()):
            for j in range(len(self.ratios)):
                for moved in range(1, available + 1) if i != j else ():
                    new = state.clone()
                    new[i] -= moved
                    new[j] += moved
                    moves.append(new)
        return torch.stack(moves)


WIDTHS: dict[str, type[NetworkWidths]] = {kind.name: kind for kind in (CategoricalWidths, MultinomialWidths, BinomialLayers, BlockBinomial)}

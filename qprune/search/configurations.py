"""Drawn configurations of a model of units as the problem that gradient estimators are given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from qprune.accumulation import in_parts, mean_of_parts
from qprune.errors import InputError
from qprune.gates import FilterGate
from qprune.nn.filterwise import FilterConv2d
from qprune.nn.stacked import losses as stacked_losses
from qprune.search.distributions import FilterCounts, assign
from qprune.search.extraction import ranking
from qprune.search.unitcost import UnitCost
from qprune.wrappers import unwrap

Penalty = Callable[[Tensor], Tensor]
"""Cost of configurations [S, fields] → what it adds to their losses [S]."""


class Configurations:
    """The distributions of a model's units, and what a draw from them means for the filters.

    costs          of the model
    distributions  one per unit that is searched, in the order of `units`: counts of its filters, or of its one common choice
    order          unit → filters from least to most sensitive; units that are not named assign candidates in index order
    """

    def __init__(self, model: nn.Module, costs: UnitCost) -> None:
        self.model, self.costs = model, costs
        self.units: dict[str, FilterConv2d] = {}
        self.gates: list[FilterGate] = []
        for name, unit in costs.units.items():
            if isinstance(unit, FilterConv2d) and isinstance(unit.gate, FilterGate):
                self.units[name] = unit
                self.gates.append(unit.gate)
        if not self.units:
            raise InputError("every unit has one candidate only: there is nothing to search; give the space several pairs")
        self.distributions = [FilterCounts(gate.logits, 1 if gate.together else gate.filters) for gate in self.gates]
        self.order: dict[str, Tensor] = {}
        self._ranking = {name: ranking(bits.weight, bits.out) for name, bits in costs.bits.items()}
        filters = {name: costs.geometry.layers[name].filters for name in costs.units if name not in self.units}
        self._only = {name: torch.zeros(1, f, dtype=torch.int64, device=costs.device) for name, f in filters.items()}

    def choices(self, draws: Sequence[Tensor]) -> dict[str, Tensor]:
        """Every searched unit's candidates [S, F] for draws [S, K]."""
        found = {}
        for name, gate, counts in zip(self.units, self.gates, draws, strict=True):
            if gate.together:
                found[name] = counts.argmax(-1, keepdim=True).expand(-1, gate.filters)
            else:
                order = self.order.get(name)
                found[name] = assign(counts, order, None if order is None else self._ranking[name])
        return found

    def sample(self, samples: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Every searched unit's candidates [S, F] in S random configurations."""
        return self.choices([d.sample(samples, generator) for d in self.distributions])

    def likely(self) -> dict[str, Tensor]:
        """The paper's configuration of the present logits, [1, F] per searched unit."""
        return self.choices([_extracted(d).unsqueeze(0) for d in self.distributions])

    @torch.no_grad()
    def use(self, choices: Mapping[str, Tensor], number: int = 0) -> None:
        """Let the model compute configuration `number`."""
        for name, gate in zip(self.units, self.gates, strict=True):
            gate.choice.copy_(choices[name][number])

    def cost(self, choices: Mapping[str, Tensor]) -> Tensor:
        """The exact cost [S, fields]."""
        return self.costs({**choices, **self._only})


class OnBatch:
    """The losses of configurations on one mini-batch: a `Problem` for estimators.

    closure     (model, *batch) → loss
    statistics  normalisation in configurations that are evaluated: by each one's own "batch", or by "running" statistics
    penalty     added to the loss of each configuration, from its exact cost
    parts       of the batch: losses and gradients are means over them
    seen        task losses of the configurations evaluated so far, without the penalty
    """

    def __init__(
        self,
        configurations: Configurations,
        closure: Callable[..., Tensor],
        batch: Sequence[Tensor] = (),
        statistics: str = "batch",
        penalty: Penalty | None = None,
        parts: int = 1,
    ) -> None:
        self.configurations, self.closure, self.batch = configurations, closure, batch
        self.statistics, self.penalty, self.parts = statistics, penalty, parts
        self.seen: list[Tensor] = []

    @property
    def distributions(self) -> Sequence[FilterCounts]:
        return self.configurations.distributions

    def losses(self, draws: Sequence[Tensor]) -> Tensor:
        """Float64 [S], without gradients: all configurations evaluated together, everything quantized."""
        choices = self.configurations.choices(draws)
        task = mean_losses(self.configurations.model, choices, self.closure, self.batch, self.statistics, self.parts)
        self.seen.append(task)
        return task if self.penalty is None else task + self.penalty(self.configurations.cost(choices))

    def relaxed(self, p: Sequence[Tensor], hard: bool) -> Tensor:
        """The loss at mixing coefficients p[l] [F, K] in place of choices, differentiable with respect to them."""
        gates = self.configurations.gates
        before = [gate.mode for gate in gates]
        # parts share the way from p to the logits: each adds its gradient up to here
        own = [t.detach().requires_grad_() for t in p]
        rows = [t.expand(gate.filters, -1) for gate, t in zip(gates, own, strict=True)]
        total = [torch.zeros_like(t) for t in own]

        def add(loss: Tensor) -> None:
            torch._foreach_add_(total, list(torch.autograd.grad(loss, own, allow_unused=True, materialize_grads=True)))

        handles = [gate.register_forward_hook(_returning(t)) for gate, t in zip(gates, rows, strict=True)]
        try:
            for gate in gates:
                gate.mode = "sampled" if hard else "relaxed"
            model = unwrap(self.configurations.model)
            loss = in_parts(model, lambda *batch: self.closure(model, *batch), self.batch, self.parts, add)
            add(loss)
        finally:
            for gate, mode, handle in zip(gates, before, handles, strict=True):
                gate.mode = mode
                handle.remove()
        loss = loss.detach()
        self.seen.append(loss.double().reshape(1))
        return torch.stack([(t * g).sum() - (t.detach() * g).sum() for t, g in zip(p, total, strict=True)]).sum() + loss


def mean_losses(
    model: nn.Module, choices: Mapping[str, Tensor], closure: Callable[..., Tensor], batch: Sequence[Tensor], statistics: str, parts: int
) -> Tensor:
    """As qprune.nn.stacked.losses, from the parts of the batch; "batch" statistics are those of each part."""
    return mean_of_parts(model, lambda *part: stacked_losses(model, choices, closure, part, statistics).double(), batch, parts)


def _returning(value: Tensor) -> Callable[..., Tensor]:
    return lambda *_: value


def _extracted(distribution: FilterCounts) -> Tensor:
    """Counts [K]; of a single choice the likeliest candidate, where the paper's rounding would always take the last."""
    if distribution.filters > 1:
        return distribution.extract()
    return torch.nn.functional.one_hot(distribution.logits.detach().argmax(), distribution.logits.numel())

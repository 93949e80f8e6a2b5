"""From the logits of units to counts, from counts to filters, from filters to a policy.

A layer's logits parameterise the distribution of the counts n of its F filters, n ~ Multinomial(F, p) (Zur et al., 1904.09872). `extract`
is the paper's reading of it: floor(p_k F) filters for candidate k, the remainder to the last candidate, in index order, whatever it costs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from qprune.errors import InputError
from qprune.gates import Gate
from qprune.policy import LayerBits, Policy
from qprune.record import record_of
from qprune.search.distributions import FilterCounts, assign
from qprune.search.unitcost import UnitCost
from qprune.wrappers import unwrap

LIKELIHOODS = ("counts", "filters")


@dataclass(frozen=True)
class CountsTable:
    """What one unit chooses from.

    log_p   [K]
    rows    independent choices: F filters, or 1 where all filters of the layer share one
    order   filters from least to most sensitive; None: by index
    """

    name: str
    log_p: np.ndarray
    rows: int
    filters: int
    weight: np.ndarray
    out: np.ndarray
    order: Tensor | None
    likelihood: str

    @property
    def candidates(self) -> int:
        return len(self.log_p)

    def likeliest(self, price: np.ndarray | None = None) -> np.ndarray:
        """Counts [K] of the highest score minus price · counts."""
        log_p = self.log_p if price is None else self.log_p - price
        if self.likelihood == "filters" or self.rows == 1:
            return np.eye(self.candidates, dtype=np.int64)[log_p.argmax()] * self.rows
        p = np.exp(log_p - log_p.max())
        counts = np.floor(self.rows * p / p.sum()).astype(np.int64)  # never above the mode's counts
        for _ in range(self.rows - int(counts.sum())):
            counts[(log_p - np.log1p(counts)).argmax()] += 1
        return counts

    def score(self, counts: np.ndarray) -> float:
        """log P(counts); for likelihood "filters" that of one assignment of the filters, without the number of ways."""
        ways = 0.0
        if self.likelihood == "counts":
            factorials = np.concatenate([[0.0], np.log(np.arange(1, self.rows + 1)).cumsum()])
            ways = float(factorials[-1] - factorials[counts].sum())
        return ways + float((counts * self.log_p).sum())

    def moves(self, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All moves of one row between candidates [M, (from, to)], and the score each gains [M]."""
        pairs = np.array([(i, j) for i in range(self.candidates) for j in range(self.candidates) if i != j and counts[i] > 0])
        if not len(pairs):
            return np.zeros((0, 2), dtype=np.int64), np.zeros(0)
        i, j = pairs.T
        gain = self.log_p[j] - self.log_p[i]
        if self.likelihood == "counts":
            gain = gain + np.log(counts[i]) - np.log1p(counts[j])
        return pairs, gain

    def choice(self, counts: np.ndarray) -> Tensor:
        """The filters' candidates [..., F] for counts [..., K]: the more sensitive a filter, the more bits; or in index order."""
        drawn = torch.from_numpy(counts)
        if self.rows == 1:
            return drawn.argmax(-1, keepdim=True).expand(*drawn.shape[:-1], self.filters)
        return assign(drawn, self.order, None if self.order is None else ranking(torch.from_numpy(self.weight), torch.from_numpy(self.out)))


def ranking(weight: Tensor, out: Tensor) -> Tensor:
    """Candidates [K] from few to many bits: by the product of weight and activation bits, then by weight bits."""
    by_weight = weight.argsort(stable=True)
    return by_weight[(weight * out)[by_weight].argsort(stable=True)]


def floored(table: CountsTable) -> np.ndarray:
    return FilterCounts(torch.from_numpy(table.log_p), table.rows).extract().numpy() if table.rows > 1 else table.likeliest()


def counts_tables(costs: UnitCost, sensitivity: Mapping[str, Tensor] | None = None, likelihood: str = "counts") -> dict[str, CountsTable]:
    """One table per unit, with the present probabilities of its gate.

    sensitivity  [F] per unit name: more sensitive filters get more bits; ties, and units that are not named, by index
    """
    if likelihood not in LIKELIHOODS:
        raise InputError(f"likelihood: expected one of {', '.join(LIKELIHOODS)}, got {likelihood!r}")
    tables = {}
    for name, unit in costs.units.items():
        gate, filters = unit.gate, costs.geometry.layers[name].filters
        logits = gate.logits.detach() if isinstance(gate, Gate) else torch.zeros(1)
        log_p = logits.double().log_softmax(0).cpu().numpy()
        order = None
        if sensitivity is not None and name in sensitivity:
            order = sensitivity[name].detach().double().cpu().argsort(stable=True)
        rows = 1 if getattr(gate, "together", False) else filters
        bits = costs.bits[name]
        tables[name] = CountsTable(name, log_p, rows, filters, bits.weight.numpy(), bits.out.numpy(), order, likelihood)
    return tables


def extract(model: nn.Module, sensitivity: Mapping[str, Tensor] | None = None) -> Policy:
    """The paper's deterministic policy, whatever it costs: floor(p_k F) filters of every layer for candidate k, the remainder to the last.

    sensitivity  as for `allocate_counts`; None: filters in index order, as the paper
    """
    costs = UnitCost(model, (), "product", torch.device("cpu"))
    tables = counts_tables(costs, sensitivity)
    return unit_policy(model, {name: table.choice(floored(table)) for name, table in tables.items()})


def unit_policy(model: nn.Module, choices: Mapping[str, Tensor]) -> Policy:
    """The policy in which every unit's filters have the candidates choices[unit] [F]; other layers keep their fixed bits."""
    inner = unwrap(model)
    record = record_of(model)
    costs = UnitCost(inner, (), "product")
    layers = {name: bits for name, bits in (record.fixed if record is not None else {}).items() if bits is not None}
    for name, unit in costs.units.items():
        pairs = [unit.candidates[k] for k in choices[name].tolist()]
        weight, out = (_uniform(tuple(side)) for side in zip(*pairs, strict=True))
        layers[name] = LayerBits(weight, unit.input_bits, out if unit.produces else None)
    return Policy(layers, costs.geometry)


def _uniform(bits: tuple[int, ...]) -> int | tuple[int, ...]:
    return bits[0] if len(set(bits)) == 1 else bits

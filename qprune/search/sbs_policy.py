"""From gates to a policy within the exact budget: the filters that are closed, and bits for what is left. Ours: the paper reads off the
gates of the last step, whatever that costs.

Bits are chosen by `allocate` on the network without the pruned filters. A layer's candidate k scores the logarithm of the chance that
every gate up to it is open and the next one closed, where gate j is open with probability σ((E_j − α_j) / e_j): E_j the residual that
candidate j − 1 leaves, e_j = 1 / (4 (2^b − 1)) the residual of uniform values on its grid. If even the narrowest bits cost too much, more
groups of filters are pruned, those first whose importance is least above its threshold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from qprune.budget import MEASURES, Budget
from qprune.conventions import CONVENTIONS
from qprune.cost import evaluate, geometry_of, policy_choices
from qprune.errors import InfeasibleBudgetError
from qprune.geometry import Geometry
from qprune.inputs import kept_inputs
from qprune.nn.bitgates import BitGate
from qprune.nn.nested import NestedLayer, Pruning
from qprune.policy import LayerBits, Policy
from qprune.record import Record, attach, record_of
from qprune.search.allocate import LayerScores, allocate
from qprune.space import PRUNED
from qprune.wrappers import unwrap

Kept = Mapping[str, np.ndarray]
"""Layer → whether each of its filters is kept, for layers that may lose some."""


@dataclass
class GatedChain:
    """Layers whose filters one gate prunes."""

    producers: list[str]
    pruning: Pruning

    def kept(self, groups: np.ndarray) -> np.ndarray:
        """Per filter, from open groups."""
        members = self.pruning.gate.members.cpu().numpy()
        return np.asarray(members @ groups > 0)


def nested_layers(model: nn.Module) -> dict[str, NestedLayer]:
    return {name: layer for name, layer in unwrap(model).named_modules() if isinstance(layer, NestedLayer)}


def gated_chains(model: nn.Module) -> list[GatedChain]:
    """The chains of a nested model, in module order."""
    chains: dict[int, GatedChain] = {}
    for name, layer in nested_layers(model).items():
        if layer.pruned_out is not None:
            chains.setdefault(id(layer.pruned_out.gate), GatedChain([], layer.pruned_out)).producers.append(name)
    return list(chains.values())


def gate_probabilities(gate: BitGate, bits: tuple[int, ...]) -> Tensor:
    """σ of every gate's margin, relative to the residual of uniform values, [K − 1] float64. bits: of the K candidates."""
    uniform = torch.tensor([0.25 / (2**b - 1) for b in bits[:-1]], dtype=torch.float64)
    return (gate.margins().double().cpu() / uniform).sigmoid()


def candidate_scores(gate: nn.Module, bits: tuple[int, ...], widest: bool) -> np.ndarray:
    """The score of every candidate of one tensor, [K]. widest: only the last one is allowed."""
    if not isinstance(gate, BitGate):
        return np.zeros(1)
    if widest:
        return np.array([-np.inf] * (len(bits) - 1) + [0.0])
    p = gate_probabilities(gate, bits).clamp(1e-12, 1 - 1e-12)
    opened = torch.cat([torch.zeros(1, dtype=torch.float64), p.log().cumsum(0)])
    closed = torch.cat([(1 - p).log(), torch.zeros(1, dtype=torch.float64)])
    return np.asarray((opened + closed).numpy())


def layer_scores(model: nn.Module, widest: bool) -> dict[str, LayerScores]:
    """For `allocate`: of all nested layers but those that `prepare` fixed, over the candidates that are not 0 bits."""
    record, scores = record_of(model), {}
    for name, layer in nested_layers(model).items():
        if record is None or name not in record.fixed:
            widths = tuple(layer.weight_quantizer.widths)
            weight = candidate_scores(layer.weight_gate.bits, widths, widest)
            inputs = candidate_scores(layer.input_gate, layer.space.a_bits, widest)
            scores[name] = LayerScores(replace(layer.space, w_bits=widths), weight[None], inputs)
    return scores


def remaining(geometry: Geometry, kept: Kept) -> Geometry:
    """The geometry without the pruned filters and the channels that they made."""
    gone = {name: torch.from_numpy(~rows).double() for name, rows in kept.items()}
    there = kept_inputs(geometry, gone)
    layers = {}
    for name, layer in geometry.layers.items():
        filters = int(kept[name].sum()) if name in kept else layer.filters
        if layer.depthwise:
            layers[name] = replace(layer, filters=filters, groups=filters) if name in kept else layer
        else:
            inputs = round(float(there[name].sum())) // layer.groups if name in there else layer.inputs
            layers[name] = replace(layer, filters=filters, inputs=inputs)
    return Geometry(layers)


class Allocation:
    """A policy for a nested model within limits (name of a Cost's field → number).

    widest  bits are not chosen: every layer has its widest (a search of filters alone)
    """

    def __init__(self, model: nn.Module, limits: Mapping[str, float], convention: str, widest: bool = False) -> None:
        self.model, self.limits, self.convention = model, dict(limits), convention
        self.geometry, self.chains = geometry_of(model), gated_chains(model)
        self.scores = layer_scores(model, widest)
        record = record_of(model)
        self.fixed = {} if record is None else dict(record.fixed)
        with torch.no_grad():
            self.open = [((chain.pruning() @ chain.pruning.gate.members) > 0).cpu().numpy() for chain in self.chains]
            self.margins = [chain.pruning.gate.margins(chain.pruning.weight).cpu().numpy() for chain in self.chains]

    def kept(self) -> dict[str, np.ndarray]:
        return {name: chain.kept(groups) for chain, groups in zip(self.chains, self.open, strict=True) for name in chain.producers}

    def cheapest(self) -> dict[str, float]:
        """The least that the network costs with the filters that are open, by name of limit."""
        left = remaining(self.geometry, self.kept())
        least = {}
        for name, scores in self.scores.items():
            first = [int(np.isfinite(values).argmax()) for values in (scores.weight[0], scores.input)]
            least[name] = LayerBits(scores.space.w_bits[first[0]], scores.space.a_bits[first[1]])
        layers = {name: bits for name, bits in {**self.fixed, **least}.items() if bits is not None}
        found = evaluate(left, policy_choices(left, Policy(layers)), CONVENTIONS[self.convention])
        return {name: float(getattr(found, name)) for name in self.limits}

    def fit(self) -> None:
        """Close more groups until the narrowest bits fit, or no more may close."""
        options = [
            (margins[g], i, g)
            for i, (chain, margins, groups) in enumerate(zip(self.chains, self.margins, self.open, strict=True))
            for g in np.argsort(margins, kind="stable")[: chain.pruning.gate.closable]
            if groups[g]
        ]
        room = [chain.pruning.gate.closable - int((~groups).sum()) for chain, groups in zip(self.chains, self.open, strict=True)]
        for _, i, g in sorted(options):
            if all(value <= self.limits[name] for name, value in self.cheapest().items()):
                return
            if room[i] > 0:
                room[i] -= 1
                self.open[i][g] = False

    def check(self) -> None:
        """Raise InfeasibleBudgetError if no policy fits. Changes nothing."""
        before = [groups.copy() for groups in self.open]
        self.fit()
        least, self.open = self.cheapest(), before
        worst = max(least, key=lambda name: least[name] / max(self.limits[name], 1e-300))
        if least[worst] > self.limits[worst]:
            raise InfeasibleBudgetError(
                f"no policy meets the budget: {worst} is limited to {self.limits[worst]:.6g}, the cheapest policy needs "
                f"{least[worst]:.6g}; raise the budget, add narrower bits, or let more filters be pruned",
                least[worst],
                self.limits[worst],
            )

    def policy(self) -> Policy:
        """The policy. Raises InfeasibleBudgetError if none fits."""
        self.check()
        self.fit()
        kept = self.kept()
        shell = nn.Module()
        attach(shell, Record(remaining(self.geometry, kept), self.fixed))
        names = {field: measure for measure, field in MEASURES.items()}
        budget = Budget(**{names[field]: limit for field, limit in self.limits.items()})
        chosen = allocate(shell, budget, self.scores, self.convention, spend=True).layers
        layers = {name: _with_pruned(bits, kept.get(name)) for name, bits in chosen.items()}
        return Policy({name: layers[name] for name in self.geometry.layers if name in layers}, self.geometry)


def _with_pruned(bits: LayerBits, kept: np.ndarray | None) -> LayerBits:
    if kept is None or kept.all():
        return bits
    assert isinstance(bits.w_bits, int)
    return LayerBits(tuple(bits.w_bits if there else PRUNED for there in kept), bits.a_bits)

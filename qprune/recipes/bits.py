"""What a run does with a network where bits are chosen."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from qprune.budget import Budget
from qprune.conventions import CONVENTIONS
from qprune.convert import convert
from qprune.cost import evaluate, geometry_of, policy_choices
from qprune.geometry import Geometry, weighted_layers
from qprune.options import RunOptions
from qprune.policy import LayerBits, Policy
from qprune.prepare import Rules, calibrate, prepare
from qprune.record import Record, record_of
from qprune.search.driver import METHODS, Search
from qprune.space import SearchSpace

BASELINE_BITS = range(1, 9)


class BitRecipe:
    """Methods that choose bits; the first and the last layer are at `edge_bits`."""

    def __init__(self, options: RunOptions, example: Tensor) -> None:
        self.options, self.example, self.space = options, example, options.space()

    def rules(self, net: nn.Module) -> Rules:
        names = [name for name, layer in weighted_layers(net) if isinstance(layer, nn.Conv2d | nn.Linear)]
        edge = SearchSpace.fixed(self.options.edge_bits, self.options.edge_bits)
        return {names[0]: edge, names[-1]: edge}

    def check(self, net: nn.Module) -> None:
        prepared = prepare(net, self.space, self.rules(net), self.example)
        METHODS[self.options.method].check(prepared, Budget.parse(self.options.budget), self.options.convention)

    def prepare(self, net: nn.Module, batches: Sequence[Tensor]) -> nn.Module:
        return self._prepared(net, self.space, batches)

    def _prepared(self, net: nn.Module, space: SearchSpace, batches: Sequence[Tensor]) -> nn.Module:
        return calibrate(prepare(net, space, self.rules(net), self.example), batches)

    def finish(self, search: Search, policy: Policy, batches: Sequence[Tensor]) -> nn.Module:
        return convert(search.model, policy)

    def uniform(self, net: nn.Module, search: Search, batches: Sequence[Tensor]) -> tuple[str, nn.Module]:
        record = record_of(search.model)
        w, a = uniform_above(geometry_of(search.model), record.fixed if record else {}, search.limits, self.options.convention)
        return f"uniform w{w}a{a}", self.at_bits(net, w, a, batches)

    def at_bits(self, net: nn.Module, w: int, a: int, batches: Sequence[Tensor]) -> nn.Module:
        """The network with these bits in every layer that would be searched."""
        mixed = self._prepared(net, replace(self.space, w_bits=(w,), a_bits=(a,), pairs=((w, a),)), batches)
        only = record_of(mixed)
        assert only is not None and only.geometry is not None
        return convert(mixed, Policy({name: bits for name, bits in only.fixed.items() if bits is not None}, only.geometry))

    def outline(self, net: nn.Module) -> Record:
        """The network's geometry, and the bits of the layers that are not searched."""
        record = record_of(prepare(net, self.space, self.rules(net), self.example))
        assert record is not None
        return record


def uniform_above(
    geometry: Geometry, fixed: Mapping[str, LayerBits | None], limits: Mapping[str, float], convention: str = "product"
) -> tuple[int, int]:
    """The bits (w, a) of the cheapest uniform network that costs at least the limits, in every measure; 8 and 8 if all cost less.

    Of equally cheap ones the one whose w and a are closest.
    """
    found = []
    for w, a in itertools.product(BASELINE_BITS, BASELINE_BITS):
        cost = evaluate(geometry, policy_choices(geometry, Policy.uniform(geometry, w, a, fixed)), CONVENTIONS[convention])
        ratios = [float(getattr(cost, name)) / limit for name, limit in limits.items()]
        if min(ratios) >= 1 - 1e-12:
            found.append((max(ratios), abs(w - a), w, a))
    return min(found)[2:] if found else (BASELINE_BITS[-1], BASELINE_BITS[-1])

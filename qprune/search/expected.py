"""The expected cost of a model that is being searched, in a few operations for all layers: what `qprune.cost` gives, without its rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from qprune.conventions import CONVENTIONS
from qprune.cost import Choice, cost, evaluate, geometry_of, layer_cost, model_choices
from qprune.gates import probabilities
from qprune.geometry import Geometry
from qprune.nn.mixing import Mixing
from qprune.space import PRUNED
from qprune.wrappers import unwrap

FIELDS = ("bops", "macs", "size_bits")


class Expected(NamedTuple):
    """Expected bit operations, multiplications and bits of weights: float64 scalars with gradients to the gates."""

    bops: Tensor
    macs: Tensor
    size_bits: Tensor


class _Family(nn.Module):
    """Searched layers with the same numbers of candidates. unit_<field> [L, K] or [L, K_w, K_a]: the cost of one filter's choice."""

    def __init__(self, layers: dict[str, Mixing], geometry: Geometry, convention: str) -> None:
        super().__init__()
        self.layers = list(layers.values())
        units: dict[str, list[Tensor]] = {field: [] for field in FIELDS}
        for name, layer in layers.items():
            for field, table in _units(name, layer, geometry, convention).items():
                units[field].append(table)
        for field, tables in units.items():
            self.register_buffer(f"unit_{field}", torch.stack(tables).to(self.layers[0].weight.device), persistent=False)

    def forward(self) -> list[Tensor]:
        """The fields, summed over the layers. The cost of a layer is linear in how many filters choose what."""
        p = probabilities([layer.weight_gate for layer in self.layers])
        filters = [rows.double().sum(0) * (layer.weight.size(0) // rows.size(0)) for rows, layer in zip(p, self.layers, strict=True)]
        mass = torch.stack(filters)
        gates = [layer.input_gate for layer in self.layers if layer.input_gate is not None]
        if gates:
            mass = mass.unsqueeze(2) * torch.cat(probabilities(gates)).double().unsqueeze(1)
        return [(mass * self.get_buffer(f"unit_{field}")).sum() for field in FIELDS]


def _units(name: str, layer: Mixing, geometry: Geometry, convention: str) -> dict[str, Tensor]:
    """The cost of one filter per candidate pair, or per (weight, activation) candidate: [K] or [K_w, K_a] for each field."""
    space = layer.space
    candidates = space.candidates if space.joint else [(w, a) for w in space.w_bits for a in space.a_bits]
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    rows = [layer_cost(geometry.layers[name], Choice((w,), (a,), one), None, CONVENTIONS[convention]) for w, a in candidates]
    filters = geometry.layers[name].filters
    tables = {field: torch.stack([getattr(row, field) for row in rows]) / filters for field in FIELDS}
    return tables if space.joint else {field: t.view(len(space.w_bits), -1) for field, t in tables.items()}


class ExpectedCost:
    """Call it for the present expected cost. Where filters can be pruned the cost is not linear in the choices: there it is `cost` itself.

    model       a prepared model whose geometry is known
    convention  as for `cost`
    """

    def __init__(self, model: nn.Module, convention: str) -> None:
        self.model, self.convention = unwrap(model), convention
        geometry = geometry_of(self.model)
        mixed = {name: m for name, m in self.model.named_modules() if isinstance(m, Mixing) and name in geometry.layers}
        self.linear = not any(PRUNED in layer.space.w_bits for layer in mixed.values())
        if not self.linear:
            return
        alike: dict[tuple[bool, int, int], dict[str, Mixing]] = {}
        for name, layer in mixed.items():
            space = layer.space
            size = (len(space.candidates), 0) if space.joint else (len(space.w_bits), len(space.a_bits))
            alike.setdefault((space.joint, *size), {})[name] = layer
        self.families = [_Family(layers, geometry, convention) for layers in alike.values()]
        rest = Geometry({name: layer for name, layer in geometry.layers.items() if name not in mixed})
        choices = {name: choice for name, choice in model_choices(self.model).items() if name in rest.layers}
        device = next(self.model.parameters()).device
        known = evaluate(rest, choices, CONVENTIONS[convention]) if rest.layers else None
        self.rest = [torch.zeros((), dtype=torch.float64) if known is None else getattr(known, field) for field in FIELDS]
        self.rest = [value.detach().to(device) for value in self.rest]

    def __call__(self) -> Expected:
        if not self.linear:
            full = cost(self.model, convention=self.convention)
            return Expected(full.bops, full.macs, full.size_bits)
        sums = [family() for family in self.families]
        return Expected(*(torch.stack([*column, rest]).sum() for *column, rest in zip(*sums, self.rest, strict=True)))

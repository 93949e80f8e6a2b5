"""The exact cost of many configurations of units at once: what `qprune.cost` gives for a policy, in a few tensor operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qprune.conventions import CONVENTIONS, Inputs
from qprune.cost import Choice, evaluate, geometry_of, model_choices
from qprune.errors import InputError
from qprune.geometry import LayerGeometry, Unit
from qprune.nn.filterwise import FilterConv2d
from qprune.nn.mixing import Mixing
from qprune.space import FLOAT
from qprune.wrappers import unwrap

LIMITS = ("bops", "macs", "size_bits")


@dataclass(frozen=True)
class _Bits:
    """Bits of a unit's candidates: of the weight, and of the activation that a filter produces, float64 [K]."""

    weight: Tensor
    out: Tensor


class UnitCost:
    """The cost of configurations in which every filter of every unit has a candidate.

    model       prepared with placement="output"
    fields      names of fields of a Cost
    convention  as for `qprune.cost`
    device      where choices and costs are; the model's, if not given

    A layer's cost depends on its own filters' weight bits and on its input channels' bits, which its source (see geometry.Unit) produces.
    sources  the source of every layer that has one     readers  the layers whose source a unit is

    Raises InputError for a model without units, or with other layers that are being searched.
    """

    def __init__(self, model: nn.Module, fields: Sequence[str], convention: str, device: torch.device | None = None) -> None:
        inner = unwrap(model)
        self.geometry, self.fields, self.convention = geometry_of(inner), tuple(fields), CONVENTIONS[convention]
        modules = dict(inner.named_modules())
        self.units = {name: m for name in self.geometry.layers if isinstance(m := modules.get(name), FilterConv2d)}
        if not self.units:
            raise InputError(
                "the model has no layer whose activation is quantized where it is produced; "
                "prepare it with SearchSpace(pairs=…, placement='output') and example_inputs"
            )
        for name, layer in inner.named_modules():
            if isinstance(layer, Mixing) and not layer.space.is_fixed:
                raise InputError(
                    f"layer {name}: it is searched apart from the units (placement='input'); "
                    "give it a rule with one candidate, like SearchSpace.fixed(8, 8), or None"
                )
        self.device = next(iter(self.units.values())).weight.device if device is None else device
        self.bits = {name: self._candidate_bits(unit) for name, unit in self.units.items()}
        fixed = {name: choice for name, choice in model_choices(inner, self.geometry.units).items() if name not in self.units}
        self._fixed_bits: dict[str, Tensor] = {}
        self.sources: dict[str, str] = {}
        self.readers: dict[str, list[str]] = {name: [] for name in self.units}
        for name in self.geometry.layers:
            source = self.geometry.units.get(name, Unit()).source
            if source in self.units and self.units[source].produces and self._reads(name, fixed.get(name)):
                self.sources[name] = source
                self.readers[source].append(name)
                if name not in self.units:
                    self._fixed_bits[name] = self._weight_bits(name, fixed.get(name))
        rows = evaluate(self.geometry, fixed, self.convention).rows
        rest = [row for row in rows if row.name not in self.units and row.name not in self.sources]
        constant = [sum(float(getattr(row, field)) for row in rest) for field in self.fields]
        self.rest = torch.tensor(constant, dtype=torch.float64, device=self.device)

    def _candidate_bits(self, unit: FilterConv2d) -> _Bits:
        weight, out = torch.tensor(unit.candidates, dtype=torch.float64, device=self.device).unbind(1)
        return _Bits(weight.contiguous(), out.contiguous())

    def _reads(self, name: str, choice: Choice | None) -> bool:
        """Whether the layer takes its input as it comes."""
        if name in self.units:
            return self.units[name].input_bits == FLOAT
        return choice is None or choice.a_bits == (FLOAT,)

    def _weight_bits(self, name: str, choice: Choice | None) -> Tensor:
        """[1, F] of a layer whose bits are fixed."""
        filters = self.geometry.layers[name].filters
        if choice is None:
            return torch.full((1, filters), float(FLOAT), dtype=torch.float64, device=self.device)
        bits = torch.tensor(choice.w_bits, dtype=torch.float64, device=self.device)
        return (choice.p.detach().sum(2).double().to(self.device) @ bits).expand(filters).unsqueeze(0)

    def layer(self, name: str, weight: Tensor | None = None, inputs: Tensor | None = None) -> Tensor:
        """[S, fields]: the cost of one layer.

        weight  bits of its filters [S or 1, F]; None for a layer whose bits are fixed
        inputs  bits of the filters of its source [S or 1, F_source]; None for a layer that quantizes its own input
        """
        layer = self.geometry.layers[name]
        w = self._fixed_bits[name] if weight is None else weight
        a = self._input_bits(layer, self.units[name].input_bits if name in self.units else FLOAT, inputs)
        w, a = w.view(w.size(0), layer.groups, -1), a.view(a.size(0), layer.groups, -1)
        channels = torch.full((1, 1, 1), float(layer.inputs), dtype=torch.float64, device=w.device)
        summed = Inputs(channels, a.sum(2, keepdim=True), (2.0**a - 1).sum(2, keepdim=True))
        found = []
        for field in self.fields:
            if field == "bops":
                value = layer.positions * torch.where(w > 0, self.convention(layer, w, summed), 0.0).sum((1, 2))
            elif field == "size_bits":
                value = layer.kernel * layer.inputs * w.sum((1, 2))
            else:
                value = layer.positions * layer.kernel * layer.inputs * (w > 0).double().sum((1, 2))
            found.append(value.expand(max(w.size(0), a.size(0))))
        return torch.stack(found, 1)

    def _input_bits(self, layer: LayerGeometry, own: int, inputs: Tensor | None) -> Tensor:
        if inputs is None:
            return torch.full((1, layer.channels), float(own), dtype=torch.float64, device=self.device)
        return inputs.repeat_interleave(layer.channels // inputs.size(1), 1)

    def of(self, name: str, choices: Mapping[str, Tensor]) -> Tensor:
        """[S, fields]: the cost of one layer, the units having the candidates choices[unit] [S or 1, F]."""
        weight = self.bits[name].weight[choices[name]] if name in self.units else None
        source = self.sources.get(name)
        return self.layer(name, weight, None if source is None else self.bits[source].out[choices[source]])

    def __call__(self, choices: Mapping[str, Tensor]) -> Tensor:
        """[S, fields]: the cost of the network for candidates choices[unit] [S or 1, F] of all units."""
        names = [name for name in self.geometry.layers if name in self.units or name in self.sources]
        total = self.rest.unsqueeze(0)
        for name in names:
            total = total + self.of(name, choices)
        return total

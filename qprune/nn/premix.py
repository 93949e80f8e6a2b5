"""The weights of a whole network mixed at once: a few operations and one fused call per forward pass, not a dozen for every layer."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from qprune.gates import probabilities
from qprune.kernels import mix_quantize_many
from qprune.nn.mixing import Mixing, Ready
from qprune.quantizers import learned_ranges, spread
from qprune.wrappers import unwrap

_Column = tuple[float, float, int, int]


def _columns(layer: Mixing) -> tuple[_Column, ...]:
    """(n, z, pass_through, output group) of every column of the layer's p."""
    q = layer.weight_quantizer
    groups = layer.pair_groups if layer.space.joint else [0] * len(q.bits)
    picks = layer.picks if layer.space.joint else range(len(q.bits))
    return tuple((q.steps[k], q.zero_point[k], q.pass_through[k], group) for k, group in zip(picks, groups, strict=True))


class _Family:
    """Layers whose weights one call can mix: the same candidates, or a part of them (fixed layers), in the same arithmetic."""

    def __init__(self, first: Mixing) -> None:
        self.layers, self.columns = [first], _columns(first)
        self.picks = first.picks if first.space.joint else None
        self.zero: Tensor | None = None

    def accepts(self, layer: Mixing) -> bool:
        weight, mine = layer.weight, self.layers[0].weight
        if weight.device != mine.device or (weight.dtype == torch.float64) != (mine.dtype == torch.float64):
            return False
        if self.picks is not None or layer.space.joint:
            return layer.space.joint and layer.picks == self.picks and _columns(layer) == self.columns
        return set(_columns(layer)) <= set(self.columns)

    def _block(self, value: Tensor, layer: Mixing, fill: float) -> Tensor:
        """A layer's [1 or F, K'] as the family's [F, K]."""
        value = value.expand(layer.weight.size(0), -1)
        if value.size(1) == len(self.columns) or self.picks is not None:
            return value
        absent = value.new_full((value.size(0), 1), fill)
        mine = _columns(layer)
        return torch.cat([value[:, mine.index(c) : mine.index(c) + 1] if c in mine else absent for c in self.columns], dim=1)

    def mix(self, p: Sequence[Tensor], ranges: Sequence[Tensor]) -> list[Tensor]:
        """The mixed weight of every layer, from p and r of each."""
        weights = [layer.weight for layer in self.layers]
        r = torch.cat([self._block(t, layer, 1.0) for t, layer in zip(ranges, self.layers, strict=True)])
        r = r if self.picks is None else spread(r, self.picks)
        mixed = torch.cat([self._block(t, layer, 0.0) for t, layer in zip(p, self.layers, strict=True)])
        dtype = torch.float64 if weights[0].dtype == torch.float64 else torch.float32
        if self.zero is None or self.zero.shape != r.shape or self.zero.device != r.device or self.zero.dtype != dtype:
            self.zero = torch.zeros(r.shape, dtype=dtype, device=r.device)
        steps, zero_point, through, groups = (list(column) for column in zip(*self.columns, strict=True))
        return mix_quantize_many(weights, self.zero, r.to(dtype), mixed.to(dtype), steps, zero_point, groups, through)


class Premix:
    """While it is entered, every forward pass of the model begins by mixing the weights of all its mixed layers together.

    `Search` enters it around every step. In a loop of your own: `with Premix(model): loss = criterion(model(x), y)`. The results are those
    of the layers alone; a model that is being compiled, or whose weights are quantized in stages, mixes layer by layer.
    """

    def __init__(self, model: nn.Module) -> None:
        self.root = unwrap(model)
        self.layers = [module for module in self.root.modules() if isinstance(module, Mixing) and module.premixed]
        self.families: list[_Family] = []
        for layer in sorted(self.layers, key=lambda layer: -len(_columns(layer))):
            home = next((family for family in self.families if family.accepts(layer)), None)
            if home is None:
                self.families.append(_Family(layer))
            else:
                home.layers.append(layer)
        self.hook: Any = None

    def __enter__(self) -> Premix:
        if len(self.layers) > 1:
            self.hook = self.root.register_forward_pre_hook(self._begin)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.hook is not None:
            self.hook.remove()
            self.hook = None
        for layer in self.layers:
            layer.__dict__.pop("ready", None)

    def _begin(self, root: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling() or any(layer.weight_quantizer.active_stage != "quantized" for layer in self.layers):
            return
        for layer, ready in self.ready().items():
            layer.__dict__["ready"] = ready

    def ready(self) -> dict[Mixing, Ready]:
        """What every mixed layer needs besides its input."""
        p = dict(zip(self.layers, probabilities([layer.weight_gate for layer in self.layers]), strict=True))
        input_gates = {layer: layer.input_gate for layer in self.layers if layer.input_gate is not None}
        input_p = dict(zip(input_gates, probabilities(list(input_gates.values())), strict=True))
        quantizers = [layer.input_quantizer for layer in self.layers]
        input_ranges = dict(zip(self.layers, learned_ranges(quantizers), strict=True))
        learned = dict(zip(self.layers, learned_ranges([layer.weight_quantizer for layer in self.layers]), strict=True))
        found: dict[Mixing, Ready] = {}
        for family in self.families:
            ranges = [layer.weight_quantizer.ranges(layer.weight, learned[layer]) for layer in family.layers]
            for layer, weight in zip(family.layers, family.mix([p[layer] for layer in family.layers], ranges), strict=True):
                found[layer] = Ready(weight, p[layer], input_p.get(layer), input_ranges[layer])
        return found

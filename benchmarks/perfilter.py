"""Baseline: every filter computed on its own, as Zur et al. (1904.09872) do it, for NICE quantizers.

A filter has one convolution, one normalisation and one activation quantizer per candidate; a layer's output is the concatenation of its
filters'. In training the weights of all candidates are quantized in every forward pass, whichever the filter uses.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qprune.gates import FilterGate
from qprune.nn.filterwise import FilterConv2d
from qprune.nn.surgery import copy_model, replace_modules
from qprune.nn.unitparts import FilterActivation, FilterBatchNorm2d
from qprune.space import FLOAT


def quantized_weight(weight: Tensor, clip: float, bits: int) -> Tensor:
    """NICE: 2^bits − 1 levels between −clip and clip, gradient straight through for all entries."""
    if bits == FLOAT:
        return weight
    step = clip / (2 ** (bits - 1) - 1)
    return weight + (step * torch.round(weight.clamp(-clip, clip) / step) - weight).detach()


def quantized_activation(x: Tensor, clip: float, bits: int) -> Tensor:
    """NICE: the rectified and clipped x rounded to 2^bits levels, gradient 1 for 0 < x ≤ clip."""
    if bits == FLOAT:
        return F.relu(x)
    clipped = F.relu(x) - F.relu(x - clip)
    scale = (2**bits - 1) / clip
    return clipped + (torch.round(clipped * scale) / scale - clipped).detach()


class PerFilterConv2d(nn.Module):
    """weights[k · F + f]: candidate k of filter f. choice: F candidates."""

    def __init__(self, layer: FilterConv2d) -> None:
        super().__init__()
        self.settings = (layer.stride, layer.padding, layer.dilation)
        self.filters, self.groups, self.inputs = layer.out_channels, layer.groups, layer.in_channels // layer.groups
        self.bits = [w for w, _ in layer.candidates]
        rows = [weight[f : f + 1].detach().clone() for weight in layer.each_weight() for f in range(self.filters)]
        self.weights = nn.ParameterList(nn.Parameter(row) for row in rows)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())
        self.clip = layer.weight_quantizer.learned_range().double().flatten()[0].item() / 2
        self.input_quantizer = layer.input_quantizer
        self.choice = [0] * self.filters

    def forward(self, x: Tensor) -> Tensor:
        if self.input_quantizer is not None:
            x = self.input_quantizer(x, torch.ones(1, device=x.device))
        return torch.cat([self._filter(x, f) for f in range(self.filters)], 1)

    def _filter(self, x: Tensor, f: int) -> Tensor:
        chosen = self.choice[f]
        used = range(len(self.bits)) if self.training else [chosen]
        quantized = {k: quantized_weight(self.weights[k * self.filters + f], self.clip, self.bits[k]) for k in used}
        first = f // (self.filters // self.groups) * self.inputs
        part = x if self.groups == 1 else x[:, first : first + self.inputs]
        return F.conv2d(part, quantized[chosen], None if self.bias is None else self.bias[f : f + 1], *self.settings)


class PerFilterNorm(nn.Module):
    """norms[k · F + f]; with statistics shared between candidates, norms[f]."""

    def __init__(self, norm: FilterBatchNorm2d, candidates: int) -> None:
        super().__init__()
        self.filters, self.own = norm.num_features, norm.own
        self.norms = nn.ModuleList()
        for row in range(self.filters * (candidates if self.own else 1)):
            single = nn.BatchNorm2d(1, norm.eps, norm.momentum, dtype=norm.weight.dtype, device=norm.weight.device)
            for name, value in single.state_dict().items():
                if value.dim():
                    value.copy_(
                        norm.get_parameter(name).flatten()[row] if name in norm._parameters else norm.get_buffer(name).flatten()[row]
                    )
            self.norms.append(single)
        self.choice = [0] * self.filters

    def forward(self, x: Tensor) -> Tensor:
        rows = [k * self.filters + f if self.own else f for f, k in enumerate(self.choice)]
        return torch.cat([self.norms[row](x[:, f : f + 1]) for f, row in enumerate(rows)], 1)


class PerFilterActivation(nn.Module):
    def __init__(self, activation: FilterActivation) -> None:
        super().__init__()
        self.bits, self.limit = activation.quantizer.bits, activation.limit
        clips = activation.quantizer.learned_range().double().flatten().tolist()
        self.clips = clips if len(clips) > 1 else clips * len(self.bits)
        self.choice: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.limit is None else x.clamp(max=self.limit)
        return torch.cat([quantized_activation(x[:, f : f + 1], self.clips[k], self.bits[k]) for f, k in enumerate(self.choice)], 1)


def per_filter(model: nn.Module) -> nn.Module:
    """A copy of a prepared model in which every filter of every unit is computed on its own, by its gate's choice."""
    twin = copy_model(model)
    units = {unit.gate: unit for unit in twin.modules() if isinstance(unit, FilterConv2d)}
    swaps: dict[nn.Module, nn.Module] = {}
    for module in twin.modules():
        if isinstance(module, FilterConv2d):
            swaps[module] = PerFilterConv2d(module)
        elif isinstance(module, FilterBatchNorm2d):
            swaps[module] = PerFilterNorm(module, len(units[module.gate].candidates))
        elif isinstance(module, FilterActivation):
            swaps[module] = PerFilterActivation(module)
    for old, new in swaps.items():
        gate = old.gate
        new.train(old.training)
        new.choice = gate.choice.tolist() if isinstance(gate, FilterGate) else [0] * units[gate].out_channels
    return replace_modules(twin, swaps)


def set_choices(twin: nn.Module, choices: Mapping[str, list[int]]) -> None:
    """Give modules of `per_filter`'s result, by name, the candidates of their filters."""
    for name, choice in choices.items():
        twin.get_submodule(name).choice = choice

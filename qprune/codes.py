"""Fixed bits as integers: the codes and grids of layers that `convert` made. What files, runtimes and integer hardware hold."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qprune.errors import UnsupportedLayerError
from qprune.nn.activation import QuantActivation
from qprune.nn.quantizing import Quantizing
from qprune.quantizers import InputQuantizer, StoredWeightQuantizer, WeightQuantizer
from qprune.space import FLOAT, PRUNED

_WHOLE = 1e-3
"""How far an offset may be from a whole number of steps and still count as one: float32 rounding, never a learned offset's distance."""


@dataclass(frozen=True)
class WeightCodes:
    """A weight [F, …] on the grids of its filters: filter f has the values (levels[f] − zero_point[f]) · scale[f].

    levels      [F, …] int32, 0 … steps[f]; 0 for filters of 0 and 32 bits
    bits        per filter, 0 … 8 or 32. A level needs so many bits
    steps       [F] int32: the highest level; 0 for filters of 0 and 32 bits
    zero_point  [F] float32, a multiple of 1/2; 1/2 itself for grids without a level at zero ("dorefa", and one bit)
    scale       [F] float32; 0 for filters of 0 and 32 bits
    floats      [F, …] float32: the weight of filters of 32 bits, 0 elsewhere; None if there are none
    kept        bool, broadcasts with the weight, or None: where False the weight is zero, whatever its level, also on a grid without zero
    """

    levels: Tensor
    bits: tuple[int, ...]
    steps: Tensor
    zero_point: Tensor
    scale: Tensor
    floats: Tensor | None = None
    kept: Tensor | None = None

    def values(self) -> Tensor:
        """The quantized weight, float32: what the layer computes with."""
        value = self._there((self.levels - self._column(self.zero_point)) * self._column(self.scale))
        return value if self.floats is None else value + self.floats

    def signed(self) -> tuple[Tensor, Tensor]:
        """(codes [F, …] int32, scale [F]) with value = codes · scale: levels − zero_point, twice that where zero_point is no integer.

        Codes then need one bit more than the filter has.
        """
        doubled = 1.0 + (self.zero_point % 1 != 0)
        codes = (self.levels - self._column(self.zero_point)) * self._column(doubled)
        return self._there(torch.where(self._column(self.steps) > 0, codes, 0.0)).to(torch.int32), self.scale / doubled

    def _there(self, values: Tensor) -> Tensor:
        return values if self.kept is None else values * self.kept

    def _column(self, value: Tensor) -> Tensor:
        return value.view(-1, *[1] * (self.levels.dim() - 1))


@torch.no_grad()
def weight_codes(layer: Quantizing) -> WeightCodes:
    """The codes of a QuantConv2d or QuantLinear, on its weight's device, read from the quantized weight itself: they are those that the
    layer computes with, whatever the backend. Raises UnsupportedLayerError for "uniq" weights, whose levels are not equidistant, and for a
    weight with NaN."""
    quantizer = layer.weight_quantizer
    if not isinstance(quantizer, WeightQuantizer):
        raise UnsupportedLayerError(
            f"layer {layer.layer_name}: {quantizer.kind!r} weights have no integer codes: their levels are not equidistant"
        )
    weight = layer.weight.detach().float()
    quantized = quantizer(weight, layer.one_hot).detach()
    if quantized.isnan().any():
        raise UnsupportedLayerError(f"layer {layer.layer_name}: its weight is NaN; codes cannot say so")
    column = layer.one_hot.argmax(1)
    quantizes = torch.tensor([b not in (PRUNED, FLOAT) for b in quantizer.bits], device=weight.device)[column]
    steps, zero_point = (torch.tensor(v, device=weight.device)[column] for v in (quantizer.steps, quantizer.zero_point))
    steps, zero_point = torch.where(quantizes, steps, 0.0), torch.where(quantizes, zero_point, 0.0)
    if isinstance(quantizer, StoredWeightQuantizer):
        scale = quantizer.scale
    else:
        r = quantizer.ranges(weight).expand(len(weight), -1).gather(1, column.unsqueeze(1)).squeeze(1)
        scale = torch.where(quantizes, r / steps.clamp_min(1), 0.0)
    shape = (-1, *[1] * (weight.dim() - 1))
    levels = (quantized / torch.where(quantizes, scale, 1.0).view(shape) + zero_point.view(shape)).round()
    levels = torch.where(quantizes.view(shape), levels, 0.0).to(torch.int32)
    floats = torch.where(quantizes.view(shape), 0.0, quantized) if FLOAT in layer.w_bits else None
    return WeightCodes(levels, layer.w_bits, steps.to(torch.int32), zero_point, scale, floats, quantizer.kept)


@dataclass(frozen=True)
class InputCodes:
    """An activation on its grid: level q of 0 … steps has the value offset + q · scale.

    bits        0 … 8; 0: the input is zero
    steps       2^bits − 1
    zero_point  the level of the value 0 where the grid has one: 0, or 2^(bits − 1) for a signed input; None if it has not (one signed bit,
                and learned offsets)
    """

    bits: int
    steps: int
    scale: float
    offset: float
    zero_point: int | None

    @property
    def signed(self) -> bool:
        return self.offset < 0

    def levels(self, x: Tensor) -> Tensor:
        """q for x of any shape, float32, rounded half to even as the layer does it."""
        if not self.steps:
            return torch.zeros_like(x, dtype=torch.float32)
        return torch.round(((x.float() - self.offset) * (1.0 / (self.scale * self.steps))).clamp(0, 1) * self.steps)


@torch.no_grad()
def input_codes(layer: Quantizing) -> InputCodes | None:
    """The grid of the input of a QuantConv2d or QuantLinear; None where the input stays as it is (32 bits)."""
    return None if layer.a_bits == FLOAT else grid_of(layer.input_quantizer)


@torch.no_grad()
def grid_of(quantizer: InputQuantizer) -> InputCodes:
    """The grid of an input quantizer with one candidate, at most 8 bits."""
    (bits,), steps = quantizer.bits, quantizer.steps[0]
    if bits == PRUNED:
        return InputCodes(PRUNED, 0, 0.0, 0.0, 0)
    r = quantizer.learned_range()
    scale, offset = float(r / steps), float(quantizer.offsets(r))
    whole = round(-offset / scale)
    on_grid = abs(-offset / scale - whole) < _WHOLE and 0 <= whole <= steps and quantizer.kind == "pact"
    return InputCodes(bits, int(steps), scale, offset, whole if on_grid else None)


@dataclass(frozen=True)
class OutputCodes:
    """An activation that is quantized where it is produced: level q of 0 … steps[c] of channel c has the value q · scale[c].

    bits          per channel, or one for all; 1 … 8, or 32: the rectifier alone
    steps, scale  [C] or [1], float32; 0 where bits is 32
    limit         of the rectifier (6 for nn.ReLU6), or None
    """

    bits: tuple[int, ...]
    steps: Tensor
    scale: Tensor
    limit: float | None


@torch.no_grad()
def output_codes(activation: QuantActivation, name: str = "") -> OutputCodes:
    """The grid of a QuantActivation. Raises UnsupportedLayerError for "uniq", whose levels are not equidistant."""
    quantizer = activation.quantizer
    if quantizer.kind == "uniq":
        raise UnsupportedLayerError(f"layer {name}: 'uniq' activations have no integer codes: their levels are not equidistant")
    column = activation.one_hot.argmax(1)
    per_channel = activation.channel_bits
    bits = (per_channel,) if isinstance(per_channel, int) else per_channel
    of_bits = [0.0 if b == FLOAT else n for b, n in zip(quantizer.bits, quantizer.steps, strict=True)]
    steps = torch.tensor(of_bits, device=column.device)[column]
    r = quantizer.learned_range().expand(1, len(quantizer.bits))[0, column]
    return OutputCodes(bits, steps, torch.where(steps > 0, r / steps.clamp_min(1), 0.0), activation.limit)

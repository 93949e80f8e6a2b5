"""A quantized layer in whole numbers: integer codes of weight and input, int32 accumulators, one factor per filter at the end.

    y[f] = s_x · s_w[f] · Σ x̂ ŵ  +  β · s_w[f] · Σ ŵ  +  bias[f]

x̂ are the input's codes and ŵ the weight's; a grid whose zero lies between two levels has codes of twice the distance, so that they are
integers. β is 0 where the input's grid has a level at zero, else the learned offset: the second sum, over what is not padding, depends on
the weight and the shape alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qprune.codes import InputCodes, WeightCodes, output_codes
from qprune.errors import UnsupportedLayerError
from qprune.nn.activation import QuantActivation
from qprune.space import FLOAT

INT32 = 32


@dataclass(frozen=True)
class InputGrid:
    """Codes x̂ = doubled · level − shift, integers; a code has the value scale · x̂ + offset.

    low, high  of the codes
    """

    scale: float
    offset: float
    doubled: int
    shift: int
    low: int
    high: int

    @classmethod
    def of(cls, codes: InputCodes) -> InputGrid:
        if codes.zero_point is not None:
            return cls(codes.scale, 0.0, 1, codes.zero_point, -codes.zero_point, codes.steps - codes.zero_point)
        if codes.steps == 1 and codes.offset == -codes.scale / 2:  # one signed bit: ± half a step
            return cls(codes.scale / 2, 0.0, 2, 1, -1, 1)
        return cls(codes.scale, codes.offset, 1, 0, 0, codes.steps)

    def codes(self, levels: Tensor) -> Tensor:
        return (self.doubled * levels - self.shift).to(torch.int32)


@dataclass(frozen=True)
class Accumulator:
    """What the sums of a layer can be: from `low` to `high` for any input on its grid, partial sums in any order included."""

    low: int
    high: int

    @property
    def bits(self) -> int:
        """Of the smallest two's-complement integer that holds them."""
        return signed_bits(self.low, self.high)


def signed_bits(low: int, high: int) -> int:
    """Bits of the smallest two's-complement integer that holds low … high."""
    return max((-low - 1).bit_length() if low < 0 else 0, high.bit_length() if high > 0 else 0) + 1


def bound(weight: Tensor, grid: InputGrid) -> Accumulator:
    """Of the sums of a layer whose codes are weight [F, …]. Nothing summed yet, and padding, are 0."""
    if not weight.numel():
        return Accumulator(0, 0)
    flat = weight.flatten(1).long()
    up, down = flat.clamp_min(0).sum(1), flat.clamp_max(0).sum(1)
    x_low, x_high = min(grid.low, 0), max(grid.high, 1 if grid.offset else 0)  # an offset needs the sums of codes alone too
    return Accumulator(int((up * x_low + down * x_high).min()), int((up * x_high + down * x_low).max()))


class IntegerLayer:
    """The integer form of a convolution or linear layer.

    layer    its stride, padding, padding mode and groups; its bias
    weight   codes; filters of 32 bits have none, and what is made here for them means nothing: `float` [F] tells which
    grid     of the input
    """

    def __init__(self, layer: nn.Conv2d | nn.Linear, weight: WeightCodes, grid: InputGrid) -> None:
        self.layer, self.grid = layer, grid
        self.codes, self.scale = weight.signed()
        self.float = torch.tensor([b == FLOAT for b in weight.bits], device=self.codes.device)
        self.bound = bound(self.codes, grid)
        self.type = torch.int32 if self.bound.bits <= INT32 else torch.int64

    def accumulate(self, codes: Tensor) -> Tensor:
        """Σ x̂ ŵ for codes int32 [N, C, H, W] or [N, C]: int32, or int64 where that may not suffice."""
        return apply(self.layer, codes, self.codes, self.type)

    def rescale(self, sums: Tensor, codes: Tensor) -> Tensor:
        """The output, in float32. codes: those that were summed."""
        column = _column(self.layer, self.scale)
        y = sums.float() * (column * self.grid.scale)
        if self.grid.offset:
            y = y + apply(self.layer, torch.ones_like(codes[:1]), self.codes, self.type).float() * (column * self.grid.offset)
        return y if self.layer.bias is None else y + _column(self.layer, self.layer.bias.detach().float())


def _column(layer: nn.Module, value: Tensor) -> Tensor:
    return value.view(-1, 1, 1) if isinstance(layer, nn.Conv2d) else value


def apply(layer: nn.Conv2d | nn.Linear, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The layer's sums, without bias, for any weight of its shape, in `dtype`. Integers are added as such where PyTorch can: on the CPU,
    and not in dilated convolutions. Elsewhere they are in float64, which is exact below 2^53."""
    dilated = isinstance(layer, nn.Conv2d) and max(layer.dilation) > 1
    arithmetic = dtype if dtype.is_floating_point or (x.device.type == "cpu" and not dilated) else torch.float64
    if isinstance(layer, nn.Linear):
        return F.linear(x.to(arithmetic), weight.to(arithmetic)).to(dtype)
    padding = layer.padding
    if layer.padding_mode != "zeros":
        # PyTorch cannot reflect integers
        x, padding = F.pad(x.double(), layer._reversed_padding_repeated_twice, layer.padding_mode), (0, 0)
    return F.conv2d(x.to(arithmetic), weight.to(arithmetic), None, layer.stride, padding, layer.dilation, layer.groups).to(dtype)


@dataclass(frozen=True)
class Site:
    """A place where values become codes: levels 0 … steps of u = (x − offset) / scale; scale and steps numbers or [C, 1, …]."""

    scale: Any
    steps: Any
    offset: float = 0.0

    def places(self, x: Tensor) -> Tensor:
        return (x - self.offset) / self.scale

    def levels(self, places: Tensor) -> Tensor:
        levels = places.round().clamp_min(0)
        return torch.minimum(levels, self.steps) if isinstance(self.steps, Tensor) else levels.clamp_max(self.steps)


def activation_site(activation: QuantActivation) -> Site | None:
    """Where the activation rounds; None if some of its channels have no equidistant levels."""
    try:
        codes = output_codes(activation)
    except UnsupportedLayerError:
        return None
    if FLOAT in codes.bits:
        return None
    shape = (-1, 1, 1) if len(codes.scale) > 1 else (1,)
    return Site(codes.scale.view(shape), codes.steps.view(shape))


def to_middle(places: Tensor) -> Tensor:
    """Distance to the nearest middle between two levels, in steps."""
    return (places - places.floor() - 0.5).abs()

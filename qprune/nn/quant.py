"""Layers with fixed bits: QuantConv2d, QuantLinear. What `convert` makes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from qprune.nn import integer
from qprune.nn.filterwise import FilterConv2d
from qprune.nn.mixing import Mixing, check_input
from qprune.nn.quantizing import Quantizing
from qprune.nn.surgery import plain, take_over
from qprune.space import QUANTIZER_FIELDS, SearchSpace, split_fields


class QuantConv2d(Quantizing, nn.Conv2d):
    """nn.Conv2d on a quantized weight and a quantized input [N, C, H, W].

    Takes nn.Conv2d's arguments, then w_bits (one int, or one per filter), a_bits, and the quantizers by the
    fields of SearchSpace (weight_quantizer=, input_quantizer=, scales=).
    """

    def __init__(self, *args: Any, w_bits: int | Sequence[int] = 8, a_bits: int = 8, **options: Any) -> None:
        layer, quantizers = split_fields(options, QUANTIZER_FIELDS)
        nn.Conv2d.__init__(self, *args, **layer)
        self.setup_quantizing(w_bits, a_bits, quantizers)

    def forward(self, input: Tensor) -> Tensor:
        check_input(self, input, (3, 4), self.in_channels, -3)
        x = self.gathered(input if input.dim() == 4 else input.unsqueeze(0))
        y = integer.conv2d(self, x)
        if y is None:
            quantized, weight = self.quantize(x)
            y = self._conv_forward(quantized, weight, self.bias)
        y = self.spread_out(y)
        return y if input.dim() == 4 else y.squeeze(0)

    def train(self, mode: bool = True) -> QuantConv2d:
        integer.forget(self)
        return super().train(mode)

    def extra_repr(self) -> str:
        return super().extra_repr() + self.bits_repr()


class QuantLinear(Quantizing, nn.Linear):
    """nn.Linear on a quantized weight and a quantized input [*, in_features]; arguments as QuantConv2d."""

    def __init__(self, *args: Any, w_bits: int | Sequence[int] = 8, a_bits: int = 8, **options: Any) -> None:
        layer, quantizers = split_fields(options, QUANTIZER_FIELDS)
        nn.Linear.__init__(self, *args, **layer)
        self.setup_quantizing(w_bits, a_bits, quantizers)

    def forward(self, input: Tensor) -> Tensor:
        check_input(self, input, tuple(range(1, 9)), self.in_features, -1)
        quantized, weight = self.quantize(self.gathered(input.reshape(-1, self.in_features)))
        return self.spread_out(F.linear(quantized, weight, self.bias)).reshape(*input.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return super().extra_repr() + self.bits_repr()


def fix_bits(layer: nn.Conv2d | nn.Linear, w_bits: int | Sequence[int], a_bits: int, space: SearchSpace) -> QuantConv2d | QuantLinear:
    """The layer with these bits, sharing the weight and bias of `layer`; a searched layer keeps its ranges and quantizers, for a
    plain one they are those of `space`."""
    cls: type[QuantConv2d] | type[QuantLinear] = QuantConv2d if isinstance(layer, nn.Conv2d) else QuantLinear
    searched = layer if isinstance(layer, Mixing | FilterConv2d) else None
    space = space if searched is None else searched.space

    def setup(fixed: QuantConv2d | QuantLinear) -> None:
        fixed.setup_quantizing(w_bits, a_bits, space.quantizers, searched)
        if isinstance(layer, FilterConv2d):
            layer.copy_ranges(fixed.weight_quantizer)

    return take_over(cls, plain(layer), setup)

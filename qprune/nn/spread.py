"""Layers that read and make fewer channels than their surroundings have: Spread, NarrowConv2d, NarrowLinear, ConstantOutput.

Where a channel cannot be removed because something else needs its place (a residual path that others write to, a shape that the network's
own code relies on), the layers at its ends still compute without it: they pick what they read, and put zeros where nothing is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qprune.nn.surgery import take_over


class Spread(nn.Module):
    """y = channels of x in another order or number: channel i of y is channel index[i] of x, or zero where index[i] is the number of x's
    channels.

    channels  of x
    axis      of the channels, counted from the end: -3 for [N, C, H, W], -1 for features
    bias      constants [len(index)] that are added where channels are zero; a parameter, or None
    """

    index: Tensor

    def __init__(
        self, index: Sequence[int], channels: int, axis: int, bias: Tensor | None = None, device: torch.device | None = None
    ) -> None:
        super().__init__()
        self.channels, self.axis, self.width = channels, axis, len(index)
        self.padded = channels in index
        self.register_buffer("index", torch.tensor(list(index), dtype=torch.int64, device=device), persistent=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        if self.padded:
            x = torch.cat([x, torch.zeros_like(x.narrow(self.axis, 0, 1))], self.axis)
        y = x.index_select(self.axis % x.dim(), self.index)
        return y if self.bias is None else y + self.bias.view(-1, *[1] * (-1 - self.axis)).to(y.dtype)

    def extra_repr(self) -> str:
        return f"{self.channels} -> {self.width}"


class ConstantOutput(nn.Module):
    """What a convolution or linear layer without filters or inputs gives: a tensor of its output's shape, zero or one constant per channel.

    width   channels of the output
    window  kernel_size, stride, padding (numbers or "same" or "valid") and dilation of the convolution; None for a linear layer
    bias    [width]; a parameter, or None
    """

    def __init__(self, width: int, window: dict[str, Any] | None, bias: Tensor | None) -> None:
        super().__init__()
        self.width, self.window = width, window
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    @classmethod
    def of(cls, layer: nn.Conv2d | nn.Linear, width: int, bias: Tensor | None) -> ConstantOutput:
        names = ("kernel_size", "stride", "padding", "dilation")
        window = {name: getattr(layer, name) for name in names} if isinstance(layer, nn.Conv2d) else None
        return cls(width, window, bias).train(layer.training)

    def forward(self, input: Tensor) -> Tensor:
        if self.window is None:
            y = input.new_zeros(*input.shape[:-1], self.width)
        else:
            sides = [self._side(input.size(axis), axis) for axis in (-2, -1)]
            y = input.new_zeros(*input.shape[:-3], self.width, *sides)
        return y if self.bias is None else y + self.bias.view(-1, *[1] * (0 if self.window is None else 2)).to(y.dtype)

    def _side(self, size: int, axis: int) -> int:
        assert self.window is not None
        padding = self.window["padding"]
        if padding == "same":
            return size
        around = 0 if padding == "valid" else 2 * padding[axis]
        return (size + around - self.window["dilation"][axis] * (self.window["kernel_size"][axis] - 1) - 1) // self.window["stride"][
            axis
        ] + 1

    def extra_repr(self) -> str:
        return str(self.width)


class Narrow(nn.Module):
    """Mixin of layers that may read some of their input's channels and make some of their output's: gather picks what is read, spread puts
    what is made in place. Either may be None. in_channels and out_channels (in_features, out_features) are those of the surroundings."""

    gather: Spread | None
    spread: Spread | None

    def as_plain(self) -> nn.Module:
        return self

    def surround(self, gather: Spread | None, spread: Spread | None) -> None:
        self.gather, self.spread = gather, spread

    def gathered(self, x: Tensor) -> Tensor:
        return x if self.gather is None else self.gather(x)

    def spread_out(self, y: Tensor) -> Tensor:
        return y if self.spread is None else self.spread(y)


class NarrowConv2d(Narrow, nn.Conv2d):
    """nn.Conv2d between two Spreads. Made by `narrow_plain`."""

    kind = "Conv2d"

    def forward(self, input: Tensor) -> Tensor:
        return self.spread_out(self._conv_forward(self.gathered(input), self.weight, self.bias))


class NarrowLinear(Narrow, nn.Linear):
    """nn.Linear between two Spreads. Made by `narrow_plain`."""

    kind = "Linear"

    def forward(self, input: Tensor) -> Tensor:
        return self.spread_out(nn.functional.linear(self.gathered(input), self.weight, self.bias))


def narrow_plain(layer: nn.Conv2d | nn.Linear, gather: Spread | None, spread: Spread | None) -> nn.Conv2d | nn.Linear:
    """The float layer between two Spreads, sharing its parameters; the layer itself where both are None."""
    if gather is None and spread is None:
        return layer
    cls: type[NarrowConv2d] | type[NarrowLinear] = NarrowConv2d if isinstance(layer, nn.Conv2d) else NarrowLinear
    return take_over(cls, layer, lambda made: made.surround(gather, spread))

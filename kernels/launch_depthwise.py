"""Launch parameters of the depthwise convolution.

A thread owns a strip: a few neighbouring columns of a run of rows, in a few neighbouring channels, of the output (forward pass) or of the
input (backward pass). It walks down its strip, reads every row of the image once, and keeps in registers what later rows need of it, so
that a 3×3 kernel on strips of 4 columns quantizes 6 inputs for 4 outputs instead of 36. Strips of all samples are numbered in one row; a
program takes block_strips of them times strip_channels channels. Images of both memory formats are read in place.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from . import launch
from .launch import Device

Pair = tuple[int, int]


@dataclass(frozen=True)
class Shape:
    """A depthwise convolution as the kernels see it. unit: channels are neighbours in memory; align: largest power of two up to 16 that
    divides the number of channels and, where unit, every stride."""

    batch: int
    channels: int
    size: Pair
    out_size: Pair
    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int
    unit: bool
    align: int

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]


@launch.pinnable
@dataclass(frozen=True)
class DepthwiseTile:
    """Columns and rows of a strip (rows of the output, or that many times the stride of the input), strips and channels per program, warps,
    and taps whose dV one launch sums."""

    strip_width: int
    strip_rows: int
    block_strips: int
    strip_channels: int
    strip_warps: int
    strip_taps: int

    @property
    def vector(self) -> int:
        """Neighbouring channels of a thread."""
        return max(1, min(4, self.strip_channels, self.block_strips * self.strip_channels // (32 * self.strip_warps)))


def _strides(t: Tensor) -> tuple[int, ...]:
    return tuple(stride if size > 1 else 0 for size, stride in zip(t.shape, t.stride(), strict=True))


def describe(x: Tensor, y: Tensor, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, groups: int, *others: Tensor) -> Shape:
    """x [N, C, H, W] the input, y [N, C, OH, OW] the output or its gradient, others like x; all with any strides."""
    channels, images = x.size(1), (x, y, *others)
    unit = channels == 1 or all(t.stride(1) == 1 for t in images)
    widths = [s for t in images for i, s in enumerate(_strides(t)) if i != 1] if unit else []
    size, out_size = ((t.size(2), t.size(3)) for t in (x, y))
    return Shape(
        x.size(0), channels, size, out_size, kernel, stride, padding, dilation, groups, unit, math.gcd(16, channels, *widths)
    )  # fmt: skip


def _grid(shape: Shape, tile: DepthwiseTile, inputs: bool) -> tuple[int, int]:
    """Strips of an image: in a column, and in a row."""
    height = launch._cdiv(shape.size[0], shape.stride[0]) if inputs else shape.out_size[0]
    return launch._cdiv(height, tile.strip_rows), launch._cdiv((shape.size if inputs else shape.out_size)[1], tile.strip_width)


def splits(shape: Shape, tile: DepthwiseTile, inputs: bool) -> int:
    """Programs that share a block of channels."""
    return launch._cdiv(shape.batch * math.prod(_grid(shape, tile, inputs)), tile.block_strips)


def programs(shape: Shape, tile: DepthwiseTile, inputs: bool) -> int:
    """The grid, over strips of inputs or of outputs."""
    return splits(shape, tile, inputs) * launch._cdiv(shape.channels, tile.strip_channels)


def sizes(shape: Shape, tile: DepthwiseTile, inputs: bool) -> dict[str, int]:
    """The run-time sizes: how many strips there are, of inputs or of outputs, and the images they lie in."""
    count, columns = _grid(shape, tile, inputs)
    return {
        "strips": shape.batch * count * columns, "strip_count": count, "strip_columns": columns, "rows": tile.strip_rows,
        "channels": shape.channels, "height": shape.size[0], "width": shape.size[1],
        "out_height": shape.out_size[0], "out_width": shape.out_size[1],
    }  # fmt: skip


def strides(name: str, t: Tensor) -> dict[str, int]:
    """The run-time strides of an image."""
    return dict(zip((f"{name}_sample", f"{name}_channel", f"{name}_row", f"{name}_column"), _strides(t), strict=True))


def constants(shape: Shape, tile: DepthwiseTile) -> dict[str, Any]:
    """The compile-time arguments that both kernels share."""
    names = ("KH", "KW", "SH", "SW", "PH", "PW", "DH", "DW")
    values = (*shape.kernel, *shape.stride, *shape.padding, *shape.dilation)
    return {
        **dict(zip(names, values, strict=True)), "M": shape.groups, "S": tile.strip_width, "BP": tile.block_strips,
        "BC": tile.strip_channels, "EVEN": shape.channels % tile.strip_channels == 0, "ALIGN": shape.align, "UNIT": shape.unit,
    }  # fmt: skip


@dataclass(frozen=True)
class _Option:
    """Neighbouring channels and columns of a thread."""

    vector: int
    width: int


_OPTIONS = (_Option(2, 4), _Option(1, 4), _Option(1, 2))
"""In order of preference. Two channels of four columns keep about five warps per scheduler; four channels would save instructions for
addresses, but leave three."""

MOST_TAPS = 50
"""Taps M·KH·KW that the kernels keep in registers, at most: 3×3 with five groups, 5×5 with two, 7×7 with one."""


def _choose(registers: Callable[[_Option], int], limit: int, vector: int, width: int, multiple: int, device: Device) -> _Option:
    """The first option whose values fit the registers and whose columns waste at most a quarter of the image."""
    if device.interpreted:
        return _Option(1, 2 * multiple)
    options = [replace(o, vector=min(o.vector, vector), width=launch._cdiv(o.width, multiple) * multiple) for o in _OPTIONS]
    fitting = [o for o in options if registers(o) <= limit] or options[-1:]
    return next((o for o in fitting if 4 * launch._cdiv(width, o.width) * o.width <= 5 * width), fitting[-1])


def _tile(shape: Shape, option: _Option, taps: int, inputs: bool, device: Device) -> DepthwiseTile:
    width, vector = option.width, option.vector
    warps, wanted = 4, 12 * device.processors
    threads = 32 * warps
    columns = launch._cdiv((shape.size if inputs else shape.out_size)[1], width) * shape.batch
    rows = launch._cdiv(shape.size[0], shape.stride[0]) if inputs else shape.out_size[0]
    if device.interpreted:
        channels, block = min(64, launch._power(shape.channels)), min(2048, launch._power(columns))
        return DepthwiseTile(width, rows, block, channels, warps, taps)
    channels = min(launch._fit(shape.channels, 8 * vector, 32), launch._power(shape.channels)) if shape.unit else 1
    block = max(1, min(threads * vector // channels, launch._power(columns * launch._cdiv(rows, 8))))
    if not shape.unit:
        channels = min(threads // block, launch._power(shape.channels))
    others = launch._cdiv(columns, block) * launch._cdiv(shape.channels, channels)
    count = max(1, min(launch._cdiv(wanted, others), launch._cdiv(rows, 8)))
    return DepthwiseTile(width, launch._cdiv(rows, count), block, channels, warps, taps)


def _reach(n: int, stride: int, dilation: int, size: int) -> int:
    """Pixels on the other side of the convolution that n neighbours meet, at most."""
    return launch._cdiv(n - 1 + dilation * (size - 1) + 1, stride)


@functools.lru_cache(maxsize=4096)
def _forward(shape: Shape, device: Device) -> DepthwiseTile:
    def registers(o: _Option) -> int:
        rows = _reach(1, shape.stride[0], shape.dilation[0], shape.kernel[0])
        return o.vector * (shape.groups * shape.taps + rows * o.width)

    vector = min(shape.align, 2) if shape.unit else 1
    return _tile(shape, _choose(registers, 90, vector, shape.out_size[1], 1, device), 1, False, device)


@functools.lru_cache(maxsize=4096)
def _backward(shape: Shape, device: Device) -> DepthwiseTile:
    taps = shape.groups * shape.taps if shape.groups * shape.taps <= 45 else 28

    def registers(o: _Option) -> int:
        rows, columns = (
            _reach(n, s, d, k) for n, s, d, k in zip((shape.stride[0], o.width), shape.stride, shape.dilation, shape.kernel, strict=True)
        )
        return o.vector * (shape.groups * shape.taps + taps + rows * columns)

    vector = min(shape.align, 2) if shape.unit else 1
    return _tile(shape, _choose(registers, 120, vector, shape.size[1], shape.stride[1], device), taps, True, device)


def forward(shape: Shape, device: Device) -> DepthwiseTile:
    """Launch of the forward kernel: strips of outputs."""
    return launch.pin(_forward(shape, device))


def backward(shape: Shape, device: Device) -> DepthwiseTile:
    """Launch of the backward kernel: strips of inputs, whose width is a multiple of the stride."""
    return launch.pin(_backward(shape, device))

"""Launch parameters as data: how the kernels see a tensor, and the blocks, grid and warps they run with.

A kernel sees x as [outer, channels, inner] with free strides, cut into tiles of [block_outer, block_channels, block_inner]. One program
owns one block of channels and walks over its share of the (outer, inner) tiles, so that the parameters of a channel are loaded and inverted
once per program:

    one row of parameters      [1, 1, numel]         flat tiles
    weight [F, C, kh, kw]      [1, F, C·kh·kw]       several rows per tile, long rows shared by several programs
    activation, contiguous     [N, C, H·W]           the same, for each sample
    activation, channels last  [N·H·W, C, 1]         tiles of positions × channels

Nothing here imports Triton, and nothing depends on measured timings of a run: the same shapes always get the same launch.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, fields, replace
from types import TracebackType
from typing import TypeVar

from .layout import Layout


@dataclass(frozen=True)
class View:
    """x as [outer, channels, inner]. Element (o, c, i) lies at o·x_outer + c·x_channel + i; in group m of the output at
    o·y_outer + c·y_channel + i + m·y_group. Strides of dimensions of size 1 are 0.

    repeat  how often the rows of the parameters repeat to make `channels` rows (1 but for unusual axes of grouped tensors)
    align   largest power of two up to 16 that divides every size and stride which decides about wide loads
    unit    inner is 1 and neighbouring channels are neighbours in memory
    """

    outer: int
    channels: int
    inner: int
    x_outer: int
    x_channel: int
    y_outer: int
    y_channel: int
    y_group: int
    repeat: int
    align: int
    unit: bool


@dataclass(frozen=True)
class Device:
    """What the launch parameters depend on: multiprocessors, compute capability (90 for 9.0), and whether the interpreter runs."""

    processors: int
    arch: int
    interpreted: bool = False


_pins: dict[str, int] = {}
_fields: set[str] = set()
_T = TypeVar("_T")


def pinnable(cls: type[_T]) -> type[_T]:
    """Let `pinned` set the fields of a dataclass of launch parameters, where its launcher passes it through `pin`."""
    _fields.update(field.name for field in fields(cls))  # type: ignore[arg-type]
    return cls


@pinnable
@dataclass(frozen=True)
class Tile:
    """Blocks per program, programs that share the outer and the inner tiles, warps, elements per memory access of a thread, and how many
    registers a thread has at most: what the grid counts on, and the ahead-of-time check holds the compiler to."""

    block_outer: int
    block_channels: int
    block_inner: int
    splits_outer: int
    splits_inner: int
    warps: int
    vector: int
    registers: int


@pinnable
@dataclass(frozen=True)
class FinishTile:
    """Blocks of the kernel that adds up the partial sums."""

    finish_channels: int
    finish_splits: int
    finish_warps: int


class pinned:
    """Fix launch parameters by field name while the block runs: `with pinned(block_inner=64, warps=1): …`, for tests and benchmarks.

    Holds for every thread, since autograd runs the backward pass in its own.
    """

    def __init__(self, **values: int) -> None:
        if unknown := values.keys() - _fields:
            raise TypeError(f"no launch parameter is called {', '.join(sorted(unknown))}: expected some of {', '.join(sorted(_fields))}")
        self.values = values

    def __enter__(self) -> pinned:
        self.previous = dict(_pins)
        _pins.update(self.values)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        _pins.clear()
        _pins.update(self.previous)


def pin(tile: _T) -> _T:
    """The launch parameters with what `pinned` says of them."""
    values = {name: value for name, value in _pins.items() if name in tile.__dataclass_fields__}  # type: ignore[attr-defined]
    return replace(tile, **values) if values else tile  # type: ignore[type-var]


@functools.lru_cache(maxsize=4096)
def view(layout: Layout) -> View:
    """The [outer, channels, inner] view of a layout."""
    c, inner, m, block = layout.channels, layout.inner, layout.groups, layout.block
    repeat = 1
    if c == 1:
        inner = block if m > 1 else layout.numel
    elif m > 1 and block % (c * inner) == 0:
        repeat = block // (c * inner)
    elif m > 1:
        repeat = layout.numel // (c * inner)
    channels = c * repeat
    outer = layout.numel // (channels * inner)
    x_outer, x_channel = channels * inner, inner
    y_outer, y_channel, y_group = m * x_outer, inner, block if m > 1 else 0
    if c > 1 and m > 1 and block % (channels * inner) != 0:
        # several output segments in a channel: they take the place of the outer dimension, which is 1 here
        outer, inner, x_outer = inner // block, block, block
        y_outer, y_channel = m * block, m * x_channel
    x_outer, y_outer = (0, 0) if outer == 1 else (x_outer, y_outer)
    x_channel, y_channel = (0, 0) if channels == 1 else (x_channel, y_channel)
    unit = inner == 1 and y_channel == 1
    widths = (channels, x_outer, y_outer, y_group) if unit else (inner, x_outer, x_channel, y_outer, y_channel, y_group)
    return View(outer, channels, inner, x_outer, x_channel, y_outer, y_channel, y_group, repeat, math.gcd(16, *widths), unit)


def _power(n: int) -> int:
    """Smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _fit(n: int, low: int, high: int) -> int:
    """The largest power of two in [low, high] that wastes at most 1/8 of the tiles over n elements, else the one that wastes least."""
    if n <= low:
        return _power(n)
    sizes = [1 << e for e in range(high.bit_length() - 1, low.bit_length() - 2, -1)]
    waste = {b: _cdiv(n, b) * b for b in sizes}
    return next((b for b in sizes if 8 * waste[b] <= 9 * n), min(sizes, key=lambda b: waste[b]))


def _blocks(v: View, size: int, vector: int, row: int) -> tuple[int, int, int]:
    """Block sizes of a tile of at most `size` elements; `row` bounds the part of it that lies in one channel."""
    if v.inner == 1:
        inner, channels = 1, min(_fit(v.channels, 32, min(max(32 * vector, 32), 128)), size)
    elif v.channels == 1:
        inner, channels = _fit(v.inner, min(64, size), size), 1
    else:
        inner = _fit(v.inner, min(max(8 * vector, 16), row), row)
        channels = min(_power(v.channels), size // inner)
    return min(_power(v.outer), size // (inner * channels)), channels, inner


def _tile(v: View, size: int, row: int, vector: int, device: Device, registers: int) -> Tile:
    if device.interpreted:
        # an operation costs the same for 1 and for 10 000 elements there, so few and large programs
        size, row = 2**15, 2**13
    outer, channels, inner = _blocks(v, size, vector, row)
    warps = max(1, min(4, outer * channels * inner // (32 * max(vector, 2))))
    # as many programs as run at once: more would leave processors idle while the last ones run
    resident = 1 if device.interpreted else 65536 // (32 * warps * registers)
    share = max(1, device.processors * resident // _cdiv(v.channels, channels))
    splits_outer = min(_cdiv(v.outer, outer), share)
    splits_inner = min(_cdiv(v.inner, inner), max(1, share // splits_outer))
    return Tile(outer, channels, inner, splits_outer, splits_inner, warps, vector, registers)


def _vector(v: View, itemsize: int, state: int, limit: int) -> int:
    """Elements per memory access: 16 bytes of them, but for channels side by side no more than leave room for the thread's state."""
    vector = min(16 // itemsize, v.align)
    while v.unit and vector > 1 and vector * state > limit:
        vector //= 2
    return vector


@functools.lru_cache(maxsize=4096)
def _forward(v: View, itemsize: int, device: Device, state: int, noise: bool) -> Tile:
    vector = _vector(v, itemsize, state, 64)
    each = 16 // itemsize if v.unit else vector
    registers = 168 if noise else 128 if v.unit else 64 if v.channels == 1 and not v.y_group else 96
    return _tile(v, (128 if v.y_group else 256) * each, 64 * vector, vector, device, registers)


@functools.lru_cache(maxsize=4096)
def _backward(v: View, itemsize: int, device: Device, state: int, noise: bool, offset: bool) -> Tile:
    vector = _vector(v, itemsize, state, 88)
    each = max(vector, 2)
    if v.unit and vector * state <= 62:
        each = max(each, 4)
    small = state <= 16 and not (v.unit or v.y_group or noise)
    # the compiler takes more than 128 registers where it finds no use for the sums of d_offset, or several gradients
    registers = 80 if small else 208 if noise else 128 if v.unit or (offset and not v.y_group) else 168
    return _tile(v, 128 * each, 32 * max(vector, 2), vector, device, registers)


@functools.lru_cache(maxsize=4096)
def _finish(channels: int, splits: int) -> FinishTile:
    block = min(_power(splits), 1024)
    return FinishTile(min(_power(channels), max(1, 1024 // block)), block, 4)


def forward(v: View, itemsize: int, device: Device, state: int, noise: bool = False) -> Tile:
    """Launch of the forward kernel; itemsize is the smaller one of x and the output, state how many numbers a thread keeps for each of its
    channels (`candidates.state`)."""
    return pin(_forward(v, itemsize, device, state, noise))


def backward(v: View, itemsize: int, device: Device, state: int, noise: bool = False, offset: bool = True) -> Tile:
    """Launch of the backward kernel; itemsize is the smaller one of x and the gradient, offset whether it sums for d_offset."""
    return pin(_backward(v, itemsize, device, state, noise, offset))


def finish(channels: int, splits: int) -> FinishTile:
    """Launch of the kernel that adds up `splits` partial sums for each channel."""
    return pin(_finish(channels, splits))

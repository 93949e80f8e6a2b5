"""Launch parameters of the mixed convolution's gradients, as functions of its shape."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from .launch import Device, _cdiv, _power, pin, pinnable
from .launch_conv import SHARED


@dataclass(frozen=True)
class InputShape:
    """The input gradient as a matrix product for each group: [pixels, taps·filters] × [taps·filters, channels], once per quantizer.

    pixels                of x in the largest class of positions that the same taps reach (N·H·W for stride 1); classes: their number
    quantizers            M; sampled: a program takes one after the other, else all at once
    x_itemsize, itemsize  bytes of an element of x, and of the operands of the product
    """

    pixels: int
    channels: int
    filters: int
    groups: int
    classes: int
    quantizers: int
    sampled: bool
    x_itemsize: int
    itemsize: int


@dataclass(frozen=True)
class WeightShape:
    """The weight gradient as a matrix product for each group: [taps·run, pixels] × [pixels, filters], once per quantizer.

    pixels                N·OH·OW, over which sums are taken
    run, taps, merged     as in `launch_conv.ConvShape`
    quantizers            accumulators that a program holds: M, or 1 if filters are sampled
    x_itemsize, itemsize  bytes of an element of x, and of the operands of the product
    """

    pixels: int
    filters: int
    run: int
    taps: int
    merged: bool
    groups: int
    quantizers: int
    x_itemsize: int
    itemsize: int


@pinnable
@dataclass(frozen=True)
class InputTile:
    """Pixels and channels of a program, filters per step, warps, and stages of the pipeline of loads."""

    dx_m: int
    dx_n: int
    dx_k: int
    dx_warps: int
    dx_stages: int


@pinnable
@dataclass(frozen=True)
class WeightTile:
    """Elements of a run and filters of a program, pixels per step, programs that share the pixels, warps, and pipeline stages."""

    dw_m: int
    dw_n: int
    dw_k: int
    dw_splits: int
    dw_warps: int
    dw_stages: int


def _stages(stage: int, blocks: int, device: Device) -> int:
    """Stages of `stage` bytes each, up to 4, such that so many blocks share a multiprocessor, or fewer where two stages need it."""
    limit = SHARED.get(device.arch, 101376)
    return next((n for each in range(blocks, 0, -1) for n in (4, 3, 2) if each * n * stage <= limit), 1)


def _block(n: int, most: int) -> int:
    """A power of two that is at least n, between what a product needs and `most`."""
    return min(max(_power(n), 16), most)


def _columns(n: int, accumulators: int, most: int = 192) -> int:
    """Columns of a tile for n columns, so that the accumulators together have at most `most` (but 16, the least of a product)."""
    block = _block(n, 128)
    while block > 16 and block * accumulators > most:
        block //= 2
    return block


@functools.lru_cache(maxsize=4096)
def _input(s: InputShape, device: Device) -> InputTile:
    if device.interpreted:
        # an operation costs the same for 1 and for 10 000 elements there, so few and large programs
        return InputTile(_block(s.pixels, 256), _block(s.channels, 128), _block(s.filters, 64), 4, 1)
    # tiles of float32 that are held at a time: products and dx, and x after the products
    products, half = 1 if s.sampled else s.quantizers, max(s.x_itemsize, s.itemsize) < 4
    held = 3 if s.sampled else s.quantizers + 1
    n = _columns(s.channels, held, 256 if half else 128)
    # more filters in a step are fewer steps, but more padding where they are sorted, and more registers where products read those
    wide = device.arch == 90 and half and s.filters % 64 == 0 and not s.sampled
    k = 64 if wide else 32 if s.filters > 16 else 16
    m = 128
    while m > 64 and _cdiv(s.pixels, m) * _cdiv(s.channels, n) * s.groups * s.classes < device.processors:
        m //= 2
    stage = k * s.itemsize * (m + products * n)
    warps = 8 if m == 128 and n * held >= (128 if half else 64) else 4
    # with four such tiles or more, registers leave no room for a second block
    return InputTile(m, n, k, warps, _stages(stage, 1 if held > 3 else 2, device))


@functools.lru_cache(maxsize=4096)
def _weight(s: WeightShape, device: Device) -> WeightTile:
    if device.interpreted:
        return WeightTile(_block(s.run, 128), _block(s.filters, 64), _block(s.pixels, 128), 2, 4, 1)
    m = _block(s.run, 128)
    n = _columns(s.filters, s.quantizers)
    k = 32
    tiles = _cdiv(s.run, m) * s.taps * _cdiv(s.filters, n) * s.groups
    splits = max(1, min(2 * device.processors // tiles, _cdiv(s.pixels, 8 * k)))
    stage = k * (m * s.x_itemsize + n * s.itemsize)
    return WeightTile(m, n, k, splits, 8 if m * n * s.quantizers >= 128 * 128 else 4, _stages(stage, 2, device))


def input_tile(s: InputShape, device: Device) -> InputTile:
    return pin(_input(s, device))


def weight_tile(s: WeightShape, device: Device) -> WeightTile:
    return pin(_weight(s, device))

"""Launch parameters of the mixed convolution's forward pass, as functions of its shape."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from .launch import Device, _cdiv, _power, pin, pinnable


@dataclass(frozen=True)
class ConvShape:
    """A convolution as a matrix product for each group: [pixels, taps·run] × [taps·run, filters].

    pixels      N·OH·OW
    filters     per group
    run         neighbouring elements of x that one tap covers: the channels of a group; times the kernel's width for merged taps
    taps        of the kernel; its height for merged taps
    merged      the taps of a kernel row are read as one run, since there are few channels
    quantizers  that each filter uses: M, or 1 if filters are sampled
    x_itemsize, itemsize  bytes of an element of x, and of the operands of the product
    tensor_cores  whether they multiply: not float32 where PyTorch does not allow TF32
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
    tensor_cores: bool = True


@pinnable
@dataclass(frozen=True)
class ConvTile:
    """Output pixels and filters of a program, elements of a run per step, warps, stages of the pipeline of loads, and the registers per
    thread that the compiler may use: 128 let two programs of 8 warps share a multiprocessor."""

    block_m: int
    block_n: int
    block_k: int
    conv_warps: int
    conv_stages: int
    conv_registers: int


SHARED = {80: 166912, 87: 166912, 90: 232448, 100: 232448, 103: 232448}
"""Bytes of shared memory that a program can have, by compute capability; 101376 on all others since 8.0."""


def _block_n(filters: int) -> int:
    """Below 64 filters the quantization of the tile of x takes longer than the product, so there are no narrow tiles beside others."""
    if filters <= 32:
        return 16 if filters <= 16 else 32
    return min((128, 64), key=lambda n: _cdiv(filters, n) * n)


def _block_k(run: int, itemsize: int) -> int:
    wide = 8 * _cdiv(run, 32) * 32 <= 9 * _cdiv(run, 16) * 16
    return 32 if wide and itemsize == 2 else 16


def _shared(s: ConvShape, m: int, n: int, k: int, stages: int, arch: int) -> int:
    """Bytes for the tiles in flight, one of x and one of weights for each quantizer; the product of 9.0 reads one stage longer."""
    return (stages if arch >= 90 else stages - 1) * k * (m * s.x_itemsize + s.quantizers * n * s.itemsize)


@functools.lru_cache(maxsize=4096)
def _forward(s: ConvShape, device: Device) -> ConvTile:
    if device.interpreted:
        # an operation costs the same for 1 and for 10 000 elements there, so few and large programs
        return ConvTile(
            min(max(_power(s.pixels), 16), 256), min(max(_power(s.filters), 16), 64), min(max(_power(s.run), 16), 128), 4, 1, 255
        )
    if not s.tensor_cores:
        return ConvTile(64, min(_block_n(s.filters), 64), 16, 4, 2, 255)
    n, k = _block_n(s.filters), 16 if s.merged else _block_k(s.run, s.itemsize)
    # the masks and positions of merged taps take many registers
    m = 64 if s.merged or _cdiv(s.pixels, 128) * _cdiv(s.filters, n) * s.groups < device.processors else 128
    limit = SHARED.get(device.arch, 101376)
    while _shared(s, m, n, k, 2, device.arch) > limit and n > 16:
        n //= 2
    stages = next((count for count in (4, 3) if 2 * _shared(s, m, n, k, count, device.arch) <= limit), 2)
    warps = 8 if m == 128 and n >= 64 else 4
    capped = warps == 8 and device.arch >= 90 and s.x_itemsize == s.itemsize and s.quantizers <= 3
    return ConvTile(m, n, k, warps, stages, 128 if capped else 255)


def forward(s: ConvShape, device: Device) -> ConvTile:
    """Launch of the forward kernel."""
    return pin(_forward(s, device))

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
class ConvTile:
    """Output pixels and filters of a program, elements of a tap's run per step, warps, and stages of the pipeline of loads."""

    block_m: int
    block_n: int
    block_k: int
    conv_warps: int
    conv_stages: int


SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448}
"""Bytes of shared memory that a block can have, by compute capability; 166912 where unknown."""


def _stage(s: ConvShape, m: int, n: int, k: int) -> int:
    """Bytes of one step: a tile of x and a tile of weights for each quantizer."""
    return k * (m * s.x_itemsize + s.quantizers * n * s.itemsize)


@functools.lru_cache(maxsize=4096)
def _forward(s: ConvShape, device: Device) -> ConvTile:
    if device.interpreted:
        # an operation costs the same for 1 and for 10 000 elements there, so few and large programs
        return ConvTile(min(max(_power(s.pixels), 16), 256), min(max(_power(s.filters), 16), 64), min(max(_power(s.run), 16), 128), 4, 1)
    k = 16 if s.run <= 16 or s.itemsize == 4 else 32
    n = 32 if s.filters <= 32 else 64 if s.filters <= 64 else 128
    m = 128
    while m > 64 and _cdiv(s.pixels, m) * _cdiv(s.filters, n) * s.groups < device.processors:
        m //= 2
    limit = SHARED.get(device.arch, 166912)
    stages = next((n_stages for n_stages in (4, 3) if 2 * n_stages * _stage(s, m, n, k) <= limit), 2)
    while stages * _stage(s, m, n, k) > limit and n > 32:
        n //= 2
    return ConvTile(m, n, k, 8 if m * n >= 128 * 128 else 4, stages)


def forward(s: ConvShape, device: Device) -> ConvTile:
    return pin(_forward(s, device))

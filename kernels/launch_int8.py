"""What an integer convolution looks like to its kernels, and the blocks and warps they run with.

The convolution is a matrix product of [rows, K] codes of the input and [K, F] codes of the weight, in int8 with sums in int32. Along K the
codes of one filter row lie side by side in memory if there is one group and no dilation, so K is cut into `taps` runs of `run` codes:

    groups 1, dilation 1 along the width       kh runs of kw·C
    else                                       kh·kw runs of C/g

Two ways to get the codes of the input: a pass that writes them, padding included, which the product then reads without masks; or, for 1×1
kernels, quantization of the tile in registers. The second moves 2 bytes less per element (0.47 ps of an H200's memory) and repeats 6
instructions for every block of filters (0.18 ps, beside the memory's time), so it is taken up to 4 blocks of filters.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from .launch import Device, pin, pinnable

MAX_SUM = 65536
"""Largest K = C/g·kh·kw: |Σ (s + e)·w| ≤ 255·128·K stays below 2³¹."""

SLACK = 256
"""Bytes behind the codes of the input: a block of the last run may reach past its end (and multiplies what it finds by zero)."""

_INLINE_BLOCKS = 4

_SMALL = ((128, 64, 4), (64, 64, 4), (128, 32, 4), (64, 32, 4))
_TILES = {90: ((128, 256, 8), (128, 128, 4), *_SMALL), 80: ((128, 128, 8), *_SMALL)}


@dataclass(frozen=True)
class Shape:
    """Sizes of a convolution: x [batch, channels, height, width], weight [filters, channels/groups, *kernel]."""

    batch: int
    channels: int
    height: int
    width: int
    filters: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def padded(self) -> tuple[int, int]:
        """Height and width of the input with its padding."""
        return self.height + 2 * self.padding[0], self.width + 2 * self.padding[1]

    @property
    def out(self) -> tuple[int, int]:
        """Height and width of the output."""
        h, w = ((p - d * (k - 1) - 1) // s + 1 for p, d, k, s in zip(self.padded, self.dilation, self.kernel, self.stride, strict=True))
        return max(h, 0), max(w, 0)

    @property
    def rows(self) -> int:
        return self.batch * self.out[0] * self.out[1]

    @property
    def merged(self) -> bool:
        """Whether the columns of the kernel belong to one run."""
        return self.groups == 1 and self.dilation[1] == 1

    @property
    def run(self) -> int:
        return self.channels // self.groups * (self.kernel[1] if self.merged else 1)

    @property
    def taps(self) -> int:
        return self.kernel[0] * (1 if self.merged else self.kernel[1])

    @property
    def pointwise(self) -> bool:
        return self.kernel == (1, 1) and self.padding == (0, 0)


@pinnable
@dataclass(frozen=True)
class ProductTile:
    """Blocks of rows, filters and K of one program; inline: 1 = the product quantizes its input in registers."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    inline: int


@pinnable
@dataclass(frozen=True)
class EncodeTile:
    """Blocks of rows (padding included), columns and channels of one program that writes codes."""

    encode_rows: int
    encode_width: int
    encode_channels: int
    encode_warps: int


def _power(n: int) -> int:
    """Smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _suits(n: int, block: int, least: int, share: int) -> bool:
    """Whether blocks of this size waste at most 1/share of n, or no more than the smallest blocks do."""
    size = _cdiv(n, block) * block
    return share * size <= (share + 1) * n or size == _cdiv(n, least) * least


@functools.lru_cache(maxsize=4096)
def _product(shape: Shape, channels_last: bool, itemsize: int, device: Device) -> ProductTile:
    filters = shape.filters // shape.groups
    widest = 256 // itemsize  # of what a block has registers for beside its input
    inline = shape.pointwise and channels_last and filters <= widest * _INLINE_BLOCKS
    if device.interpreted:
        # an operation costs the same for 1 and for 10 000 elements there, so few and large programs
        return ProductTile(min(512, max(16, _power(shape.rows))), max(32, _power(filters)), 128, 4, 1, int(inline))
    candidates = _TILES[90 if device.arch >= 90 else 80]
    block_m, block_n, warps = candidates[-1]
    for m, n, w in candidates:
        tiles = _cdiv(shape.rows, m) * _cdiv(filters, n) * shape.groups
        if not (inline and n > widest) and _suits(filters, n, block_n, 3) and tiles >= device.processors:
            block_m, block_n, warps = m, n, w
            break
    inline = inline and _cdiv(filters, block_n) <= _INLINE_BLOCKS
    # the same holds for codes in the product as for elements in `_encode`
    longest = 32 if shape.channels // shape.groups % 16 else 16384 // (block_m * itemsize) if inline else 128
    block_k = next((k for k in (128, 64) if k <= longest and _suits(shape.run, k, 32, 8)), 32)
    return ProductTile(block_m, block_n, block_k, warps, 3, int(inline))


def product(shape: Shape, channels_last: bool, itemsize: int, device: Device) -> ProductTile:
    """Launch of the product. itemsize is that of x, channels_last says whether x can be read as rows of channels."""
    return pin(_product(shape, channels_last, itemsize, device))


@functools.lru_cache(maxsize=4096)
def _encode(shape: Shape, device: Device) -> EncodeTile:
    # without groups of 16 channels every element has an address of its own, which takes registers
    size = 2**15 if device.interpreted else 1024 if shape.channels % 16 else 4096
    channels = min(_power(shape.channels), 128)
    width = min(_power(shape.padded[1]), size // channels, 64)
    rows = min(_power(shape.batch * shape.padded[0]), size // (channels * width))
    return EncodeTile(rows, width, channels, 4)


def encode(shape: Shape, device: Device) -> EncodeTile:
    """Launch of the pass that writes codes."""
    return pin(_encode(shape, device))

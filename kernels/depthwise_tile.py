"""What the depthwise kernels share: which tap joins two pixels, where a strip lies, and the mixed activation of a block of pixels.

A block is [BP, BC]: one pixel of each of BP strips, BC channels. The columns of a strip are unrolled and so are the rows that are in work
at a time, so all distances between them, and the taps that join them, are known to the compiler.
"""

# The arguments of a @triton.jit function have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl

from .candidates import FULL, aligned, code, load_candidates

_IMAGE = ("channels", "height", "width", "out_height", "out_width")
_STRIDES = (f"{image}_{axis}" for image in "xyzd" for axis in ("sample", "channel", "row", "column"))
SIZES = ("strips", "strip_count", "strip_columns", "rows", *_IMAGE, *_STRIDES)
"""Run-time sizes and strides; the strides of x, y, dy (z) and dx (d)."""


@triton.constexpr_function
def tap(row, column, KH, KW, DH, DW):
    """The number of the tap that lies row and column pixels after the first one, or -1."""
    inside = 0 <= row < KH * DH and 0 <= column < KW * DW and row % DH == 0 and column % DW == 0
    return row // DH * KW + column // DW if inside else -1


@triton.constexpr_function
def span(outputs, stride, dilation, size):
    """Inputs that neighbouring outputs read, from the first to the last."""
    return (outputs - 1) * stride + (size - 1) * dilation + 1


@triton.constexpr_function
def rows_open(stride, dilation, size):
    """Output rows that are unfinished while input rows are read in order."""
    return -(-((size - 1) * dilation + 1) // stride)


@triton.constexpr_function
def first_source(padding, stride, dilation, size):
    """The first output that reads the inputs 0, 1, …, relative to the one that would without padding."""
    return -((dilation * (size - 1) - padding) // stride)


@triton.constexpr_function
def last_source(inputs, padding, stride):
    """The last output that reads the inputs 0 … inputs−1."""
    return (inputs - 1 + padding) // stride


@triton.constexpr_function
def partner(row, column, number, KH, KW, SH, SW, PH, PW, DH, DW, breadth):
    """The output that reads the input (row, column) with tap `number`, in rows of `breadth` outputs from `first_source` on, or -1."""
    h, w = row + PH - number // KW * DH, column + PW - number % KW * DW
    if h % SH or w % SW:
        return -1
    return (h // SH + (DH * (KH - 1) - PH) // SH) * breadth + w // SW + (DW * (KW - 1) - PW) // SW


@triton.jit
def strides(sample, channel, row, column, ALIGN: tl.constexpr, UNIT: tl.constexpr):
    """The strides of an image, in a form that tells the compiler what divides them."""
    if UNIT:
        return aligned(sample, ALIGN), 1, aligned(row, ALIGN), aligned(column, ALIGN)
    return sample, channel, row, column


@triton.jit
def block(strips, strip_count, strip_columns, channels, BP: tl.constexpr, BC: tl.constexpr, EVEN: tl.constexpr):
    """Sample, row and column of the BP strips of this program [BP, 1], its channels [1, BC], and the masks of both."""
    blocks = tl.cdiv(channels, BC)
    o_c = (tl.program_id(0) % blocks * BC + tl.arange(0, BC))[None, :]
    m_c = tl.full((1, BC), True, tl.int1) if EVEN else o_c < channels
    o_p = (tl.program_id(0) // blocks * BP + tl.arange(0, BP))[:, None]
    row = o_p // strip_columns
    return row // strip_count, row % strip_count, o_p % strip_columns, o_c, o_p < strips, m_c


@triton.jit
def position(i_n, o_h, o_w, o_c, sample, channel, row, column):
    """Where a pixel lies, int64: [BP, BC]."""
    return i_n.to(tl.int64) * sample + o_h.to(tl.int64) * row + o_w.to(tl.int64) * column + o_c.to(tl.int64) * channel


@triton.jit
def load_activation(p_offset, p_range, p_p, K: tl.constexpr, STEPS: tl.constexpr, ZERO: tl.constexpr):
    """1/r, z/n − β/r, p, p·d and p·β of the K activation candidates: [1, 1] each."""
    o_0 = tl.zeros((1, 1), tl.int32)
    return load_candidates(p_offset, p_range, p_p, o_0, o_0 == 0, K, STEPS, ZERO)


@triton.jit
def activation(b_x, mask, candidates, m: tl.constexpr, K: tl.constexpr, STEPS: tl.constexpr, ZERO: tl.constexpr, GROUPS: tl.constexpr):
    """X_m = Σ_{k in m} p_k·A_k(x), zero where the mask is not set, NaN for NaN. b_x is zero outside the mask."""
    inverse, shift, weight, scale, constant = candidates
    b_y = tl.zeros((1, 1), tl.float32)
    for k in tl.static_range(K):
        if GROUPS[k] == m and STEPS[k] > 0:
            b_y += constant[k]
    b_y = tl.broadcast_to(b_y, b_x.shape)
    for k in tl.static_range(K):
        if GROUPS[k] == m:
            if STEPS[k] == FULL:
                b_y += weight[k] * b_x
            elif STEPS[k] != 0:
                b_u = tl.clamp(b_x * inverse[k] + shift[k], 0.0, 1.0)
                b_y += scale[k] * code(b_u, STEPS[k], ZERO[k], False)
    # x where it is NaN, which the saturation swallows, and where it lies outside, which is then zero: one comparison for both
    return tl.where(mask & (b_x == b_x), b_y, b_x)


@triton.jit
def load_taps(p_v, o_c, m_c, channels, COUNT: tl.constexpr):
    """The COUNT = M·KH·KW taps of V: [1, BC] each."""
    taps = ()
    for i in tl.static_range(COUNT):
        taps += (tl.load(p_v + i * channels + o_c, mask=m_c, other=0.0),)
    return taps


@triton.jit
def zeros(COUNT: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr):
    """COUNT sums [BP, BC]."""
    sums = ()
    for _ in tl.static_range(COUNT):
        sums += (tl.zeros((BP, BC), tl.float32),)
    return sums


@triton.jit
def load_row(p_z, column, o_w, width, m_h, m_c, COUNT: tl.constexpr):
    """COUNT neighbouring pixels of a row, zero outside the image."""
    row = ()
    for i in tl.static_range(COUNT):
        mask = m_h & (o_w + i >= 0) & (o_w + i < width) & m_c
        row += (tl.load(p_z + i * column, mask=mask, other=0.0).to(tl.float32),)
    return row


def candidate_constants(steps: Sequence[float], zero_point: Sequence[float], groups: Sequence[int]) -> dict[str, Any]:
    """The compile-time arguments that describe the activation candidates."""
    return {"K": len(steps), "STEPS": tuple(steps), "ZERO": tuple(zero_point), "GROUPS": tuple(groups)}

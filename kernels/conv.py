"""The mixed convolution as Triton kernels: the module that `dispatch` loads for "conv".

An implicit matrix product over channels-last x. Each step loads one tile of x, quantizes it M times in registers and multiplies it with M
blocks of weights into one accumulator; no quantized copy of x exists in memory. The gradients are in conv_grad_input.py and
conv_grad_weight.py, what all three share in conv_common.py, the weights' blocks in conv_pack.py, launch parameters in launch_conv.py.
"""

# The arguments of a @triton.jit function have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment"

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch_conv, layout
from .candidates import FULL, aligned, device_of, guard
from .conv_common import codes, dot, inside, largest, load_quantizers, pick, precision
from .conv_grad_input import backward_input
from .conv_grad_weight import backward_weight
from .conv_pack import filter_table, pack
from .launch_conv import ConvShape, ConvTile
from .reference import IDENTITY
from .reference_conv import Geometry

__all__ = ["backward_input", "backward_weight", "forward"]

SIZES = ("pixels", "plane", "out_w", "height", "width", "row", "run", "filters", "tiles")


@triton.jit(do_not_specialize=SIZES)
def mixed_conv_fwd_kernel(
    p_x,  # [N, H, W, row] any float type
    p_v,  # what `pack` makes
    p_outside,
    p_center,
    p_y,  # [N, plane, filters] any float type
    p_offset,  # [M] float32
    p_range,  # [M] float32
    p_filter,  # as `FilterTable`, not read without SAMPLED
    p_quantizer,
    pixels,
    plane,
    out_w,
    height,
    width,
    row,
    run,
    filters,
    tiles,
    M: tl.constexpr,
    STEPS: tl.constexpr,
    ZERO: tl.constexpr,
    SAMPLED: tl.constexpr,
    FIRST: tl.constexpr,
    FULLS: tl.constexpr,
    KERNEL: tl.constexpr,
    MERGED: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    BLOCKS: tl.constexpr,
    EVEN: tl.constexpr,
    ALIGN_X: tl.constexpr,
    ALIGN_Y: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BT: tl.constexpr,
):
    """y = Σ_m conv(A_m(x), V_m). A program owns BM output positions and BN filters of one group, of one quantizer with SAMPLED.

    The product runs on codes q. Their center, β/d − z, is added as a constant of the filter, `p_center` over all taps. Taps outside the
    image read zeros: `p_outside` takes off what these add, in one more product. Masks on the tiles of codes instead would keep them from
    going straight from the shared memory of the loads to the registers of the product.

    FIRST   a quantizer that carries NaN from x to y: the first that contributes
    FULLS   whether there is a full-precision quantizer
    BLOCKS  of BK elements in a run
    EVEN    they have no remainder
    """
    COLUMNS: tl.constexpr = 1 if MERGED else KERNEL[1]
    STRIDE_V: tl.constexpr = (1 if SAMPLED else M) * BN * BK
    row = aligned(row, ALIGN_X)
    run = aligned(run, ALIGN_X)
    filters = aligned(filters, ALIGN_Y)
    inverse, shift, _, step = load_quantizers(p_offset, p_range, M, STEPS, ZERO, True)
    tile = tl.program_id(0) % tiles
    i_m = (tl.program_id(0) // tiles).to(tl.int64) * BM
    group = tl.program_id(1).to(tl.int64)
    o_n = tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    steps = KERNEL[0] * COLUMNS * BLOCKS
    if SAMPLED:
        quantizer = tl.load(p_quantizer + group * tiles + tile)
        b_f = tl.load(p_filter + (group * tiles + tile) * BN + o_n, mask=(o_n >= 0) & (quantizer >= 0), other=-1)
        m_f = b_f >= 0
        b_quantizer = tl.load(p_quantizer + group * tiles + tile + tl.zeros((1, 1), tl.int32))
        n = pick(b_quantizer, STEPS, M)
        b_inverse = pick(b_quantizer, inverse, M)
        b_shift = pick(b_quantizer, shift, M)
        scale = pick(b_quantizer, step, M)
        steps = tl.where(pick(quantizer, STEPS, M) != 0, steps, 0)
    else:
        b_f = tile * BN + o_n
        m_f = b_f < filters
        scale = largest(step, M)

    first_n = i_m // plane
    o_p = (i_m - first_n * plane).to(tl.int32) + tl.arange(0, BM)
    b_n = first_n + o_p // plane
    o_p = o_p % plane
    m_m = i_m + tl.arange(0, BM) < pixels
    o_h = o_p // out_w * STRIDE[0] - PADDING[0]
    o_w = o_p % out_w * STRIDE[1] - PADDING[1]
    p_rows = p_x + ((b_n * height + o_h) * width + o_w)[:, None] * row + group * run + o_k[None, :]
    p_blocks = p_v + (group * tiles + tile) * (KERNEL[0] * COLUMNS * BLOCKS * STRIDE_V) + o_n[None, :] * BK + o_k[:, None]

    acc = tl.zeros((BM, BN), tl.float32)
    for t in range(steps):
        tap = t // BLOCKS
        i_k = t % BLOCKS * BK
        d_h = tap // COLUMNS * DILATION[0]
        d_w = tap % COLUMNS * DILATION[1]
        mask = m_m[:, None]
        if PADDING[0] > 0:
            mask = mask & inside(o_h + d_h, height)[:, None]
        if PADDING[1] > 0:
            mask = mask & inside(o_w[:, None] + (d_w + ((i_k + o_k) // row if MERGED else 0 * o_k))[None, :], width)
        if not EVEN:
            mask = mask & (o_k < run - i_k)[None, :]
        b_x = tl.load(p_rows + ((d_h * width + d_w) * row + i_k), mask=mask, other=0.0).to(tl.float32)
        if SAMPLED:
            b_a = codes(b_x, b_inverse, b_shift, n) + tl.where(b_x == b_x, 0.0, b_x)
            if FULLS:
                b_a = tl.where(n == FULL, b_x, b_a)
            acc = dot(b_a.to(p_v.dtype.element_ty), tl.load(p_blocks), acc, PRECISION)
        else:
            for m in tl.static_range(M):
                if STEPS[m] != 0:
                    b_a = b_x if STEPS[m] == FULL else codes(b_x, inverse[m], shift[m], STEPS[m])
                    if m == FIRST:
                        # not a choice between codes and x, which is made after the conversion to 16 bits, without packed instructions
                        b_a += tl.where(b_x == b_x, 0.0, b_x)
                    acc = dot(b_a.to(p_v.dtype.element_ty), tl.load(p_blocks + m * BN * BK), acc, PRECISION)
        p_blocks += STRIDE_V

    TAPS: tl.constexpr = KERNEL[0] * KERNEL[1]
    o_t = tl.arange(0, BT)
    o_taps = ((group * tiles + tile) * TAPS + o_t)[:, None] * BN + o_n[None, :]
    m_taps = ((o_t < TAPS) & (steps > 0))[:, None]
    if PADDING[0] > 0 or PADDING[1] > 0:
        b_h = o_h[:, None] + (o_t // KERNEL[1] * DILATION[0])[None, :]
        b_w = o_w[:, None] + (o_t % KERNEL[1] * DILATION[1])[None, :]
        b_out = tl.where(inside(b_h, height) & inside(b_w, width), 0.0, 1.0)
        b_outside = tl.load(p_outside + o_taps, mask=m_taps, other=0.0)
        acc = dot(b_out.to(b_outside.dtype), b_outside, acc, PRECISION)
    acc += tl.sum(tl.load(p_center + o_taps, mask=m_taps, other=0.0), axis=0)[None, :]

    total = tl.num_programs(1) * filters
    p_out = p_y + i_m * total + group * filters + (tl.arange(0, BM)[:, None] * total + b_f[None, :])
    tl.store(p_out, (acc * scale).to(p_y.dtype.element_ty), mask=m_m[:, None] & m_f[None, :])


def shape(
    pixels: int, filters: int, channels: int, kernel: Sequence[int], quantizers: int, x_dtype: torch.dtype, dtype: torch.dtype, g: Geometry
) -> ConvShape:
    """What the launch parameters depend on. filters, channels: of the whole convolution; quantizers: that each filter uses."""
    kh, kw = kernel
    merged = g.groups == 1 and channels < 16 and kw > 1 and g.dilation[1] == 1
    run, taps = (channels * kw, kh) if merged else (channels // g.groups, kh * kw)
    tensor_cores = dtype != torch.float32 or precision(dtype) == "tf32"
    sizes = (x_dtype.itemsize, dtype.itemsize)
    return ConvShape(pixels, filters // g.groups, run, taps, merged, g.groups, quantizers, *sizes, tensor_cores)


def constants(
    s: ConvShape, tile: ConvTile, steps: Sequence[float], zero_point: Sequence[float], sampled: bool, channels: int, kernel: Sequence[int],
    g: Geometry,
) -> dict[str, Any]:  # fmt: skip
    """The compile-time arguments that follow from shape and quantizers. channels: of x; kernel: height and width."""
    return {
        "M": len(steps), "STEPS": tuple(steps), "ZERO": tuple(zero_point), "SAMPLED": sampled,
        "FIRST": next((m for m, n in enumerate(steps) if n != 0), -1), "FULLS": IDENTITY in steps,
        "KERNEL": tuple(kernel), "MERGED": s.merged,
        "STRIDE": g.stride, "PADDING": g.padding, "DILATION": g.dilation,
        "BLOCKS": triton.cdiv(s.run, tile.block_k), "EVEN": s.run % tile.block_k == 0,
        "ALIGN_X": math.gcd(16, s.run, channels), "ALIGN_Y": math.gcd(16, s.filters),
        "BM": tile.block_m, "BN": tile.block_n, "BK": tile.block_k, "BT": max(16, triton.next_power_of_2(math.prod(kernel))),
    }  # fmt: skip


def forward(
    x: Tensor,
    out: Tensor,
    weight: Tensor,
    offset: Tensor,
    range: Tensor,
    steps: Sequence[float],
    zero_point: Sequence[float],
    choice: Tensor | None,
    geometry: Geometry,
) -> None:
    """Write Σ_m conv(A_m(x), V_m) into `out` (not empty, any strides), multiplied in out's dtype.

    x, weight      [N, C, H, W], [CO, M·C/groups, kh, kw], any float dtype. channels_last is the layout of the kernel: an x or an `out` of
                   another one costs a copy
    offset, range  [M] float32, contiguous
    choice         [CO] int64: the only quantizer of each filter, or None
    """
    g, sampled = geometry, choice is not None
    x = x.contiguous(memory_format=torch.channels_last)
    y = out if out.is_contiguous(memory_format=torch.channels_last) else layout.empty(out.shape, x, out.dtype)
    s = shape(
        x.size(0) * out.size(2) * out.size(3), out.size(1), x.size(1), weight.shape[2:], 1 if sampled else len(steps),
        x.dtype, out.dtype, g,
    )  # fmt: skip
    tile = launch_conv.forward(s, device_of(x))
    with guard(x):
        table = None if choice is None else filter_table(choice, g.groups, len(steps), tile.block_n)
        packed = pack(weight, out.dtype, offset, range, steps, zero_point, table, s, tile)
        tiles = packed[0].size(1)
        grid = (triton.cdiv(s.pixels, tile.block_m) * tiles, g.groups)
        mixed_conv_fwd_kernel[grid](
            x, *packed, y, offset, range, *(table or (range, range)),
            s.pixels, out.size(2) * out.size(3), out.size(3), x.size(2), x.size(3), x.size(1), s.run, s.filters, tiles,
            **constants(s, tile, steps, zero_point, sampled, x.size(1), weight.shape[2:], g),
            PRECISION=precision(out.dtype), num_warps=tile.conv_warps, num_stages=tile.conv_stages, maxnreg=tile.conv_registers,
            enable_fp_fusion=True,
        )  # fmt: skip
    if y is not out:
        out.copy_(y)

"""The mixed convolution as Triton kernels: the module that `dispatch` loads for "conv".

An implicit matrix product over channels-last x. Each step loads one tile of x, quantizes it M times in registers and multiplies it with M
blocks of weights into one accumulator; no quantized copy of x exists in memory. The gradients are in conv_grad_input.py and
conv_grad_weight.py, what all three share in conv_common.py, the weights' blocks in conv_pack.py, launch parameters in launch_conv.py.
"""

# The arguments of a @triton.jit function have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch_conv
from .candidates import FULL, aligned, device_of, guard
from .conv_common import border, code_tile, dot, largest, load_quantizers, pick, precision
from .conv_pack import filter_table, pack
from .launch_conv import ConvShape, ConvTile
from .reference_conv import Geometry

__all__ = ["forward"]

SIZES = ("pixels", "plane", "out_w", "height", "width", "row", "run", "filters", "tiles")
_OUTSIDE = tl.constexpr(-(2**30))


@triton.jit(do_not_specialize=SIZES)
def mixed_conv_fwd_kernel(
    p_x,  # [N, H, W, row] any float type
    p_v,  # blocks of `pack`
    p_y,  # [N, filters, plane], or [N, plane, filters] with LAST; any float type
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
    TAPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    MERGED: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    EVEN: tl.constexpr,
    ALIGN: tl.constexpr,
    LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """y = Σ_m conv(A_m(x), V_m). A program owns BM output positions and BN filters of one group, of one quantizer with SAMPLED.

    FIRST    a quantizer that carries NaN from x to y: the first that contributes
    COLUMNS  taps side by side, 1 with MERGED
    EVEN     BK divides run
    """
    row = aligned(row, ALIGN)
    run = aligned(run, ALIGN)
    inverse, shift, center, step = load_quantizers(p_offset, p_range, M, STEPS, ZERO)
    tile = tl.program_id(0) % tiles
    i_m = (tl.program_id(0) // tiles).to(tl.int64) * BM
    group = tl.program_id(1).to(tl.int64)
    o_n = tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    blocks = tl.cdiv(run, BK)
    steps = TAPS * blocks
    if SAMPLED:
        quantizer = tl.load(p_quantizer + group * tiles + tile)
        used = quantizer >= 0
        b_f = tl.load(p_filter + (group * tiles + tile) * BN + o_n, mask=(o_n >= 0) & used, other=-1)
        m_f = b_f >= 0
        n = pick(quantizer, STEPS, M)
        b_inverse = pick(quantizer, inverse, M)
        b_shift = pick(quantizer, shift, M)
        b_center = pick(quantizer, center, M)
        scale = pick(quantizer, step, M)
        steps = tl.where(used & (n != 0), steps, 0)
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
    o_h = tl.where(m_m, o_h, _OUTSIDE)
    p_blocks = p_v + (group * tiles + tile) * (TAPS * blocks) * ((1 if SAMPLED else M) * BN * BK) + o_n[None, :] * BK + o_k[:, None]

    acc = tl.zeros((BM, BN), tl.float32)
    for t in range(steps):
        tap = t // blocks
        i_k = (t - tap * blocks) * BK
        d_h = tap // COLUMNS * DILATION[0]
        d_w = tap % COLUMNS * DILATION[1]
        # as unsigned numbers, negative positions are beyond every size
        m_x = ((o_h + d_h).to(tl.uint32) < height)[:, None]
        if MERGED:
            m_x = m_x & ((o_w[:, None] + ((i_k + o_k) // row)[None, :]).to(tl.uint32) < width)
        else:
            m_x = m_x & ((o_w + d_w).to(tl.uint32) < width)[:, None]
        m_load = m_x if EVEN else m_x & (o_k < run - i_k)[None, :]
        b_x = tl.load(p_rows + ((d_h * width + d_w) * row + i_k), mask=m_load, other=0.0).to(tl.float32)
        if SAMPLED:
            b_a = code_tile(b_x, border(m_x, b_shift, b_center, n), b_inverse, b_shift, n, True)
            b_a = tl.where(n == FULL, b_x, b_a)
            acc = dot(b_a.to(p_v.dtype.element_ty), tl.load(p_blocks), acc, PRECISION)
        else:
            for m in tl.static_range(M):
                if STEPS[m] != 0:
                    if STEPS[m] == FULL:
                        b_a = b_x
                    else:
                        b_a = code_tile(b_x, border(m_x, shift[m], center[m], STEPS[m]), inverse[m], shift[m], STEPS[m], m == FIRST)
                    acc = dot(b_a.to(p_v.dtype.element_ty), tl.load(p_blocks + m * BN * BK), acc, PRECISION)
        p_blocks += (1 if SAMPLED else M) * BN * BK

    b_f = (group * filters + b_f)[None, :]
    if LAST:
        p_out = p_y + (i_m + tl.arange(0, BM))[:, None] * (tl.num_programs(1) * filters) + b_f
    else:
        p_out = p_y + b_n[:, None] * (tl.num_programs(1) * filters).to(tl.int64) * plane + b_f * plane + o_p[:, None]
    tl.store(p_out, (acc * scale).to(p_y.dtype.element_ty), mask=m_m[:, None] & m_f[None, :])


def _shape(x: Tensor, out: Tensor, weight: Tensor, quantizers: int, sampled: bool, g: Geometry) -> ConvShape:
    channels, (kh, kw) = x.size(1), weight.shape[2:]
    merged = g.groups == 1 and channels < 16 and kw > 1 and g.dilation[1] == 1
    run, taps = (channels * kw, kh) if merged else (channels // g.groups, kh * kw)
    return ConvShape(
        out.size(0) * out.size(2) * out.size(3), out.size(1) // g.groups, run, taps, merged, g.groups, 1 if sampled else quantizers,
        x.element_size(), out.element_size(),
    )  # fmt: skip


def constants(s: ConvShape, tile: ConvTile, steps: Sequence[float], zero_point: Sequence[float], sampled: bool, g: Geometry) -> dict[str, Any]:
    """The compile-time arguments that follow from the shape and the quantizers."""
    return {
        "M": len(steps), "STEPS": tuple(steps), "ZERO": tuple(zero_point), "SAMPLED": sampled,
        "FIRST": next((m for m, n in enumerate(steps) if n != 0), -1), "TAPS": s.taps, "MERGED": s.merged,
        "STRIDE": g.stride, "PADDING": g.padding, "DILATION": g.dilation, "EVEN": s.run % tile.block_k == 0,
        "BM": tile.block_m, "BN": tile.block_n, "BK": tile.block_k,
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
    """Write Σ_m conv(A_m(x), V_m) into `out` (not empty, contiguous or channels_last), multiplied in out's dtype.

    x, weight      [N, C, H, W], [CO, M·C/groups, kh, kw], any float dtype; copied unless they are channels_last and dense
    offset, range  [M] float32, contiguous
    choice         [CO] int64: the only quantizer of each filter, or None
    """
    g, sampled = geometry, choice is not None
    x = x.contiguous(memory_format=torch.channels_last)
    s = _shape(x, out, weight, len(steps), sampled, g)
    tile = launch_conv.forward(s, device_of(x))
    with guard(x):
        table = None if choice is None else filter_table(choice, g.groups, len(steps), tile.block_n)
        v = pack(weight, out.dtype, offset, range, steps, zero_point, table, s, tile)
        tiles = v.size(1)
        grid = (triton.cdiv(s.pixels, tile.block_m) * tiles, g.groups)
        filters, quantizers = (range, range) if table is None else table
        mixed_conv_fwd_kernel[grid](
            x, v, out, offset, range, filters, quantizers, s.pixels, out.size(2) * out.size(3), out.size(3), x.size(2), x.size(3),
            x.size(1), s.run, s.filters, tiles, **constants(s, tile, steps, zero_point, sampled, g),
            COLUMNS=1 if s.merged else weight.size(3), ALIGN=1, LAST=out.is_contiguous(memory_format=torch.channels_last),
            PRECISION=precision(out.dtype), num_warps=tile.conv_warps, num_stages=tile.conv_stages,
        )  # fmt: skip

"""The weight gradient of the mixed convolution: dV_m = d_m · Σ over output positions of (q_m + center_m) ⊗ dy.

A product over output positions. A program owns a part of a tap's input elements and of the filters, loads the tiles of x and dy once, and
multiplies the M code tiles, which exist in registers only, with dy into M accumulators. Several programs share the positions; a second
kernel adds their float32 results in a fixed order and writes the gradient in the weight's layout and dtype.
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

from . import launch_conv_grad, layout
from .candidates import FULL, aligned, device_of, guard
from .conv_common import code_tile, dot, inside, load_quantizers, pick, precision
from .conv_grad_pack import sort_grad, tap_strides
from .conv_pack import filter_table
from .launch_conv_grad import WeightShape, WeightTile
from .reference_conv import Geometry

SIZES = ("pixels", "share", "out_h", "out_w", "height", "width", "row", "run", "columns", "tiles")
FINISH_SIZES = ("splits", "total", "filters", "columns", "channels", "run", "w_f", "w_c", "w_t")


@triton.jit(do_not_specialize=SIZES)
def mixed_conv_dw_kernel(
    p_x,  # [N, H, W, row] any float type
    p_g,  # [pixels, groups · columns]: dy, its filters in the order of `FilterTable` with SAMPLED
    p_sums,  # [splits, groups · columns, TAPS, M (1 with SAMPLED), run] float32
    p_offset,  # [M] float32
    p_range,  # [M] float32
    p_quantizer,  # as `FilterTable`, not read without SAMPLED
    pixels,
    share,
    out_h,
    out_w,
    height,
    width,
    row,
    run,
    columns,
    tiles,
    M: tl.constexpr,
    STEPS: tl.constexpr,
    ZERO: tl.constexpr,
    SAMPLED: tl.constexpr,
    TAPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FIRST: tl.constexpr,
    MERGED: tl.constexpr,
    PLAIN: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    EVEN_RUN: tl.constexpr,
    EVEN: tl.constexpr,
    ALIGN_X: tl.constexpr,
    ALIGN_G: tl.constexpr,
    PRECISION: tl.constexpr,
    BR: tl.constexpr,
    BF: tl.constexpr,
    BP: tl.constexpr,
):
    """Partial sums over `share` output positions. A program owns BR elements of the run of one tap and BF filters of one group.

    COLUMNS         taps side by side, 1 with MERGED
    FIRST           the first quantizer that contributes: its product alone carries NaN of x, and passes them on at the end
    PLAIN           output position i reads input position i
    EVEN_RUN, EVEN  BR divides run, BF divides columns
    """
    row = aligned(row, ALIGN_X)
    run = aligned(run, ALIGN_X)
    columns = aligned(columns, ALIGN_G)
    inverse, shift, center, step = load_quantizers(p_offset, p_range, M, STEPS, ZERO, True)
    runs = tl.cdiv(run, BR)
    i_r = tl.program_id(0) % runs * BR
    tap = tl.program_id(0) // runs % TAPS
    tile = tl.program_id(0) // runs // TAPS
    group = tl.program_id(1).to(tl.int64)
    o_r = i_r + tl.arange(0, BR)
    o_f = tile * BF + tl.arange(0, BF)
    o_p = tl.arange(0, BP)

    first = tl.program_id(2).to(tl.int64) * share
    left = tl.minimum(pixels - first, share).to(tl.int32)
    if SAMPLED:
        quantizer = tl.load(p_quantizer + group * tiles + tile)
        left = tl.where((quantizer >= 0) & (pick(quantizer, STEPS, M) != 0), left, 0)
        b_quantizer = tl.load(p_quantizer + group * tiles + tile + tl.zeros((1, 1), tl.int32))
        n = pick(b_quantizer, STEPS, M)
        b_inverse = pick(b_quantizer, inverse, M)
        b_shift = pick(b_quantizer, shift, M)
        b_center = pick(b_quantizer, center, M)

    p_rows = p_x + group * run + o_r[:, None]
    all_columns = tl.num_programs(1) * columns
    p_grads = p_g + (first + o_p)[:, None] * all_columns + group * columns + o_f[None, :]
    if PLAIN:
        p_rows += (first + o_p)[None, :] * row
    else:
        # the output position n, h, w moves on by BP, as by so many samples, rows and columns
        plane = out_h * out_w
        b_n = (first + o_p) // plane
        b_h = ((first + o_p) % plane).to(tl.int32)
        b_w = b_h % out_w
        b_h = b_h // out_w
        move_n = BP // plane
        move_h = BP % plane // out_w
        move_w = BP % out_w
        d_h = tap // COLUMNS * DILATION[0] - PADDING[0]
        d_w = tap % COLUMNS * DILATION[1] - PADDING[1]
    acc = ()
    for _ in tl.static_range(1 if SAMPLED else M):
        acc += (tl.zeros((BR, BF), tl.float32),)
    for i_p in range(0, left, BP):
        m_p = o_p < left - i_p
        p_tile = p_rows
        if not PLAIN:
            o_h = b_h * STRIDE[0] + d_h
            o_w = b_w * STRIDE[1] + d_w
            p_tile += ((b_n * height + o_h) * width + o_w)[None, :] * row
            if PADDING[0] > 0:
                m_p = m_p & inside(o_h, height)
            if PADDING[1] > 0 and not MERGED:
                m_p = m_p & inside(o_w, width)
        m_x = m_p[None, :]
        if MERGED:
            m_x = m_x & inside((o_r // row)[:, None] + o_w[None, :], width)
        # what a tap reads outside the image counts for nothing: its code need not be 0, so dy is
        m_g = m_p[:, None] if EVEN else m_p[:, None] & (o_f < columns)[None, :]
        b_x = tl.load(p_tile, mask=m_x if EVEN_RUN else m_x & (o_r < run)[:, None], other=0.0).to(tl.float32)
        b_g = tl.load(p_grads, mask=m_g, other=0.0)
        added = ()
        for m in tl.static_range(1 if SAMPLED else M):
            if STEPS[m] == 0 and not SAMPLED:
                added += (acc[m],)
            else:
                if SAMPLED:
                    b_a = code_tile(b_x, b_center, b_inverse, b_shift, n, False)
                    b_a = tl.where(n == FULL, b_x, b_a)
                else:
                    b_a = b_x if STEPS[m] == FULL else code_tile(b_x, center[m], inverse[m], shift[m], STEPS[m], False)
                if SAMPLED or m == FIRST:
                    # not a choice between codes and x, which is made after the conversion to 16 bits, without packed instructions
                    b_a += tl.where(b_x == b_x, 0.0, b_x)
                if MERGED:
                    b_a = tl.where(m_x, b_a, 0.0)
                added += (dot(b_a.to(b_g.dtype), b_g, acc[m], PRECISION),)
        acc = added
        p_grads += BP * all_columns
        if PLAIN:
            p_rows += BP * row
        else:
            b_w += move_w
            b_h += move_h + (b_w >= out_w).to(tl.int32)
            b_w = tl.where(b_w >= out_w, b_w - out_w, b_w)
            b_n += move_n + (b_h >= out_h).to(tl.int32)
            b_h = tl.where(b_h >= out_h, b_h - out_h, b_h)

    QUANTIZERS: tl.constexpr = 1 if SAMPLED else M
    mask = (o_r < run)[:, None] & (o_f < columns)[None, :]
    p_out = p_sums + (tl.program_id(2).to(tl.int64) * all_columns + group * columns + o_f)[None, :] * (TAPS * QUANTIZERS * run)
    p_out += tap * QUANTIZERS * run + o_r[:, None]
    for m in tl.static_range(QUANTIZERS):
        if SAMPLED:
            b_sum = acc[m] * pick(b_quantizer, step, M)
        else:
            b_sum = acc[m] * step[m]
            if FIRST >= 0 and m != FIRST:
                b_sum = tl.where(acc[FIRST] == acc[FIRST], b_sum, acc[FIRST])
        tl.store(p_out + m * run, b_sum, mask=mask)


@triton.jit(do_not_specialize=FINISH_SIZES)
def mixed_conv_dw_kernel_finish(
    p_sums,  # [splits, total] float32, as mixed_conv_dw_kernel writes it
    p_dw,  # [groups · filters, M · channels, taps] any float type, strides w_f, w_c, w_t
    p_filter,  # as `FilterTable`, not read without SAMPLED
    p_quantizer,
    splits,
    total,
    filters,
    columns,
    channels,
    run,
    w_f,
    w_c,
    w_t,
    M: tl.constexpr,
    SAMPLED: tl.constexpr,
    TAPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sums over all splits, where they belong in the gradient; with SAMPLED, zeros for the other quantizers of a filter.
    Position k of a run is channel k mod channels of column k / channels; WIDTH columns make a run."""
    o_s = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = o_s < total
    b_sum = tl.zeros((BLOCK,), tl.float32)
    for _ in range(splits):
        b_sum += tl.load(p_sums + o_s, mask=mask, other=0.0)
        p_sums += total
    k = o_s % run
    o_s = o_s // run
    if SAMPLED:
        tap = o_s % TAPS
        o_s = o_s // TAPS
        quantizer = tl.load(p_quantizer + o_s // BF, mask=mask, other=-1)
        b_f = tl.load(p_filter + o_s, mask=mask & (quantizer >= 0), other=-1)
        mask = mask & (b_f >= 0)
        b_f = o_s // columns * filters + b_f
    else:
        quantizer = o_s % M
        o_s = o_s // M
        tap = o_s % TAPS
        b_f = o_s // TAPS
    p_out = p_dw + b_f * w_f + k % channels * w_c + (tap * WIDTH + k // channels) * w_t
    if SAMPLED:
        for m in tl.static_range(M):
            tl.store(p_out + m * channels * w_c, tl.where(quantizer == m, b_sum, 0.0).to(p_dw.dtype.element_ty), mask=mask)
    else:
        tl.store(p_out + quantizer * channels * w_c, b_sum.to(p_dw.dtype.element_ty), mask=mask)


def weight_shape(x: Tensor, grad: Tensor, kernel: Sequence[int], m: int, sampled: bool, g: Geometry) -> WeightShape:
    channels, (kh, kw) = x.size(1), kernel
    merged = g.groups == 1 and channels < 16 and kw > 1 and g.dilation[1] == 1
    run, taps = (channels * kw, kh) if merged else (channels // g.groups, kh * kw)
    return WeightShape(
        grad.size(0) * grad.size(2) * grad.size(3), grad.size(1) // g.groups, run, taps, merged, g.groups, 1 if sampled else m,
        x.element_size(), grad.element_size(),
    )  # fmt: skip


def constants(
    s: WeightShape, tile: WeightTile, columns: int, steps: Sequence[float], zero_point: Sequence[float], sampled: bool, g: Geometry
) -> dict[str, Any]:
    """The compile-time arguments that follow from the geometry and the quantizers; columns: filters per group, padded if sorted."""
    plain = s.taps == 1 and not s.merged and g.stride == (1, 1) and g.padding == (0, 0)
    return {
        "M": len(steps), "STEPS": tuple(steps), "ZERO": tuple(zero_point), "SAMPLED": sampled, "TAPS": s.taps, "MERGED": s.merged,
        "FIRST": next((m for m, n in enumerate(steps) if n != 0), -1), "PLAIN": plain,
        "STRIDE": g.stride, "PADDING": g.padding, "DILATION": g.dilation,
        "EVEN_RUN": s.run % tile.dw_m == 0, "EVEN": columns % tile.dw_n == 0, "BR": tile.dw_m, "BF": tile.dw_n, "BP": tile.dw_k,
    }  # fmt: skip


def backward_weight(
    grad: Tensor,
    d_weight: Tensor,
    x: Tensor,
    offset: Tensor,
    range: Tensor,
    steps: Sequence[float],
    zero_point: Sequence[float],
    choice: Tensor | None,
    geometry: Geometry,
) -> None:
    """Write the gradients of all V_m into d_weight (contiguous or channels_last), multiplied in grad's dtype.

    grad, x        [N, CO, OH, OW], [N, C, H, W], any float dtype; copied unless channels_last and dense
    d_weight       [CO, M·C/groups, kh, kw]
    offset, range  [M] float32, contiguous
    choice         [CO] int64: only the gradient of quantizer choice[f] is computed for filter f, the others are zero; None: all
    """
    g, m, sampled = geometry, len(steps), choice is not None
    x = x.contiguous(memory_format=torch.channels_last)
    s = weight_shape(x, grad, d_weight.shape[2:], m, sampled, g)
    tile = launch_conv_grad.weight_tile(s, device_of(x))
    with guard(x):
        if choice is None:
            filters, quantizers, columns = offset, offset, s.filters
            dy = grad.contiguous(memory_format=torch.channels_last)
        else:
            filters, quantizers = table = filter_table(choice, g.groups, m, tile.dw_n)
            columns = filters[0].numel()
            dy = sort_grad(grad, table)
        tiles = triton.cdiv(columns, tile.dw_n)
        share = triton.cdiv(triton.cdiv(s.pixels, tile.dw_k), tile.dw_splits) * tile.dw_k
        splits = triton.cdiv(s.pixels, share)
        sums = layout.empty((splits, g.groups * columns, s.taps, s.quantizers, s.run), x, torch.float32)
        total = sums[0].numel()
        mixed_conv_dw_kernel[(triton.cdiv(s.run, tile.dw_m) * s.taps * tiles, g.groups, splits)](
            x, dy, sums, offset, range, quantizers, s.pixels, share, grad.size(2), grad.size(3), x.size(2), x.size(3),
            x.size(1), s.run, columns, tiles, **constants(s, tile, columns, steps, zero_point, sampled, g),
            COLUMNS=1 if s.merged else d_weight.size(3), ALIGN_X=math.gcd(s.run, x.size(1), 16), ALIGN_G=math.gcd(columns, 16),
            PRECISION=precision(grad.dtype), num_warps=tile.dw_warps, num_stages=tile.dw_stages,
        )  # fmt: skip
        block = 32768 if device_of(x).interpreted else 512
        channels = d_weight.size(1) // m
        mixed_conv_dw_kernel_finish[(triton.cdiv(total, block),)](
            sums, d_weight, filters, quantizers, splits, total, s.filters, columns, channels, s.run, *tap_strides(d_weight),
            M=m, SAMPLED=sampled, TAPS=s.taps, WIDTH=s.run // channels, BF=tile.dw_n, BLOCK=block, num_warps=4,
        )  # fmt: skip

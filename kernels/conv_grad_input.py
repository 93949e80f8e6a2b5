"""The input gradient of the mixed convolution: dA_m = convᵀ(dy, V_m) for all m at once, and what it says about x, β_m and r_m.

A product over taps and filters. A program holds M accumulators for its pixels and channels and loads each tile of dy once for all of
them; then it reads x, computes the codes again and writes dx and two partial sums for each quantizer, which a second kernel adds in a
fixed order. With sampled filters, which are sorted by quantizer, it does so for one quantizer after the other.

With stride s, a position of x is reached by every s-th tap only. Positions are split into s_h·s_w classes by their remainders; in a class
the same taps reach all positions, and the product is that of stride 1.
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
from .candidates import FULL, MAGIC, aligned, device_of, guard
from .conv_common import dot, inside, load_quantizers, precision
from .conv_grad_pack import pack_grad, sort_grad
from .conv_pack import filter_table
from .launch_conv_grad import InputShape, InputTile
from .reference_conv import Geometry

SIZES = ("batch", "height", "width", "out_h", "out_w", "channels", "columns", "blocks", "tiles")
_OUTSIDE = tl.constexpr(-(2**30))


@triton.jit
def reach(remainder, K: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr):
    """The taps that reach input positions with this remainder mod STRIDE: the first one, their number, and which output position the
    first one connects with input position `remainder`."""
    first = remainder * 0
    count = remainder * 0
    for k in tl.static_range(K):
        hit = (remainder + PADDING + (K * STRIDE - k) * DILATION) % STRIDE == 0
        first = tl.where(hit & (count == 0), k, first)
        count += hit.to(tl.int32)
    return first, count, (remainder + PADDING - first * DILATION) // STRIDE


@triton.jit
def products(
    acc, p_rows, p_blocks, o_h, o_w, o_k, out_h, out_w, columns, blocks, first_block, last_block, row,
    first_h, first_w, count_h, count_w, KW: tl.constexpr, TAP: tl.constexpr, MOVE: tl.constexpr, ACTIVE: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """acc[m] + Σ over taps and the filters of blocks first_block … last_block − 1 of dy·V_m, for the active ones of the accumulators."""
    own = last_block - first_block
    for t in range(count_h * count_w * own):
        tap = t // own
        block = t - tap * own + first_block
        t_h = tap // count_w
        t_w = tap - t_h * count_w
        m_g = (inside(o_h - t_h * MOVE[0], out_h) & inside(o_w - t_w * MOVE[1], out_w))[:, None]
        if not EVEN:
            m_g = m_g & (o_k < columns - block * BK)[None, :]
        b_g = tl.load(p_rows + (block * BK - (t_h * MOVE[0] * out_w + t_w * MOVE[1]) * row), mask=m_g, other=0.0)
        at = ((first_h + t_h * TAP[0]) * KW + first_w + t_w * TAP[1]) * blocks + block
        added = ()
        for m in tl.static_range(len(ACTIVE)):
            if ACTIVE[m]:
                added += (dot(b_g, tl.load(p_blocks + (at * len(ACTIVE) + m) * (BN * BK)), acc[m], PRECISION),)
            else:
                added += (acc[m],)
        acc = added
    return acc


@triton.jit(do_not_specialize=SIZES)
def mixed_conv_dx_kernel(
    p_g,  # [N, OH, OW, groups · columns]: dy, its filters in the order of `FilterTable` with SAMPLED
    p_v,  # blocks of `pack_grad`
    p_x,  # [N, H, W, groups · channels] any float type
    p_dx,  # like x, or [N, groups · channels, H, W] without LAST
    p_sums,  # [2, M, programs] float32: the parts of dβ and of dr
    p_offset,  # [M] float32
    p_range,  # [M] float32
    p_quantizer,  # as `FilterTable`, not read without SAMPLED
    batch,
    height,
    width,
    out_h,
    out_w,
    channels,
    columns,
    blocks,
    tiles,
    M: tl.constexpr,
    STEPS: tl.constexpr,
    ZERO: tl.constexpr,
    SAMPLED: tl.constexpr,
    ACTIVE: tl.constexpr,
    NONE: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    TAP: tl.constexpr,
    MOVE: tl.constexpr,
    EVEN: tl.constexpr,
    ALIGN_G: tl.constexpr,
    ALIGN_X: tl.constexpr,
    LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BT: tl.constexpr,
):
    """dx = Σ_m inside_m·dA_m and the partial sums. A program owns BM positions of one class and BN channels of one group.

    ACTIVE     the accumulators of which products are taken; NONE: no quantizer contributes anything
    TAP, MOVE  distance of the taps that reach a position, and of the output positions that they connect it with
    BT         a power of two that is at least `blocks`
    """
    columns = aligned(columns, ALIGN_G)
    channels = aligned(channels, ALIGN_X)
    inverse, shift, _, _ = load_quantizers(p_offset, p_range, M, STEPS, ZERO)
    kind = tl.program_id(0) % (STRIDE[0] * STRIDE[1])
    pair = tl.program_id(0) // (STRIDE[0] * STRIDE[1])
    tile = pair % tiles
    i_m = (pair // tiles).to(tl.int64) * BM
    group = tl.program_id(1).to(tl.int64)
    c_h = kind // STRIDE[1]
    c_w = kind % STRIDE[1]
    first_h, count_h, at_h = reach(c_h, KERNEL[0], STRIDE[0], PADDING[0], DILATION[0])
    first_w, count_w, at_w = reach(c_w, KERNEL[1], STRIDE[1], PADDING[1], DILATION[1])

    # positions of the class: (n, c_h + STRIDE·h, c_w + STRIDE·w)
    class_w = tl.maximum(tl.cdiv(width - c_w, STRIDE[1]), 1)
    plane = tl.maximum(tl.cdiv(height - c_h, STRIDE[0]), 1) * class_w
    o_m = tl.arange(0, BM)
    o_n = tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    first_n = i_m // plane
    o_p = (i_m - first_n * plane).to(tl.int32) + o_m
    b_n = first_n + o_p // plane
    o_p = o_p % plane
    m_m = (b_n < batch) & (c_h < height) & (c_w < width)
    b_h = o_p // class_w
    b_w = o_p % class_w
    o_h = b_h + at_h
    o_w = b_w + at_w
    row = tl.num_programs(1) * columns
    p_rows = p_g + ((b_n * out_h + o_h) * out_w + o_w)[:, None] * row + group * columns + o_k[None, :]
    p_blocks = p_v + (group * tiles + tile) * (KERNEL[0] * KERNEL[1] * blocks) * (len(ACTIVE) * BN * BK)
    p_blocks += o_n[None, :] * BK + o_k[:, None]
    o_h = tl.where(m_m, o_h, _OUTSIDE)

    empty = tl.zeros((BM, BN), tl.float32)
    if SAMPLED:
        o_t = tl.arange(0, BT)
        b_t = tl.load(p_quantizer + group * blocks + o_t, mask=o_t < blocks, other=-1)
        b_t = tl.where(b_t < 0, M, b_t)
    else:
        acc = ()
        for _ in tl.static_range(M):
            acc += (empty,)
        acc = products(
            acc, p_rows, p_blocks, o_h, o_w, o_k, out_h, out_w, columns, blocks, 0, blocks, row, first_h, first_w, count_h, count_w,
            KERNEL[1], TAP, MOVE, ACTIVE, EVEN, PRECISION, BN, BK,
        )  # fmt: skip

    b_c = tile * BN + o_n
    mask = m_m[:, None] & (b_c < channels)[None, :]
    all_channels = tl.num_programs(1) * channels
    b_h = c_h + b_h * STRIDE[0]
    b_w = c_w + b_w * STRIDE[1]
    at_x = ((b_n * height + b_h) * width + b_w)[:, None] * all_channels + group * channels + b_c[None, :]
    b_dx = tl.zeros((BM, BN), tl.float32)
    if NONE or not SAMPLED:
        b_x = tl.load(p_x + at_x, mask=mask, other=0.0).to(tl.float32)
    if NONE:
        b_dx = tl.where(b_x == b_x, 0.0, b_x)
    programs = tl.num_programs(0) * tl.num_programs(1)
    p_sum = p_sums + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    for m in tl.static_range(M):
        if STEPS[m] != 0:
            if SAMPLED:
                first_block = tl.sum((b_t < m).to(tl.int32), axis=0)
                last_block = first_block + tl.sum((b_t == m).to(tl.int32), axis=0)
                (b_a,) = products(
                    (empty,), p_rows, p_blocks, o_h, o_w, o_k, out_h, out_w, columns, blocks, first_block, last_block, row,
                    first_h, first_w, count_h, count_w, KERNEL[1], TAP, MOVE, ACTIVE, EVEN, PRECISION, BN, BK,
                )  # fmt: skip
                # again for each m: held, it would take as many registers as the product
                b_x = tl.load(p_x + at_x, mask=mask, other=0.0).to(tl.float32)
            else:
                b_a = acc[m]
            # the saturation swallows a NaN of x, which every result must show
            b_a = tl.where(b_x == b_x, b_a, b_x)
            if STEPS[m] == FULL:
                b_dx += b_a
            else:
                b_u = b_x * inverse[m] + shift[m]
                b_c = tl.clamp(b_u, 0.0, 1.0)
                # both comparisons are false for a NaN, which thus goes on in b_a, and together they are one instruction
                b_inside = tl.where((b_c < b_u) | (b_c > b_u), 0.0, b_a)
                b_dx += b_inside
                # inside, dA/dr is q/n − u; outside, where q/n and c are the same, c − z/n
                b_outside = b_a - b_inside
                b_r = b_a * (((b_c * STEPS[m] + MAGIC) - MAGIC) * (1 / STEPS[m]) - b_c) + b_outside * b_c
                d_offset = tl.sum(b_outside)
                tl.store(p_sum + m * programs, d_offset)
                tl.store(p_sum + (M + m) * programs, tl.sum(b_r) - d_offset * (ZERO[m] / STEPS[m]))
    if LAST:
        at_dx = at_x
    else:
        b_f = group * channels + tile * BN + o_n
        at_dx = ((b_n * all_channels * height + b_h) * width + b_w)[:, None] + b_f[None, :] * height * width
    tl.store(p_dx + at_dx, b_dx.to(p_dx.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["programs"])
def mixed_conv_dx_kernel_finish(p_sums, p_d_offset, p_d_range, programs, M: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """dβ_m and dr_m, for the m of the program, from [2, M, programs] partial sums; zero where there is nothing to learn."""
    i_m = tl.program_id(0)
    wanted = i_m < 0
    for m in tl.static_range(M):
        if STEPS[m] > 0:
            wanted |= i_m == m
    o_p = tl.arange(0, BLOCK)
    b_offset = tl.zeros((BLOCK,), tl.float32)
    b_range = tl.zeros((BLOCK,), tl.float32)
    for i_p in range(0, programs, BLOCK):
        mask = wanted & (o_p < programs - i_p)
        b_offset += tl.load(p_sums + i_m.to(tl.int64) * programs + i_p + o_p, mask=mask, other=0.0)
        b_range += tl.load(p_sums + (M + i_m).to(tl.int64) * programs + i_p + o_p, mask=mask, other=0.0)
    tl.store(p_d_offset + i_m, tl.sum(b_offset))
    tl.store(p_d_range + i_m, tl.sum(b_range))


def input_shape(x: Tensor, grad: Tensor, m: int, sampled: bool, g: Geometry) -> InputShape:
    rows, cols = (triton.cdiv(size, stride) for size, stride in zip(x.shape[2:], g.stride, strict=True))
    return InputShape(
        x.size(0) * rows * cols, x.size(1) // g.groups, grad.size(1) // g.groups, g.groups, math.prod(g.stride), m, sampled,
        x.element_size(), grad.element_size(),
    )  # fmt: skip


def constants(
    tile: InputTile, kernel: Sequence[int], columns: int, steps: Sequence[float], zero_point: Sequence[float], sampled: bool, g: Geometry
) -> dict[str, Any]:
    """The compile-time arguments that follow from the geometry and the quantizers; columns: filters per group, padded if sorted."""
    common = [math.gcd(*pair) for pair in zip(g.stride, g.dilation, strict=True)]
    return {
        "M": len(steps), "STEPS": tuple(steps), "ZERO": tuple(zero_point), "SAMPLED": sampled,
        "ACTIVE": (True,) if sampled else tuple(n != 0 for n in steps), "NONE": not any(steps),
        "KERNEL": tuple(kernel),
        "STRIDE": g.stride, "PADDING": g.padding, "DILATION": g.dilation,
        "TAP": tuple(s // c for s, c in zip(g.stride, common, strict=True)),
        "MOVE": tuple(d // c for d, c in zip(g.dilation, common, strict=True)),
        "EVEN": columns % tile.dx_k == 0, "BM": tile.dx_m, "BN": tile.dx_n, "BK": tile.dx_k,
    }  # fmt: skip


def backward_input(
    grad: Tensor,
    dx: Tensor,
    d_offset: Tensor,
    d_range: Tensor,
    x: Tensor,
    weight: Tensor,
    offset: Tensor,
    range: Tensor,
    steps: Sequence[float],
    zero_point: Sequence[float],
    choice: Tensor | None,
    geometry: Geometry,
) -> None:
    """Write the gradients of x, β and r into dx (contiguous or channels_last), d_offset and d_range, multiplied in grad's dtype.

    grad, x, weight  [N, CO, OH, OW], [N, C, H, W], [CO, M·C/groups, kh, kw], any float dtype; copied unless channels_last and dense
    offset, range    [M] float32, contiguous, as d_offset and d_range
    choice           [CO] int64: the only quantizer of each filter, or None
    """
    g, m, sampled = geometry, len(steps), choice is not None
    x = x.contiguous(memory_format=torch.channels_last)
    s = input_shape(x, grad, m, sampled, g)
    tile = launch_conv_grad.input_tile(s, device_of(x))
    with guard(x):
        if choice is None:
            table, columns = None, s.filters
            dy = grad.contiguous(memory_format=torch.channels_last)
        else:
            table = filter_table(choice, g.groups, m, tile.dx_k)
            columns = table.filters[0].numel()
            dy = sort_grad(grad, table)
        v = pack_grad(weight, grad.dtype, m, g.groups, table, tile.dx_n, tile.dx_k)
        tiles, blocks = v.size(1), v.size(3)
        grid = (triton.cdiv(s.pixels, tile.dx_m) * tiles * s.classes, g.groups)
        sums = layout.empty((2, m, math.prod(grid)), x, torch.float32)
        mixed_conv_dx_kernel[grid](
            dy, v, x, dx, sums, offset, range, offset if table is None else table.quantizers,
            x.size(0), x.size(2), x.size(3), grad.size(2), grad.size(3), s.channels, columns, blocks, tiles,
            **constants(tile, weight.shape[2:], columns, steps, zero_point, sampled, g),
            ALIGN_G=math.gcd(columns, 16), ALIGN_X=math.gcd(s.channels, 16),
            LAST=dx.is_contiguous(memory_format=torch.channels_last), PRECISION=precision(grad.dtype),
            BT=triton.next_power_of_2(blocks), num_warps=tile.dx_warps, num_stages=tile.dx_stages,
        )  # fmt: skip
        mixed_conv_dx_kernel_finish[(m,)](sums, d_offset, d_range, sums.size(2), M=m, STEPS=tuple(steps), BLOCK=1024, num_warps=4)

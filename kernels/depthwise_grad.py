"""The backward pass of the depthwise mixed convolution.

An input (h, w) meets the outputs o with o·stride − padding + tap·dilation = (h, w), for every tap at most one. One kernel walks down strips
of inputs with the rows of dy around them in registers, so it reads x and dy once:

    D_m = Σ_taps V_m·dy        dx = Σ_m D_m · Σ_{k in m} p_k·inside_k        dV_m[tap] = Σ X_m·dy

and the sums A, T, O, G of quantize_grad.py for the activation candidates, with D_m in the place of the gradient. Where dV has more taps
than registers can hold sums for (7×7 with several groups), further launches of the same kernel take the remaining
ones."""

# The arguments of a @triton.jit function have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment"

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch as launch_module
from . import launch_depthwise as launch
from .candidates import FULL, aligned, code, device_of, guard
from .depthwise_tile import (
    SIZES,
    activation,
    block,
    candidate_constants,
    first_source,
    last_source,
    load_activation,
    load_row,
    load_taps,
    partner,
    position,
    strides,
    zeros,
)
from .finish import finish_constants, mix_quantize_bwd_kernel_finish
from .launch_depthwise import Pair


@triton.jit
def fold(b_v, BP: tl.constexpr, BC: tl.constexpr, VECTOR: tl.constexpr):
    """Sum of the VECTOR channels that one thread holds: [BP, BC // VECTOR], without a shuffle."""
    return tl.sum(tl.reshape(b_v, (BP, BC // VECTOR, VECTOR)), axis=2) if VECTOR > 1 else b_v


@triton.jit
def store_total(p_sums, b_sum, slot):
    """Write the sum of a program's block as partial sum number `slot`; p_sums is [slots, programs]."""
    tl.store(p_sums + slot * tl.num_programs(0) + tl.program_id(0), tl.sum(tl.sum(b_sum, axis=1), axis=0))


@triton.jit
def accumulate(
    b_x, b_g, b_d, candidates, sum_a, sum_t, sum_i, m: tl.constexpr, K: tl.constexpr, STEPS: tl.constexpr, ZERO: tl.constexpr,
    GROUPS: tl.constexpr, OUTSIDE: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Add the candidates of group m: p·g·inside to b_d, and their terms to the sums A, T and Σ_inside g."""
    inverse, shift, weight, _, _ = candidates
    next_a = ()
    next_t = ()
    next_i = ()
    for k in tl.static_range(K):
        b_a = sum_a[k]
        b_t = sum_t[k]
        b_i = sum_i[k]
        if GROUPS[k] == m:
            if STEPS[k] > 0:
                b_u = b_x * inverse[k] + shift[k]
                b_q = tl.clamp(b_u, 0.0, 1.0)
                # both comparisons are false for a NaN, which thus goes on as g, and together they are one instruction
                b_in = tl.where((b_q < b_u) | (b_q > b_u), 0.0, b_g)
                b_a += fold(b_g * code(b_q, STEPS[k], ZERO[k], False), BP, BC, VECTOR)
                b_t += fold(b_in * (b_q - ZERO[k] / STEPS[k]), BP, BC, VECTOR)
                if OUTSIDE:
                    b_i += fold(b_in, BP, BC, VECTOR)
                b_d += weight[k] * b_in
            elif STEPS[k] == FULL:
                b_a += fold(b_g * b_x, BP, BC, VECTOR)
                b_d += weight[k] * b_g
        next_a += (b_a,)
        next_t += (b_t,)
        next_i += (b_i,)
    return b_d, next_a, next_t, next_i


@triton.jit(do_not_specialize=SIZES)
def depthwise_bwd_kernel(
    p_x,  # [N, C, H, W] any float type
    p_z,  # dy [N, C, OH, OW] any float type
    p_d,  # dx [N, C, H, W] any float type
    p_v,  # [M, KH·KW, C] float32
    p_sums,  # [3K + M, programs] float32: A, T, O per candidate and G per group
    p_d_v,  # [C, M·KH·KW, splits] float32, not written without FUSED
    p_offset,  # [1, K] float32
    p_range,  # [1, K] float32
    p_p,  # [1, K] float32
    strips,
    strip_count,
    strip_columns,
    rows,
    channels,
    height,
    width,
    out_height,
    out_width,
    x_sample,
    x_channel,
    x_row,
    x_column,
    z_sample,
    z_channel,
    z_row,
    z_column,
    d_sample,
    d_channel,
    d_row,
    d_column,
    K: tl.constexpr,
    STEPS: tl.constexpr,
    ZERO: tl.constexpr,
    GROUPS: tl.constexpr,
    OUTSIDE: tl.constexpr,
    ACTIVE: tl.constexpr,
    INPUT: tl.constexpr,
    FROM: tl.constexpr,
    TO: tl.constexpr,
    VECTOR: tl.constexpr,
    M: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    S: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
    EVEN: tl.constexpr,
    ALIGN: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Strips of rows·SH × S inputs, S a multiple of the stride. Walks down the image with the rows of dy in registers that its inputs meet.

    INPUT     write dx and the sums for the activation
    FROM, TO  write dV of the taps FROM … TO−1 of all M·KH·KW
    """
    tl.static_assert(S % SW == 0)
    if UNIT:
        channels = aligned(channels, ALIGN)
    x_sample, x_channel, x_row, x_column = strides(x_sample, x_channel, x_row, x_column, ALIGN, UNIT)
    z_sample, z_channel, z_row, z_column = strides(z_sample, z_channel, z_row, z_column, ALIGN, UNIT)
    d_sample, d_channel, d_row, d_column = strides(d_sample, d_channel, d_row, d_column, ALIGN, UNIT)
    i_n, i_h, i_w, o_c, m_p, m_c = block(strips, strip_count, strip_columns, channels, BP, BC, EVEN)
    candidates = load_activation(p_offset, p_range, p_p, K, STEPS, ZERO)
    taps = load_taps(p_v, o_c, m_c, channels, M * KH * KW)
    TAPS: tl.constexpr = KH * KW
    DEPTH: tl.constexpr = last_source(SH, PH, SH) - first_source(PH, SH, DH, KH) + 1
    BREADTH: tl.constexpr = last_source(S, PW, SW) - first_source(PW, SW, DW, KW) + 1
    o_h = i_h * rows * SH
    o_w = i_w * S
    o_z = i_h * rows + first_source(PH, SH, DH, KH)
    o_e = i_w * (S // SW) + first_source(PW, SW, DW, KW)
    p_in = p_x + position(i_n, o_h, o_w, o_c, x_sample, x_channel, x_row, x_column)
    p_out = p_d + position(i_n, o_h, o_w, o_c, d_sample, d_channel, d_row, d_column)
    p_grad = p_z + position(i_n, o_z, o_e, o_c, z_sample, z_channel, z_row, z_column)
    sum_a = zeros(K, BP, BC // VECTOR)
    sum_t = zeros(K, BP, BC // VECTOR)
    sum_i = zeros(K, BP, BC // VECTOR)
    sum_g = zeros(M, BP, BC // VECTOR)
    sum_v = zeros(TO - FROM, BP, BC)
    window = ()
    for _ in tl.static_range(DEPTH - 1):
        m_z = m_p & (o_z >= 0) & (o_z < out_height)
        window += load_row(p_grad, z_column, o_e, out_width, m_z, m_c, BREADTH)
        o_z += 1
        p_grad += z_row
    for _ in range(rows):
        m_z = m_p & (o_z >= 0) & (o_z < out_height)
        grads = window + load_row(p_grad, z_column, o_e, out_width, m_z, m_c, BREADTH)
        for f in tl.static_range(SH):
            for s in tl.static_range(S):
                mask = m_p & (o_h + f < height) & (o_w + s < width) & m_c
                b_x = tl.load(p_in + (f * x_row + s * x_column), mask=mask, other=0.0).to(tl.float32)
                valid = mask & (b_x == b_x)
                b_d = tl.zeros((BP, BC), tl.float32) if ACTIVE else tl.where(b_x == b_x, 0.0, b_x)
                for m in tl.static_range(M):
                    if INPUT:
                        b_g = tl.zeros((BP, BC), tl.float32)
                        for i in tl.static_range(TAPS):
                            if partner(f, s, i, KH, KW, SH, SW, PH, PW, DH, DW, BREADTH) >= 0:
                                b_g += taps[m * TAPS + i] * grads[partner(f, s, i, KH, KW, SH, SW, PH, PW, DH, DW, BREADTH)]
                        b_g = tl.where(valid, b_g, b_x)
                        b_d, sum_a, sum_t, sum_i = accumulate(
                            b_x, b_g, b_d, candidates, sum_a, sum_t, sum_i, m, K, STEPS, ZERO, GROUPS, OUTSIDE, BP, BC, VECTOR
                        )
                        next_g = ()
                        for n in tl.static_range(M):
                            next_g += (sum_g[n] + fold(b_g, BP, BC, VECTOR) if n == m else sum_g[n],)
                        sum_g = next_g
                    if m * TAPS < TO and m * TAPS + TAPS > FROM:
                        b_m = activation(b_x, mask, candidates, m, K, STEPS, ZERO, GROUPS)
                        next_v = ()
                        for n in tl.static_range(FROM, TO):
                            if n // TAPS == m and partner(f, s, n % TAPS, KH, KW, SH, SW, PH, PW, DH, DW, BREADTH) >= 0:
                                b_z = grads[partner(f, s, n % TAPS, KH, KW, SH, SW, PH, PW, DH, DW, BREADTH)]
                                next_v += (sum_v[n - FROM] + b_m * b_z,)
                            else:
                                next_v += (sum_v[n - FROM],)
                        sum_v = next_v
                if INPUT:
                    tl.store(p_out + (f * d_row + s * d_column), b_d.to(p_d.dtype.element_ty), mask=mask)
        window = grads[BREADTH:]
        o_z += 1
        o_h += SH
        p_grad += z_row
        p_in += SH * x_row
        p_out += SH * d_row
    if INPUT:
        for k in tl.static_range(K):
            store_total(p_sums, sum_a[k], k)
            store_total(p_sums, sum_t[k], K + k)
            if OUTSIDE:
                store_total(p_sums, sum_g[GROUPS[k]] - sum_i[k], 2 * K + k)
        for m in tl.static_range(M):
            store_total(p_sums, sum_g[m], 3 * K + m)
    blocks = tl.cdiv(channels, BC)
    i_split = tl.program_id(0) // blocks
    for n in tl.static_range(FROM, TO):
        b_v = tl.sum(sum_v[n - FROM], axis=0)[None, :]
        tl.store(p_d_v + (o_c * (M * TAPS) + n) * (tl.num_programs(0) // blocks) + i_split, b_v, mask=m_c)


def backward(
    grad: Tensor,
    dx: Tensor,
    x: Tensor,
    v: Tensor,
    offset: Tensor,
    range: Tensor,
    p: Tensor,
    steps: Sequence[float],
    zero_point: Sequence[float],
    groups: Sequence[int],
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    need_offset: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Write the gradient of x into `dx`; return those of V [C, M·KH·KW], offset, range and p [1, K], float32.

    grad  [N, C, OH, OW], any float dtype, any strides; the others as in `forward`. d_offset is zero without need_offset.
    Moves 2·x.nbytes + grad.nbytes; where the sums of V do not fit beside that, x and grad are read again for every row of taps.
    """
    shape = launch.describe(x, grad, kernel, stride, padding, dilation, max(groups) + 1, dx)
    tile = launch.backward(shape, device_of(x))
    programs, splits = launch.programs(shape, tile, inputs=True), launch.splits(shape, tile, inputs=True)
    sums = torch.empty(3 * len(steps) + shape.groups, 1, programs, dtype=torch.float32, device=x.device)
    d_v = torch.empty(shape.channels, shape.groups * shape.taps, splits, dtype=torch.float32, device=x.device)
    small = [torch.empty_like(p) for _ in "βrp"]
    final = launch_module.finish(1, programs)
    with guard(x):
        for pass_constants in grad_constants(shape, tile, steps, need_offset):
            depthwise_bwd_kernel[(programs,)](
                x, grad, dx, v, sums, d_v, offset, range, p, **launch.sizes(shape, tile, inputs=True),
                **launch.strides("x", x), **launch.strides("z", grad), **launch.strides("d", dx), **launch.constants(shape, tile),
                **candidate_constants(steps, zero_point, groups), **pass_constants, num_warps=tile.strip_warps, enable_fp_fusion=True,
            )  # fmt: skip
        mix_quantize_bwd_kernel_finish[(1, len(steps))](
            sums, offset, range, p, *small, 1, programs, **finish_constants(final, steps, groups, need_offset),
            num_warps=final.finish_warps, enable_fp_fusion=True,
        )  # fmt: skip
    return d_v.sum(-1), small[0], small[1], small[2]


def grad_constants(shape: launch.Shape, tile: launch.DepthwiseTile, steps: Sequence[float], need_offset: bool) -> list[dict[str, object]]:
    """The compile-time arguments that only the backward kernel has, for each of its launches."""
    shared = {"OUTSIDE": need_offset, "ACTIVE": any(n != 0 for n in steps), "VECTOR": tile.vector}
    taps, each = shape.groups * shape.taps, tile.strip_taps
    return [{**shared, "INPUT": n == 0, "FROM": n, "TO": min(n + each, taps)} for n in range(0, taps, each)]

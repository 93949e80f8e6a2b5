"""The backward pass of mix_quantize: one kernel that reads x and the gradients once; finish.py has the small one that finishes the sums.

Nothing is kept from the forward pass but x; codes are computed again. The sums over elements are A = Σ g·(q − z), T = Σ_inside g·(u − z/n),
O = Σ_outside g and G = Σ g; a clipped element sits in A through its saturated code. Candidates that clip alike (see `candidates.clips`)
share u, the mask, T and O, and then each of them costs the three instructions of A only. Sums are deterministic: every program of the
first kernel writes one row of float32 partial sums, which the second kernel adds in a fixed order.
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

from . import candidates, launch
from . import layout as layout_module
from .candidates import FULL, SIZES, aligned, code, load_candidates, offsets, uniform
from .finish import finish_constants, mix_quantize_bwd_kernel_finish
from .layout import Layout

__all__ = ["backward", "finish_constants", "grad_constants", "mix_quantize_bwd_kernel", "mix_quantize_bwd_kernel_finish"]


@triton.jit
def fold(b_v, BO: tl.constexpr, BC: tl.constexpr, BI: tl.constexpr, ROWS: tl.constexpr, VECTOR: tl.constexpr):
    """Sum of the elements that one thread holds, VECTOR neighbours or ROWS rows: [BO // ROWS, BC, BI // VECTOR], without a shuffle."""
    if VECTOR > 1:
        b_v = tl.sum(tl.reshape(b_v, (BO, BC, BI // VECTOR, VECTOR)), axis=3)
    elif ROWS > 1:
        b_v = tl.sum(tl.reshape(b_v, (ROWS, BO // ROWS, BC, BI)), axis=0)
    return b_v


@triton.jit
def clip_weights(weight, STEPS: tl.constexpr, PART: tl.constexpr, THROUGH: tl.constexpr):
    """For each k, the sum of the weights of the candidates of part k whose gradient to x the clip masks."""
    merged = ()
    for k in tl.static_range(len(STEPS)):
        b_weight = tl.zeros_like(weight[k])
        for j in tl.static_range(len(STEPS)):
            if STEPS[j] > 0 and PART[j] == k and not THROUGH[j]:
                b_weight += weight[j]
        merged += (b_weight,)
    return merged


@triton.jit
def store_sum(p_sums, b_sum, slot, channels, o_c, m_c):
    """Write the sum over a program's tiles, [BC], as partial sum number `slot`."""
    i_split = tl.program_id(1) * tl.num_programs(2) + tl.program_id(2)
    splits = tl.num_programs(1) * tl.num_programs(2)
    b_total = tl.sum(tl.sum(b_sum, axis=2), axis=0)
    tl.store(p_sums + (o_c + slot * channels) * splits + i_split, b_total, mask=m_c)


@triton.jit(do_not_specialize=SIZES)
def mix_quantize_bwd_kernel(
    p_x,  # [outer, channels, inner], any float type
    p_g,  # M of them, any float type
    p_dx,  # like x
    p_sums,  # [3K + M, channels, splits] float32: A, T, O per candidate and G per group
    p_offset,  # [channels, K] float32
    p_range,  # [channels, K] float32
    p_p,  # [channels, K] float32
    p_seed,  # [1] int64, not read without NOISE
    outer,
    channels,
    inner,
    x_outer,
    x_channel,
    y_outer,
    y_channel,
    y_group,
    K: tl.constexpr,
    M: tl.constexpr,
    STEPS: tl.constexpr,
    ZERO: tl.constexpr,
    GROUPS: tl.constexpr,
    CLIP: tl.constexpr,
    NOISE: tl.constexpr,
    ALIGN: tl.constexpr,
    UNIT: tl.constexpr,
    BO: tl.constexpr,
    BC: tl.constexpr,
    BI: tl.constexpr,
    PART: tl.constexpr,
    THROUGH: tl.constexpr,
    MASKED: tl.constexpr,
    OUTSIDE: tl.constexpr,
    ACTIVE: tl.constexpr,
    ROWS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """dx = Σ_k p_k·g_{m(k)}·inside_k and the partial sums. Reads x and M gradients once, writes dx."""
    x_outer = aligned(x_outer, ALIGN)
    y_outer = aligned(y_outer, ALIGN)
    y_group = aligned(y_group, ALIGN)
    if UNIT:
        channels = aligned(channels, ALIGN)
    else:
        inner = aligned(inner, ALIGN)
        x_channel = aligned(x_channel, ALIGN)
        y_channel = aligned(y_channel, ALIGN)
    o_o = tl.arange(0, BO)[:, None, None]
    o_c = tl.arange(0, BC)[None, :, None]
    o_i = tl.arange(0, BI)[None, None, :]
    block_o = tl.full((), BO, tl.int64)
    block_i = tl.full((), BI, tl.int64)
    i_c = tl.program_id(0).to(tl.int64) * BC
    m_c = o_c < channels - i_c
    inverse, shift, weight, _, _ = load_candidates(p_offset, p_range, p_p, i_c + o_c, m_c, K, STEPS, ZERO)
    o_x = offsets(o_o, o_c, o_i, x_outer, x_channel, UNIT)
    o_y = offsets(o_o, o_c, o_i, y_outer, y_channel, UNIT)
    first_x = i_c if UNIT else i_c * x_channel
    first_y = i_c if UNIT else i_c * y_channel
    if NOISE:
        seed = tl.load(p_seed)
    masked = clip_weights(weight, STEPS, PART, THROUGH)
    empty = tl.zeros((BO // ROWS, BC, BI // VECTOR), tl.float32)
    sum_a = ()
    sum_t = ()
    sum_i = ()
    sum_g = ()
    for _ in tl.static_range(K):
        sum_a += (empty,)
        sum_t += (empty,)
        sum_i += (empty,)
    for _ in tl.static_range(M):
        sum_g += (empty,)
    for t_o in range(tl.program_id(1), tl.cdiv(outer, BO), tl.num_programs(1)):
        for t_i in range(tl.program_id(2), tl.cdiv(inner, BI), tl.num_programs(2)):
            i_o = t_o * block_o
            i_i = 0 if UNIT else t_i * block_i
            mask = m_c & (o_i < inner - i_i) & (o_o < outer - i_o)
            at_x = first_x + i_o * x_outer + i_i
            b_x = tl.load(p_x + at_x + o_x, mask=mask, other=0.0).to(tl.float32)
            grads = ()
            next_g = ()
            for m in tl.static_range(M):
                at_y = first_y + i_o * y_outer + i_i + m * y_group
                b_g = tl.load(p_g + at_y + o_y, mask=mask, other=0.0).to(tl.float32)
                # the saturation swallows a NaN of x, which every sum must show
                b_g = tl.where(b_x == b_x, b_g, b_x)
                grads += (b_g,)
                next_g += (sum_g[m] + fold(b_g, BO, BC, BI, ROWS, VECTOR),)
            if NOISE:
                b_noise = uniform(seed, at_x + o_x)
            b_dx = tl.zeros((BO, BC, BI), tl.float32) if ACTIVE else tl.where(b_x == b_x, 0.0, b_x)
            clipped = ()
            outside = ()
            next_a = ()
            next_t = ()
            next_i = ()
            for k in tl.static_range(K):
                b_g = grads[GROUPS[k]]
                b_c = b_x
                b_outside = mask
                if STEPS[k] > 0:
                    if CLIP[k] == k:
                        b_u = b_x * inverse[k] + shift[k]
                        if NOISE:
                            b_v = b_u - ZERO[k] / STEPS[k]
                            b_u += b_noise * (1 / STEPS[k])
                        b_c = tl.clamp(b_u, 0.0, 1.0)
                        # both comparisons are false for a NaN, which thus goes on as g, and together they are one instruction
                        b_outside = (b_c < b_u) | (b_c > b_u)
                    else:
                        b_c = clipped[CLIP[k]]
                        b_outside = outside[CLIP[k]]
                    next_a += (sum_a[k] + fold(b_g * code(b_c, STEPS[k], ZERO[k], NOISE), BO, BC, BI, ROWS, VECTOR),)
                    if THROUGH[k]:
                        b_dx += weight[k] * b_g
                elif STEPS[k] == FULL:
                    next_a += (sum_a[k] + fold(b_g * b_x, BO, BC, BI, ROWS, VECTOR),)
                    b_dx += weight[k] * b_g
                else:
                    next_a += (sum_a[k],)
                clipped += (b_c,)
                outside += (b_outside,)
                if STEPS[k] > 0 and PART[k] == k:
                    b_in = tl.where(b_outside, 0.0, b_g)
                    # the clipped value where it will do, since an infinite one times zero would be NaN
                    b_t = tl.where(b_outside, 0.0, b_g * b_v) if NOISE else b_in * (b_c - ZERO[k] / STEPS[k])
                    next_t += (sum_t[k] + fold(b_t, BO, BC, BI, ROWS, VECTOR),)
                    next_i += (sum_i[k] + fold(b_in, BO, BC, BI, ROWS, VECTOR) if OUTSIDE else sum_i[k],)
                    if MASKED[k]:
                        b_dx += masked[k] * b_in
                else:
                    next_t += (sum_t[k],)
                    next_i += (sum_i[k],)
            tl.store(p_dx + at_x + o_x, b_dx.to(p_dx.dtype.element_ty), mask=mask)
            sum_a = next_a
            sum_t = next_t
            sum_i = next_i
            sum_g = next_g
    r_c = i_c + tl.arange(0, BC)
    m_r = r_c < channels
    for k in tl.static_range(K):
        if STEPS[k] != 0:
            store_sum(p_sums, sum_a[k], k, channels, r_c, m_r)
        if STEPS[k] > 0 and PART[k] == k:
            store_sum(p_sums, sum_t[k], K + k, channels, r_c, m_r)
            if OUTSIDE:
                store_sum(p_sums, sum_g[GROUPS[k]] - sum_i[k], 2 * K + k, channels, r_c, m_r)
    for m in tl.static_range(M):
        store_sum(p_sums, sum_g[m], 3 * K + m, channels, r_c, m_r)


def backward(
    grad: Tensor,
    x: Tensor,
    offset: Tensor,
    range: Tensor,
    p: Tensor,
    steps: Sequence[float],
    zero_point: Sequence[float],
    groups: Sequence[int],
    pass_through: Sequence[int],
    seed: Tensor | None,
    layout: Layout,
    need_offset: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients (dx, d_offset, d_range, d_p) of `forward`, given the gradient of its output in the output's layout.

    dx like x; the others [C, K] or [1, K] float32 like the parameters, contiguous, d_offset zero without need_offset.
    Moves 2·x.nbytes + grad.nbytes, and (3K + M)·C·splits partial sums.
    """
    v = launch.view(layout)
    steps, zero_point, groups = tuple(steps), tuple(zero_point), tuple(groups)
    rows, noise = p.size(0), seed is not None
    shared = candidates.one_clip(offset, range) and not noise
    state = candidates.state(steps, zero_point, groups, shared, True, need_offset)
    tile = launch.backward(v, min(x.element_size(), grad.element_size()), candidates.device_of(x), state, noise, need_offset)
    offset, range, p = candidates.parameters(v, offset, range, p)
    dx = layout_module.empty_output(x, 1, x.dtype)
    small = [torch.empty_like(p) for _ in "βrp"]
    common = candidates.constants(v, tile, steps, zero_point, groups, noise, shared)
    own = grad_constants(v, tile, steps, zero_point, groups, pass_through, need_offset, shared)
    splits = tile.splits_outer * tile.splits_inner
    sums = torch.empty(3 * len(steps) + layout.groups, v.channels, splits, dtype=torch.float32, device=x.device)
    final = launch.finish(v.channels, splits)
    with candidates.guard(x):
        mix_quantize_bwd_kernel[candidates.grid(v, tile)](
            x, grad, dx, sums, offset, range, p, p if seed is None else seed, *candidates.sizes(v), **common, **own,
            num_warps=tile.warps, enable_fp_fusion=True,
        )  # fmt: skip
        mix_quantize_bwd_kernel_finish[(triton.cdiv(v.channels, final.finish_channels), len(steps))](
            sums, offset, range, p, *small, v.channels, splits, **finish_constants(final, steps, groups, need_offset, own["PART"]),
            num_warps=final.finish_warps, enable_fp_fusion=True,
        )  # fmt: skip
    if v.repeat > 1:
        small = [t.view(v.repeat, rows, -1).sum(0) for t in small]
    return dx, small[0], small[1], small[2]


def grad_constants(
    v: launch.View,
    tile: launch.Tile,
    steps: tuple[float, ...],
    zero_point: tuple[float, ...],
    groups: tuple[int, ...],
    pass_through: Sequence[int],
    need_offset: bool,
    shared: bool,
) -> dict[str, Any]:
    """The compile-time arguments that only the backward kernel has."""
    _, part = candidates.clips(steps, zero_point, groups, shared)
    masked = {part[k] for k, n in enumerate(steps) if n > 0 and not pass_through[k]}
    held = tile.block_outer * tile.block_channels // (32 * tile.warps * tile.vector) if v.unit else 1
    return {
        "PART": part,
        "THROUGH": tuple(bool(t) for t in pass_through),
        "MASKED": tuple(k in masked for k, _ in enumerate(steps)),
        "OUTSIDE": need_offset,
        "ACTIVE": any(n != 0 for n in steps),
        "ROWS": min(max(1, held), tile.block_outer),
        "VECTOR": tile.vector if tile.block_inner % tile.vector == 0 else 1,
    }

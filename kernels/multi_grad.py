"""The backward pass of mix_quantize for many weights: one launch, which writes the gradients of weights and parameters.

A row belongs to one program, which adds up A = Σ g·(q − z), T = Σ_inside g·(u − z/n), G = Σ g and, for the offset, Σ_inside g over it in a
fixed order, so there are neither partial sums nor atomics: the same inputs give the same bits.
"""

# The arguments of a @triton.jit function have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment"

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from . import layout, quantize_grad
from .candidates import FULL, aligned, code, guard, load_candidates
from .launch_multi import Network
from .multi_table import constants, launches, load_tile, pick, wide


@triton.jit
def fold(b_v, BR: tl.constexpr, BI: tl.constexpr, VECTOR: tl.constexpr):
    """Sum of the VECTOR neighbours that one thread holds: [BR, BI // VECTOR], without a shuffle."""
    return tl.sum(tl.reshape(b_v, (BR, BI // VECTOR, VECTOR)), axis=2) if VECTOR > 1 else b_v


@triton.jit
def backward_rows(
    p_x,
    p_g,
    p_dx,
    p_offset,
    p_range,
    p_p,
    p_d_offset,
    p_d_range,
    p_d_p,
    rows,
    row,
    repeat,
    inner,
    K: tl.constexpr,
    M: tl.constexpr,
    STEPS: tl.constexpr,
    ZERO: tl.constexpr,
    GROUPS: tl.constexpr,
    THROUGH: tl.constexpr,
    OUTSIDE: tl.constexpr,
    ACTIVE: tl.constexpr,
    BR: tl.constexpr,
    BI: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Gradients of `rows` rows, from the first ones at p_x, p_g and p_dx on; rows row … of the parameters."""
    inner = aligned(inner, VECTOR)
    o_r = tl.arange(0, BR)[:, None]
    o_i = tl.arange(0, BI)[None, :]
    for i_r in range(0, rows, BR):
        m_r = o_r < rows - i_r
        inverse, shift, weight, _, _ = load_candidates(p_offset, p_range, p_p, row + i_r + o_r, m_r, K, STEPS, ZERO)
        empty = tl.zeros((BR, BI // VECTOR), tl.float32)
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
        for j in range(repeat):
            run = (i_r + o_r).to(tl.int64) * repeat + j
            for i_i in range(0, inner, BI):
                mask = m_r & (o_i < inner - i_i)
                at_x = run * inner + i_i + o_i
                b_x = tl.load(wide(p_x, at_x, VECTOR), mask=mask, other=0.0).to(tl.float32)
                grads = ()
                next_g = ()
                for m in tl.static_range(M):
                    at_y = (run * M + m) * inner + i_i + o_i
                    b_g = tl.load(wide(p_g, at_y, VECTOR), mask=mask, other=0.0).to(tl.float32)
                    # the saturation swallows a NaN of x, which every sum must show
                    b_g = tl.where(b_x == b_x, b_g, b_x)
                    grads += (b_g,)
                    next_g += (sum_g[m] + fold(b_g, BR, BI, VECTOR),)
                b_dx = tl.zeros((BR, BI), tl.float32) if ACTIVE else tl.where(b_x == b_x, 0.0, b_x)
                next_a = ()
                next_t = ()
                next_i = ()
                for k in tl.static_range(K):
                    b_g = grads[GROUPS[k]]
                    if STEPS[k] > 0:
                        b_u = b_x * inverse[k] + shift[k]
                        b_c = tl.clamp(b_u, 0.0, 1.0)
                        # both comparisons are false for a NaN, which thus goes on as g, and together they are one instruction
                        outside = (b_c < b_u) | (b_c > b_u)
                        b_in = tl.where(outside, 0.0, b_g)
                        next_a += (sum_a[k] + fold(b_g * code(b_c, STEPS[k], ZERO[k], False), BR, BI, VECTOR),)
                        next_t += (sum_t[k] + fold(b_in * (b_c - ZERO[k] / STEPS[k]), BR, BI, VECTOR),)
                        next_i += (sum_i[k] + fold(b_in, BR, BI, VECTOR) if OUTSIDE else sum_i[k],)
                        b_dx += weight[k] * (b_g if THROUGH[k] else b_in)
                    else:
                        if STEPS[k] == FULL:
                            b_dx += weight[k] * b_g
                            next_a += (sum_a[k] + fold(b_g * b_x, BR, BI, VECTOR),)
                        else:
                            next_a += (sum_a[k],)
                        next_t += (sum_t[k],)
                        next_i += (sum_i[k],)
                tl.store(wide(p_dx, at_x, VECTOR), b_dx.to(p_dx.dtype.element_ty), mask=mask)
                sum_a = next_a
                sum_t = next_t
                sum_i = next_i
                sum_g = next_g
        total_g = ()
        for m in tl.static_range(M):
            total_g += (tl.sum(sum_g[m], axis=1, keep_dims=True),)
        for k in tl.static_range(K):
            o_k = (row + i_r + o_r) * K + k
            b_d_offset = tl.zeros((BR, 1), tl.float32)
            b_d_range = tl.zeros((BR, 1), tl.float32)
            b_d_p = tl.zeros((BR, 1), tl.float32)
            if STEPS[k] != 0:
                b_d_p = tl.sum(sum_a[k], axis=1, keep_dims=True)
            if STEPS[k] > 0:
                b_range = tl.load(p_range + o_k, mask=m_r, other=1.0)
                b_offset = tl.load(p_offset + o_k, mask=m_r, other=0.0)
                b_d_range = weight[k] * (b_d_p * (1 / STEPS[k]) - tl.sum(sum_t[k], axis=1, keep_dims=True))
                b_d_p = b_offset * total_g[GROUPS[k]] + b_range * (1 / STEPS[k]) * b_d_p
                if OUTSIDE:
                    b_d_offset = weight[k] * (total_g[GROUPS[k]] - tl.sum(sum_i[k], axis=1, keep_dims=True))
            tl.store(p_d_offset + o_k, b_d_offset, mask=m_r)
            tl.store(p_d_range + o_k, b_d_range, mask=m_r)
            tl.store(p_d_p + o_k, b_d_p, mask=m_r)


@triton.jit(do_not_specialize=("xs", "gs", "dxs"))
def mix_quantize_many_bwd_kernel(
    xs,  # addresses of the weights, int64
    gs,  # addresses of the gradients of the outputs, int64
    dxs,  # addresses of the gradients of the weights, int64
    p_table,  # [tiles, 7] int32, see launch_multi.COLUMNS
    p_offset,  # [R, K] float32
    p_range,  # [R, K] float32
    p_p,  # [R, K] float32
    p_d_offset,  # [R, K] float32
    p_d_range,  # [R, K] float32
    p_d_p,  # [R, K] float32
    X: tl.constexpr,
    G: tl.constexpr,
    LAYERS: tl.constexpr,
    K: tl.constexpr,
    M: tl.constexpr,
    STEPS: tl.constexpr,
    ZERO: tl.constexpr,
    GROUPS: tl.constexpr,
    SHAPES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    BLOCK_VECTOR: tl.constexpr,
    THROUGH: tl.constexpr,
    OUTSIDE: tl.constexpr,
    ACTIVE: tl.constexpr,
):
    """Reads each x and its M gradients once, writes each dx, and all rows of the gradients of the parameters."""
    layer, block, first, rows, row, repeat, inner = load_tile(p_table)
    start = first * repeat * inner
    p_x = pick(xs, layer, LAYERS).to(tl.pointer_type(X)) + start
    p_g = pick(gs, layer, LAYERS).to(tl.pointer_type(G)) + start * M
    p_dx = pick(dxs, layer, LAYERS).to(tl.pointer_type(X)) + start
    for b in tl.static_range(SHAPES):
        if block == b:
            backward_rows(
                p_x, p_g, p_dx, p_offset, p_range, p_p, p_d_offset, p_d_range, p_d_p, rows, row, repeat, inner,
                K, M, STEPS, ZERO, GROUPS, THROUGH, OUTSIDE, ACTIVE, BLOCK_ROWS[b], BLOCK_INNER[b], BLOCK_VECTOR[b],
            )  # fmt: skip


def grad_constants(steps: Sequence[float], pass_through: Sequence[int], need_offset: bool) -> dict[str, object]:
    """The compile-time arguments that only the backward kernel has."""
    return {"THROUGH": tuple(bool(t) for t in pass_through), "OUTSIDE": need_offset, "ACTIVE": any(n != 0 for n in steps)}


def backward_many(
    grads: Sequence[Tensor],
    xs: Sequence[Tensor],
    offset: Tensor,
    range: Tensor,
    p: Tensor,
    steps: Sequence[float],
    zero_point: Sequence[float],
    groups: Sequence[int],
    pass_through: Sequence[int],
    net: Network,
    need_offset: bool,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Gradients (dxs, d_offset, d_range, d_p) of `forward_many`, given those of its outputs in the outputs' layouts.

    dxs like xs; the others [R, K] float32, d_offset zero without need_offset. Launches as in the forward pass.
    """
    todo, alone = launches(net, xs, grads)
    dxs = [layout.empty_output(x, 1, x.dtype) for x in xs]
    small = [layout.empty_output(t, 1, t.dtype) for t in (offset, range, p)]
    with guard(p):
        for part in todo:
            mix_quantize_many_bwd_kernel[part.grid](
                part.addresses(xs), part.addresses(grads), part.addresses(dxs), part.table, offset, range, p, *small,
                X=part.dtypes[0], G=part.dtypes[1], **constants(part.blocks, len(part.layers), steps, zero_point, groups),
                **grad_constants(steps, pass_through, need_offset), num_warps=part.warps, enable_fp_fusion=True,
            )  # fmt: skip
    params, results = ([t.split(net.rows) for t in tensors] if alone else [] for tensors in ((offset, range, p), small))
    for i in alone:
        values: Sequence[Tensor | float] = (0.0, 0.0, 0.0)
        if xs[i].numel() > 0:
            b, r, q = (t[i] for t in params)
            dxs[i], *values = quantize_grad.backward(
                grads[i], xs[i], b, r, q, steps, zero_point, groups, pass_through, None, net.layouts[i], need_offset
            )
        for result, value in zip(results, values, strict=True):
            result[i].copy_(value) if isinstance(value, Tensor) else result[i].fill_(value)
    return dxs, small[0], small[1], small[2]

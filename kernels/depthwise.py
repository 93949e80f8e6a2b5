"""The depthwise mixed convolution as Triton kernels: the module that `dispatch` loads.

The forward pass is here, the backward pass in depthwise_grad.py, what both share in depthwise_tile.py, patches and grids in
launch_depthwise.py. The weight's candidates are mixed by a small kernel of their own, which writes V_m with the channels innermost: the
weight has a few kilobytes, and reading V from the cache costs less than quantizing the weight in every program.
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

from . import launch_depthwise as launch
from .candidates import FULL, aligned, code, device_of, guard, load_candidates
from .depthwise_grad import backward
from .depthwise_tile import (
    SIZES,
    activation,
    block,
    candidate_constants,
    load_activation,
    load_taps,
    position,
    rows_open,
    span,
    strides,
    tap,
    zeros,
)
from .launch_depthwise import Pair

__all__ = ["backward", "forward", "mix_weight"]


@triton.jit(do_not_specialize=("channels",))
def depthwise_weight_kernel(
    p_w,  # [C, M or 1, T] any float type
    p_v,  # [M, T, C] float32
    p_offset,  # [C or 1, K] float32
    p_range,  # [C or 1, K] float32
    p_p,  # [C or 1, K] float32
    channels,
    K: tl.constexpr,
    M: tl.constexpr,
    STEPS: tl.constexpr,
    ZERO: tl.constexpr,
    GROUPS: tl.constexpr,
    SLICES: tl.constexpr,
    ROWS: tl.constexpr,
    T: tl.constexpr,
    BC: tl.constexpr,
    BT: tl.constexpr,
):
    """V_m[t, c] = Σ_{k in m} p[c, k]·Q_k(W[c, m or 0, t]), transposed."""
    o_c = (tl.program_id(0) * BC + tl.arange(0, BC))[:, None]
    o_t = tl.arange(0, BT)[None, :]
    m_c = o_c < channels
    mask = m_c & (o_t < T)
    inverse, shift, weight, scale, constant = load_candidates(p_offset, p_range, p_p, o_c if ROWS else o_c * 0, m_c, K, STEPS, ZERO)
    for m in tl.static_range(M):
        b_w = tl.load(p_w + (o_c * SLICES + m % SLICES) * T + o_t, mask=mask, other=0.0).to(tl.float32)
        b_v = tl.where(b_w == b_w, 0.0, b_w)
        for k in tl.static_range(K):
            if GROUPS[k] == m:
                if STEPS[k] == FULL:
                    b_v += weight[k] * b_w
                elif STEPS[k] != 0:
                    b_u = tl.clamp(b_w * inverse[k] + shift[k], 0.0, 1.0)
                    b_v += scale[k] * code(b_u, STEPS[k], ZERO[k], False) + constant[k]
        tl.store(p_v + (m * T + o_t) * channels + o_c, b_v, mask=mask)


@triton.jit(do_not_specialize=SIZES)
def depthwise_fwd_kernel(
    p_x,  # [N, C, H, W] any float type
    p_v,  # [M, KH·KW, C] float32
    p_y,  # [N, C, OH, OW] any float type
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
    y_sample,
    y_channel,
    y_row,
    y_column,
    K: tl.constexpr,
    STEPS: tl.constexpr,
    ZERO: tl.constexpr,
    GROUPS: tl.constexpr,
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
    """Strips of `rows` × S outputs. Walks down the input, adding every row to the KH output rows that read it."""
    if UNIT:
        channels = aligned(channels, ALIGN)
    x_sample, x_channel, x_row, x_column = strides(x_sample, x_channel, x_row, x_column, ALIGN, UNIT)
    y_sample, y_channel, y_row, y_column = strides(y_sample, y_channel, y_row, y_column, ALIGN, UNIT)
    i_n, i_h, i_w, o_c, m_p, m_c = block(strips, strip_count, strip_columns, channels, BP, BC, EVEN)
    candidates = load_activation(p_offset, p_range, p_p, K, STEPS, ZERO)
    taps = load_taps(p_v, o_c, m_c, channels, M * KH * KW)
    OPEN: tl.constexpr = rows_open(SH, DH, KH)
    o_w = i_w * (S * SW) - PW
    o_h = i_h * rows * SH - PH
    o_y = i_h * rows - (OPEN - 1)
    p_from = p_x + position(i_n, o_h, o_w, o_c, x_sample, x_channel, x_row, x_column)
    p_to = p_y + position(i_n, o_y, i_w * S, o_c, y_sample, y_channel, y_row, y_column)
    sums = zeros(OPEN * S, BP, BC)
    for u in range(rows + OPEN - 1):
        for f in tl.static_range(SH):
            m_h = m_p & (o_h + f >= 0) & (o_h + f < height)
            for b in tl.static_range(span(S, SW, DW, KW)):
                mask = m_h & (o_w + b >= 0) & (o_w + b < width) & m_c
                b_x = tl.load(p_from + (f * x_row + b * x_column), mask=mask, other=0.0).to(tl.float32)
                for m in tl.static_range(M):
                    b_m = activation(b_x, mask, candidates, m, K, STEPS, ZERO, GROUPS)
                    updated = ()
                    for j in tl.static_range(OPEN):
                        for s in tl.static_range(S):
                            if tap(j * SH + f, b - s * SW, KH, KW, DH, DW) >= 0:
                                b_v = taps[m * KH * KW + tap(j * SH + f, b - s * SW, KH, KW, DH, DW)]
                                updated += (sums[j * S + s] + b_v * b_m,)
                            else:
                                updated += (sums[j * S + s],)
                    sums = updated
        m_y = m_p & (u >= OPEN - 1) & (o_y < out_height)
        for s in tl.static_range(S):
            mask = m_y & (i_w * S + s < out_width) & m_c
            tl.store(p_to + s * y_column, sums[(OPEN - 1) * S + s].to(p_y.dtype.element_ty), mask=mask)
        sums = zeros(S, BP, BC) + sums[: (OPEN - 1) * S]
        o_h += SH
        o_y += 1
        p_from += SH * x_row
        p_to += y_row


def mix_weight(
    weight: Tensor,
    offset: Tensor,
    range: Tensor,
    p: Tensor,
    steps: Sequence[float],
    zero_point: Sequence[float],
    groups: Sequence[int],
) -> Tensor:
    """V [M, KH·KW, C] float32 of a weight [C, M or 1, KH, KW]; parameters [C, K] or [1, K] float32, contiguous."""
    channels, slices, taps = weight.size(0), weight.size(1), weight[0, 0].numel()
    m = max(groups) + 1
    v = torch.empty(m, taps, channels, dtype=torch.float32, device=weight.device)
    constants = weight_constants(channels, taps, slices, p.size(0), device_of(weight).interpreted)
    with guard(weight):
        depthwise_weight_kernel[(triton.cdiv(channels, constants["BC"]),)](
            weight.contiguous(), v, offset, range, p, channels, M=m, **constants,
            **candidate_constants(steps, zero_point, groups), num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return v


def weight_constants(channels: int, taps: int, slices: int, rows: int, interpreted: bool) -> dict[str, Any]:
    """The compile-time arguments of the weight's kernel that do not come from its candidates."""
    block_taps = triton.next_power_of_2(taps)
    return {"SLICES": slices, "ROWS": rows > 1, "T": taps, "BT": block_taps, "BC": 256 if interpreted else max(512 // block_taps, 8)}


def forward(
    x: Tensor,
    out: Tensor,
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
) -> None:
    """Write y [N, C, OH, OW] into `out`.

    x                 [N, C, H, W], any float dtype, any strides
    v                 [M, KH·KW, C] as `mix_weight` returns it
    offset, range, p  [1, K] float32, contiguous: the activation candidates, with their groups 0 … M−1
    Moves x.nbytes + out.nbytes; the pixels that neighbouring strips share come from the cache.
    """
    shape = launch.describe(x, out, kernel, stride, padding, dilation, max(groups) + 1)
    tile = launch.forward(shape, device_of(x))
    with guard(x):
        depthwise_fwd_kernel[(launch.programs(shape, tile, inputs=False),)](
            x, v, out, offset, range, p,
            **launch.sizes(shape, tile, inputs=False), **launch.strides("x", x), **launch.strides("y", out),
            **launch.constants(shape, tile), **candidate_constants(steps, zero_point, groups),
            num_warps=tile.strip_warps, enable_fp_fusion=True,
        )  # fmt: skip

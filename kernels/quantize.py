"""mix_quantize as Triton kernels: the module that `dispatch` loads.

The forward pass is here, the backward pass in quantize_grad.py, the arithmetic of both in candidates.py, blocks and grids in launch.py.
"""

# The arguments of a @triton.jit function have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment"

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from . import candidates, launch
from .candidates import FULL, SIZES, aligned, code, load_candidates, offsets, uniform
from .layout import Layout
from .quantize_grad import backward

__all__ = ["backward", "forward"]


@triton.jit(do_not_specialize=SIZES)
def mix_quantize_fwd_kernel(
    p_x,  # [outer, channels, inner], any float type
    p_y,  # M of them, any float type
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
):
    """V_m = Σ_{k in m} p_k·d_k·(q_k − z_k) + Σ_{k in m} p_k·β_k. Reads x once, writes M tensors."""
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
    inverse, shift, weight, scale, constant = load_candidates(p_offset, p_range, p_p, i_c + o_c, m_c, K, STEPS, ZERO)
    o_x = offsets(o_o, o_c, o_i, x_outer, x_channel, UNIT)
    o_y = offsets(o_o, o_c, o_i, y_outer, y_channel, UNIT)
    first_x = i_c if UNIT else i_c * x_channel
    first_y = i_c if UNIT else i_c * y_channel
    if NOISE:
        seed = tl.load(p_seed)
    for t_o in range(tl.program_id(1), tl.cdiv(outer, BO), tl.num_programs(1)):
        for t_i in range(tl.program_id(2), tl.cdiv(inner, BI), tl.num_programs(2)):
            i_o = t_o * block_o
            i_i = 0 if UNIT else t_i * block_i
            mask = m_c & (o_i < inner - i_i) & (o_o < outer - i_o)
            at_x = first_x + i_o * x_outer + i_i
            b_x = tl.load(p_x + at_x + o_x, mask=mask, other=0.0).to(tl.float32)
            if NOISE:
                b_noise = uniform(seed, at_x + o_x)
            clipped = ()
            for k in tl.static_range(K):
                if STEPS[k] > 0 and CLIP[k] == k:
                    b_u = b_x * inverse[k] + shift[k]
                    if NOISE:
                        b_u += b_noise * (1 / STEPS[k])
                    clipped += (tl.clamp(b_u, 0.0, 1.0),)
                else:
                    clipped += (b_x,)
            for m in tl.static_range(M):
                # the saturation swallows a NaN, so the sum starts from it
                b_y = tl.where(b_x == b_x, 0.0, b_x)
                b_constant = tl.zeros((1, BC, 1), tl.float32)
                for k in tl.static_range(K):
                    if GROUPS[k] == m:
                        if STEPS[k] == FULL:
                            b_y += weight[k] * b_x
                        elif STEPS[k] != 0:
                            b_y += scale[k] * code(clipped[CLIP[k]], STEPS[k], ZERO[k], NOISE)
                            b_constant += constant[k]
                at_y = first_y + i_o * y_outer + i_i + m * y_group
                tl.store(p_y + at_y + o_y, (b_y + b_constant).to(p_y.dtype.element_ty), mask=mask)


def forward(
    x: Tensor,
    out: Tensor,
    offset: Tensor,
    range: Tensor,
    p: Tensor,
    steps: Sequence[float],
    zero_point: Sequence[float],
    groups: Sequence[int],
    seed: Tensor | None,
    layout: Layout,
) -> None:
    """Write the M outputs of a dense x into `out` (any float dtype, laid out as `layout` says).

    offset, range, p  [C, K] or [1, K] float32, any strides; one column of offset and of range, expanded, is one clip for all candidates
    seed              [1] int64 for noise, or None
    Moves x.nbytes + out.nbytes.
    """
    v = launch.view(layout)
    steps, zero_point, groups, noise = tuple(steps), tuple(zero_point), tuple(groups), seed is not None
    shared = candidates.one_clip(offset, range) and not noise
    state = candidates.state(steps, zero_point, groups, shared)
    tile = launch.forward(v, min(x.element_size(), out.element_size()), candidates.device_of(x), state, noise)
    offset, range, p = candidates.parameters(v, offset, range, p)
    with candidates.guard(x):
        mix_quantize_fwd_kernel[candidates.grid(v, tile)](
            x, out, offset, range, p, p if seed is None else seed, *candidates.sizes(v),
            **candidates.constants(v, tile, steps, zero_point, groups, noise, shared), num_warps=tile.warps, enable_fp_fusion=True,
        )  # fmt: skip

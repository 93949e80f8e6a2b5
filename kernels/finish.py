"""The small kernel that adds the partial sums of a backward pass in a fixed order and makes the parameters' gradients of them.

With A = Σ g·(q − z), T = Σ_inside g·(u − z/n), O = Σ_outside g and G = Σ g,

    dp = β·G + d·A        dr = p·(A/n − T)        dβ = p·O
"""

# The arguments of a @triton.jit function have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment"

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl

from . import launch


@triton.jit
def load_sum(p_sums, slot, channels, splits, o_c, m_c, BC: tl.constexpr, BS: tl.constexpr):
    """Total of the partial sums number `slot`: [BC]."""
    o_s = tl.arange(0, BS)
    p_row = p_sums + (o_c + slot * channels)[:, None] * splits
    b_total = tl.zeros((BC, BS), tl.float32)
    for i_s in range(0, splits, BS):
        b_total += tl.load(p_row + (i_s + o_s)[None, :], mask=m_c[:, None] & (i_s + o_s < splits)[None, :], other=0.0)
    return tl.sum(b_total, axis=1)


@triton.jit(do_not_specialize=("channels", "splits"))
def mix_quantize_bwd_kernel_finish(
    p_sums,  # [3K + M, channels, splits] float32
    p_offset,  # [channels, K] float32
    p_range,  # [channels, K] float32
    p_p,  # [channels, K] float32
    p_d_offset,  # [channels, K] float32
    p_d_range,  # [channels, K] float32
    p_d_p,  # [channels, K] float32
    channels,
    splits,
    K: tl.constexpr,
    STEPS: tl.constexpr,
    GROUPS: tl.constexpr,
    PART: tl.constexpr,
    OUTSIDE: tl.constexpr,
    BC: tl.constexpr,
    BS: tl.constexpr,
):
    """Gradients of the parameters from the partial sums. One program per block of channels and candidate."""
    o_c = tl.program_id(0).to(tl.int64) * BC + tl.arange(0, BC)
    m_c = o_c < channels
    for k in tl.static_range(K):
        if tl.program_id(1) == k:
            o_k = o_c * K + k
            b_d_offset = tl.zeros((BC,), tl.float32)
            b_d_range = tl.zeros((BC,), tl.float32)
            b_d_p = tl.zeros((BC,), tl.float32)
            if STEPS[k] != 0:
                b_d_p = load_sum(p_sums, k, channels, splits, o_c, m_c, BC, BS)
            if STEPS[k] > 0:
                b_p = tl.load(p_p + o_k, mask=m_c, other=0.0)
                b_range = tl.load(p_range + o_k, mask=m_c, other=1.0)
                b_offset = tl.load(p_offset + o_k, mask=m_c, other=0.0)
                b_t = load_sum(p_sums, K + PART[k], channels, splits, o_c, m_c, BC, BS)
                b_g = load_sum(p_sums, 3 * K + GROUPS[k], channels, splits, o_c, m_c, BC, BS)
                b_d_range = b_p * (b_d_p * (1 / STEPS[k]) - b_t)
                b_d_p = b_offset * b_g + b_range * (1 / STEPS[k]) * b_d_p
                if OUTSIDE:
                    b_d_offset = b_p * load_sum(p_sums, 2 * K + PART[k], channels, splits, o_c, m_c, BC, BS)
            tl.store(p_d_offset + o_k, b_d_offset, mask=m_c)
            tl.store(p_d_range + o_k, b_d_range, mask=m_c)
            tl.store(p_d_p + o_k, b_d_p, mask=m_c)


def finish_constants(
    final: launch.FinishTile, steps: Sequence[float], groups: Sequence[int], need_offset: bool, part: Sequence[int] | None = None
) -> dict[str, object]:
    """The compile-time arguments of the finishing kernel; part: whose T and O each candidate takes (None: its own)."""
    return {
        "K": len(steps), "STEPS": tuple(steps), "GROUPS": tuple(groups), "OUTSIDE": need_offset,
        "PART": tuple(range(len(steps)) if part is None else part),
        "BC": final.finish_channels, "BS": final.finish_splits,
    }  # fmt: skip

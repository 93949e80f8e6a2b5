"""What the forward and the backward kernels share: the arithmetic of a candidate, and how a launcher turns a call into launch arguments.

A candidate costs four instructions per element: u = x·(1/r) + (z/n − β/r) clamped to [0, 1] (one multiply-add with a free saturation),
u·n + 1.5·2²³ (the sum is rounded half to even to an integer), minus 1.5·2²³ + z (exact), and a multiply-add with p·d. The K candidates are
unrolled, with n, z and the groups as constants; parameters are loaded and inverted once per program.
"""

# The arguments of a @triton.jit function have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment"

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import dispatch, launch, reference

MAGIC = tl.constexpr(12582912.0)
"""1.5·2²³: adding it to |v| < 2²² leaves round_half_even(v) in the low bits of the mantissa."""

FULL = tl.constexpr(reference.IDENTITY)
SIZES = ("outer", "channels", "inner", "x_outer", "x_channel", "y_outer", "y_channel", "y_group")


@triton.jit
def load_candidates(p_offset, p_range, p_p, o_c, m_c, K: tl.constexpr, STEPS: tl.constexpr, ZERO: tl.constexpr):
    """1/r, z/n − β/r, p, p·d and p·β of the K candidates, as tuples of blocks like o_c. Entries of no use to a candidate repeat p."""
    inverse = ()
    shift = ()
    weight = ()
    scale = ()
    constant = ()
    for k in tl.static_range(K):
        b_p = tl.load(p_p + o_c * K + k, mask=m_c, other=0.0)
        weight += (b_p,)
        if STEPS[k] > 0:
            b_offset = tl.load(p_offset + o_c * K + k, mask=m_c, other=0.0)
            b_range = tl.load(p_range + o_c * K + k, mask=m_c, other=1.0)
            # the plain operator compiles to an approximate division, which picks other codes than the reference
            b_inverse = tl.div_rn(tl.full(b_range.shape, 1.0, tl.float32), b_range)
            b_step = tl.div_rn(b_range, tl.full(b_range.shape, STEPS[k], tl.float32))
            inverse += (b_inverse,)
            shift += (ZERO[k] / STEPS[k] - b_offset * b_inverse,)
            scale += (b_p * b_step,)
            constant += (b_p * b_offset,)
        else:
            inverse += (b_p,)
            shift += (b_p,)
            scale += (b_p,)
            constant += (b_p,)
    return inverse, shift, weight, scale, constant


@triton.jit
def code(b_u, N: tl.constexpr, Z: tl.constexpr, NOISE: tl.constexpr):
    """q − z from u in [0, 1]. An integer z goes into the subtraction of MAGIC; 1.5·2²³ + 1/2 is no float32, so a half-integer z cannot."""
    if NOISE:
        b_q = b_u * N - Z
    elif Z % 1 == 0:
        b_q = (b_u * N + MAGIC) - (MAGIC + Z)
    else:
        b_q = ((b_u * N + MAGIC) - MAGIC) - Z
    return b_q


@triton.jit
def uniform(seed, o_x):
    """v − 1/2 with v in [0, 1) in 24 bits, from Philox4x32-10 at the storage positions o_x (int64)."""
    low = o_x.to(tl.uint32)
    high = (o_x >> 32).to(tl.uint32)
    word, _, _, _ = tl.philox(seed, low, high, low * 0, low * 0)
    return (word >> 8).to(tl.float32) * 5.9604644775390625e-8 - 0.5


@triton.jit
def aligned(size, ALIGN: tl.constexpr):
    """`size`, which ALIGN divides, in a form that tells the compiler so (`tl.multiple_of` has no effect on an argument)."""
    return size // ALIGN * ALIGN


@triton.jit
def offsets(o_o, o_c, o_i, outer_stride, channel_stride, UNIT: tl.constexpr):
    """Positions [BO, BC, BI] of a tile's elements relative to its first one, int64."""
    if UNIT:
        return o_o.to(tl.int64) * outer_stride + o_c + o_i
    return o_o.to(tl.int64) * outer_stride + o_c.to(tl.int64) * channel_stride + o_i


def sizes(v: launch.View) -> tuple[int, ...]:
    """The arguments named in SIZES."""
    return tuple(getattr(v, name) for name in SIZES)


def one_clip(offset: Tensor, range: Tensor) -> bool:
    """Whether all candidates have the same β and r, as the strides tell: one column that `expand` repeats K times."""
    return all(t.size(1) == 1 or t.stride(1) == 0 for t in (offset, range))


@functools.lru_cache(maxsize=1024)
def clips(
    steps: tuple[float, ...], zero_point: tuple[float, ...], groups: tuple[int, ...], shared: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """For each candidate the first one that clips alike, and the first one that clips alike in the same group.

    With one β and r (`shared`), u depends on the candidate through z/n alone. Otherwise, and for the special candidates, each is its own.
    """
    keys = [z / n if shared and n > 0 else -1.0 - k for k, (n, z) in enumerate(zip(steps, zero_point, strict=True))]
    pairs = list(zip(keys, groups, strict=True))
    return tuple(map(keys.index, keys)), tuple(map(pairs.index, pairs))


@functools.lru_cache(maxsize=1024)
def state(
    steps: tuple[float, ...],
    zero_point: tuple[float, ...],
    groups: tuple[int, ...],
    shared: bool,
    backward: bool = False,
    offset: bool = False,
) -> int:
    """How many parameters and sums a thread of the forward or backward kernel keeps for each of its channels."""
    kinds = [{c[k] for k, n in enumerate(steps) if n > 0} for c in clips(steps, zero_point, groups, shared)]
    active, outputs = sum(n != 0 for n in steps), max(groups) + 1
    return 2 * len(kinds[0]) + active + outputs + (2 + offset) * len(kinds[1]) * backward


def constants(
    v: launch.View,
    tile: launch.Tile,
    steps: tuple[float, ...],
    zero_point: tuple[float, ...],
    groups: tuple[int, ...],
    noise: bool,
    shared: bool,
) -> dict[str, Any]:
    """The compile-time arguments that the forward and the backward kernel share."""
    return {
        "K": len(steps), "M": max(groups) + 1, "STEPS": steps, "ZERO": zero_point, "GROUPS": groups,
        "CLIP": clips(steps, zero_point, groups, shared)[0], "NOISE": noise,
        "ALIGN": min(tile.vector, v.align), "UNIT": v.unit, "BO": tile.block_outer, "BC": tile.block_channels, "BI": tile.block_inner,
    }  # fmt: skip


def grid(v: launch.View, tile: launch.Tile) -> tuple[int, int, int]:
    return (triton.cdiv(v.channels, tile.block_channels), tile.splits_outer, tile.splits_inner)


def parameters(v: launch.View, *params: Tensor) -> tuple[Tensor, ...]:
    """Parameters with a row for each channel of the view, contiguous."""
    return tuple(t.contiguous() if v.repeat == 1 else t.repeat(v.repeat, 1) for t in params)


@functools.cache
def _device(index: int) -> launch.Device:
    properties = torch.cuda.get_device_properties(index)
    return launch.Device(properties.multi_processor_count, 10 * properties.major + properties.minor)


def device_of(x: Tensor) -> launch.Device:
    return _device(x.get_device()) if x.is_cuda else launch.Device(4, 0, interpreted=dispatch.interpreting())


def guard(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, whatever device its arguments are on."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()

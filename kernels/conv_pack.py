"""What the forward pass of the mixed convolution reads besides x: weights in blocks, and filters sorted by their quantizer."""

# The arguments of a @triton.jit function have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import layout
from .conv_common import largest, load_quantizers, pick, zero_code
from .launch_conv import ConvShape, ConvTile


class FilterTable(NamedTuple):
    """Filters sorted by quantizer, each quantizer's share padded to whole blocks.

    filters     [groups, tiles, block] int32: numbers within the group, −1 for padding; nothing where `quantizers` is −1
    quantizers  [groups, tiles] int32: the quantizer of a block, −1 for blocks without filters
    """

    filters: Tensor
    quantizers: Tensor


@triton.jit
def filter_table_kernel(
    p_choice,  # [groups · filters] int64
    p_filter,  # [groups, tiles, BN] int32
    p_quantizer,  # [groups, tiles] int32
    filters,
    tiles,
    M: tl.constexpr,
    BF: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
):
    """`FilterTable` of one group. The order of filters within a quantizer is kept."""
    group = tl.program_id(0)
    o_f = tl.arange(0, BF)
    o_t = tl.arange(0, BT)
    o_n = tl.arange(0, BN)
    p_filter += group * tiles * BN
    p_quantizer += group * tiles
    b_choice = tl.load(p_choice + group * filters + o_f, mask=o_f < filters, other=M)
    first = tl.full((), 0, tl.int32)
    for m in tl.static_range(M):
        b_hit = (b_choice == m).to(tl.int32)
        count = tl.sum(b_hit, axis=0)
        used = tl.cdiv(count, BN)
        tl.store(p_filter + first * BN + tl.cumsum(b_hit, axis=0) - 1, o_f, mask=b_hit == 1)
        tl.store(p_filter + first * BN + count + o_n, -1, mask=count + o_n < used * BN)
        tl.store(p_quantizer + first + o_t, m, mask=o_t < used)
        first += used
    tl.store(p_quantizer + first + o_t, -1, mask=first + o_t < tiles)


def table_constants(filters: int, m: int, block: int) -> dict[str, int]:
    """The compile-time arguments of the table of one group's filters."""
    tiles = (filters + m * (block - 1)) // block
    return {"M": m, "BF": triton.next_power_of_2(filters), "BT": triton.next_power_of_2(tiles), "BN": block}


def filter_table(choice: Tensor, groups: int, m: int, block: int) -> FilterTable:
    """choice [CO] int64: the quantizer, 0 … m − 1, of every filter. One launch, whose sizes do not depend on the values."""
    filters = choice.numel() // groups
    tiles = (filters + m * (block - 1)) // block
    table = FilterTable(
        torch.empty((groups, tiles, block), dtype=torch.int32, device=choice.device),
        torch.empty((groups, tiles), dtype=torch.int32, device=choice.device),
    )
    filter_table_kernel[(groups,)](choice.contiguous(), *table, filters, tiles, **table_constants(filters, m, block))
    return table


@triton.jit
def to_operand(b_v, dtype, TF32: tl.constexpr):
    """A float32 block as the product reads it. Tensor cores cut float32 off after 10 bits of mantissa: with TF32 it is rounded before."""
    if TF32:
        rounded = ((b_v.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        b_v = tl.where(b_v == b_v, rounded, b_v)
    return b_v.to(dtype)


@triton.jit(do_not_specialize=["filters"])
def pack_kernel(
    p_w,  # [groups · filters, M · channels, TAPS · WIDTH] any float type, strides w_f, w_c, w_t
    p_v,  # [groups, tiles, TAPS, BLOCKS, quantizers, BN, BK] of the product's type
    p_outside,  # [groups, tiles, TAPS · WIDTH, BN] of the product's type
    p_center,  # [groups, tiles, TAPS · WIDTH, BN] float32
    p_offset,  # [M] float32
    p_range,  # [M] float32
    p_filter,  # as `FilterTable`, not read without SAMPLED
    p_quantizer,
    filters,
    channels,
    w_f,
    w_c,
    w_t,
    M: tl.constexpr,
    STEPS: tl.constexpr,
    ZERO: tl.constexpr,
    SAMPLED: tl.constexpr,
    TF32: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """V_m·d_m/max d as blocks in the order in which the product reads them, zero where they are padded. With SAMPLED, V_m of the tile's
    quantizer alone, without the factor. Position k of a run is channel k mod channels in column k / channels of WIDTH columns.

    Also, for each tap, what the product of codes lacks: Σ_m center_m·Σ_c V_m in the image, and minus that and minus the share of the codes
    of 0 outside of it.
    """
    tile = tl.program_id(0)
    tap = tl.program_id(1)
    taps = tl.num_programs(1)
    group = tl.program_id(2).to(tl.int64)
    _, shift, center, step = load_quantizers(p_offset, p_range, M, STEPS, ZERO)
    o_n = tl.arange(0, BN)
    i_t = group * tl.num_programs(0) + tile
    if SAMPLED:
        quantizer = tl.load(p_quantizer + i_t)
        b_f = tl.load(p_filter + i_t * BN + o_n, mask=(o_n >= 0) & (quantizer >= 0), other=-1)
        m_f = b_f >= 0
        b_center = pick(quantizer, center, M)
        b_zero = zero_code(pick(quantizer, shift, M), pick(quantizer, STEPS, M))
    else:
        b_f = tile * BN + o_n
        m_f = b_f < filters
    p_rows = p_w + (group * filters + b_f)[:, None] * w_f + tap * WIDTH * w_t
    p_v += (i_t * taps + tap) * (BLOCKS * (1 if SAMPLED else M) * BN * BK) + o_n[:, None] * BK + tl.arange(0, BK)[None, :]
    for column in range(WIDTH):
        b_centers = tl.zeros((BN, BK), tl.float32)
        b_zeros = tl.zeros((BN, BK), tl.float32)
        for block in range(BLOCKS):
            o_k = block * BK + tl.arange(0, BK)[None, :]
            o_w = o_k % channels * w_c + o_k // channels * w_t if WIDTH > 1 else o_k * w_c
            mask = m_f[:, None] & (o_k < channels * WIDTH)
            for m in tl.static_range(1 if SAMPLED else M):
                from_m = (quantizer if SAMPLED else m) * channels * w_c
                b_w = tl.load(p_rows + o_w + from_m, mask=mask, other=0.0).to(tl.float32)
                if not SAMPLED:
                    b_w *= tl.div_rn(step[m], largest(step, M))
                    b_center = center[m]
                    b_zero = zero_code(shift[m], STEPS[m])
                b_v = to_operand(b_w, p_v.dtype.element_ty, TF32)
                tl.store(p_v + (block * (1 if SAMPLED else M) + m) * (BN * BK), b_v)
                b_here = b_v.to(tl.float32)
                if WIDTH > 1:
                    b_here = tl.where(o_k // channels == column, b_here, 0.0)
                b_centers += b_center * b_here
                b_zeros += b_zero * b_here
        at = ((i_t * taps + tap) * WIDTH + column) * BN + o_n
        b_centers = tl.sum(b_centers, axis=1)
        tl.store(p_center + at, b_centers)
        tl.store(p_outside + at, to_operand(-b_centers - tl.sum(b_zeros, axis=1), p_outside.dtype.element_ty, TF32))


def pack_constants(
    s: ConvShape, tile: ConvTile, steps: Sequence[float], zero_point: Sequence[float], sampled: bool, taps: int
) -> dict[str, Any]:
    """The compile-time arguments of `pack_kernel` for kernels of `taps` elements."""
    return {
        "M": len(steps), "STEPS": tuple(steps), "ZERO": tuple(zero_point), "SAMPLED": sampled,
        "TF32": s.itemsize == 4 and s.tensor_cores, "WIDTH": taps // s.taps, "BLOCKS": triton.cdiv(s.run, tile.block_k),
        "BN": tile.block_n, "BK": tile.block_k,
    }  # fmt: skip


def pack_warps(tile: ConvTile) -> int:
    return 8 if tile.block_n * tile.block_k >= 2048 else 4


def _flat_taps(weight: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """A weight whose taps lie at equal distances, and its strides over filters, channels and taps."""
    if not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last):
        channels, taps = weight.size(1), weight.size(2) * weight.size(3)
        return weight, (channels * taps, 1, channels)
    taps = weight.size(2) * weight.size(3)
    return weight.contiguous(), (weight.size(1) * taps, taps, 1)


def pack(
    weight: Tensor,
    dtype: torch.dtype,
    offset: Tensor,
    range: Tensor,
    steps: Sequence[float],
    zero_point: Sequence[float],
    table: FilterTable | None,
    s: ConvShape,
    tile: ConvTile,
) -> tuple[Tensor, Tensor, Tensor]:
    """The weight [CO, M·C/groups, kh, kw] as `mixed_conv_fwd_kernel` reads it, and what the product lacks outside and inside the image."""
    m, taps = len(steps), weight.size(2) * weight.size(3)
    weight, strides = _flat_taps(weight)
    tiles = triton.cdiv(s.filters, tile.block_n) if table is None else table.quantizers.size(1)
    blocks = triton.cdiv(s.run, tile.block_k)
    v = layout.empty((s.groups, tiles, s.taps, blocks, s.quantizers, tile.block_n, tile.block_k), weight, dtype)
    outside = layout.empty((s.groups * tiles, taps, tile.block_n), weight, dtype)
    center = layout.empty((s.groups * tiles, taps, tile.block_n), weight, torch.float32)
    pack_kernel[(tiles, s.taps, s.groups)](
        weight, v, outside, center, offset, range, *(table or (range, range)), s.filters, weight.size(1) // m, *strides,
        **pack_constants(s, tile, steps, zero_point, table is not None, taps), num_warps=pack_warps(tile),
    )  # fmt: skip
    return v, outside, center

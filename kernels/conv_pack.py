"""What the forward pass of the mixed convolution reads besides x: weights in blocks, and filters sorted by their quantizer."""

# The arguments of a @triton.jit function have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment"

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import layout
from .conv_common import largest, load_quantizers
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


def filter_table(choice: Tensor, groups: int, m: int, block: int) -> FilterTable:
    """choice [CO] int64: the quantizer, 0 … m − 1, of every filter. One launch, whose sizes do not depend on the values."""
    filters = choice.numel() // groups
    tiles = (filters + m * (block - 1)) // block
    table = FilterTable(
        torch.empty((groups, tiles, block), dtype=torch.int32, device=choice.device),
        torch.empty((groups, tiles), dtype=torch.int32, device=choice.device),
    )
    filter_table_kernel[(groups,)](
        choice.contiguous(), *table, filters, tiles,
        M=m, BF=triton.next_power_of_2(filters), BT=triton.next_power_of_2(tiles), BN=block,
    )  # fmt: skip
    return table


PACK_SIZES = ["filters", "channels", "run", "w_f", "w_c", "w_t"]


@triton.jit(do_not_specialize=PACK_SIZES)
def pack_kernel(
    p_w,  # [groups · filters, M · channels, taps] any float type, strides w_f, w_c, w_t
    p_v,  # [groups, tiles, TAPS, cdiv(run, BK), quantizers, BN, BK]
    p_offset,  # [M] float32
    p_range,  # [M] float32
    p_filter,  # as `FilterTable`, not read without SAMPLED
    p_quantizer,
    filters,
    channels,
    run,
    w_f,
    w_c,
    w_t,
    M: tl.constexpr,
    STEPS: tl.constexpr,
    ZERO: tl.constexpr,
    SAMPLED: tl.constexpr,
    TAPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """V_m·d_m/max d as the blocks that the product reads one after the other, zero where they are padded. With SAMPLED, V_m of the block's
    quantizer alone, without the factor. Position k of a run is channel k mod channels of column k / channels; WIDTH columns make a run."""
    tile = tl.program_id(0)
    tiles = tl.num_programs(0)
    i_k = tl.program_id(1)
    group = tl.program_id(2).to(tl.int64)
    inverse, shift, center, step = load_quantizers(p_offset, p_range, M, STEPS, ZERO)
    o_n = tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    if SAMPLED:
        quantizer = tl.load(p_quantizer + group * tiles + tile)
        b_f = tl.load(p_filter + (group * tiles + tile) * BN + o_n, mask=(o_n >= 0) & (quantizer >= 0), other=-1)
        m_f = b_f >= 0
    else:
        b_f = tile * BN + o_n
        m_f = b_f < filters
    b_c = i_k * BK + o_k
    mask = m_f[:, None] & (b_c < run)[None, :]
    o_w = (group * filters + b_f)[:, None] * w_f + (b_c % channels)[None, :].to(tl.int64) * w_c + (b_c // channels)[None, :] * w_t
    o_v = o_n[:, None] * BK + o_k[None, :]
    for tap in range(TAPS):
        at = ((group * tiles + tile) * TAPS + tap) * tl.num_programs(1) + i_k
        for m in tl.static_range(1 if SAMPLED else M):
            from_m = quantizer if SAMPLED else m
            b_w = tl.load(p_w + o_w + from_m * channels * w_c + tap * WIDTH * w_t, mask=mask, other=0.0).to(tl.float32)
            if not SAMPLED:
                b_w *= tl.div_rn(step[m], largest(step, M))
            tl.store(p_v + (at if SAMPLED else at * M + m) * (BN * BK) + o_v, b_w.to(p_v.dtype.element_ty))


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
) -> Tensor:
    """Blocks of the weight [CO, M·C/groups, kh, kw] in the dtype of the product: [groups, tiles, taps, steps, quantizers, BN, BK]."""
    m = len(steps)
    weight, strides = _flat_taps(weight)
    tiles = triton.cdiv(s.filters, tile.block_n) if table is None else table.quantizers.size(1)
    blocks = triton.cdiv(s.run, tile.block_k)
    v = layout.empty((s.groups, tiles, s.taps, blocks, s.quantizers, tile.block_n, tile.block_k), weight, dtype)
    filters, quantizers = (range, range) if table is None else table
    channels = weight.size(1) // m
    pack_kernel[(tiles, blocks, s.groups)](
        weight, v, offset, range, filters, quantizers, s.filters, channels, s.run, *strides,
        M=m, STEPS=tuple(steps), ZERO=tuple(zero_point), SAMPLED=table is not None, TAPS=s.taps, WIDTH=s.run // channels,
        BN=tile.block_n, BK=tile.block_k, num_warps=4,
    )  # fmt: skip
    return v

"""What the gradients of the mixed convolution read besides x: weights in blocks, and dy with its filters sorted by their quantizer."""

# The arguments of a @triton.jit function have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import layout
from .conv_pack import FilterTable

PACK_SIZES = ("filters", "channels", "w_f", "w_c", "w_t")
SORT_SIZES = ("pixels", "plane", "filters", "columns", "all_columns")


@triton.jit(do_not_specialize=PACK_SIZES)
def pack_grad_kernel(
    p_w,  # [groups · filters, M · channels, taps] any float type, strides w_f, w_c, w_t
    p_v,  # [groups, tiles, TAPS, blocks, quantizers, BN, BK]
    p_filter,  # as `FilterTable`, not read without SAMPLED
    p_quantizer,
    filters,
    channels,
    w_f,
    w_c,
    w_t,
    M: tl.constexpr,
    SAMPLED: tl.constexpr,
    TAPS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """V_m as the blocks of BN channels and BK filters that a product over filters reads, zero where they are padded. With SAMPLED, V_m of
    the block's quantizer alone."""
    block = tl.program_id(0)
    blocks = tl.num_programs(0)
    tile = tl.program_id(1)
    group = tl.program_id(2).to(tl.int64)
    o_n = tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    if SAMPLED:
        quantizer = tl.load(p_quantizer + group * blocks + block)
        b_f = tl.load(p_filter + (group * blocks + block) * BK + o_k, mask=(o_k >= 0) & (quantizer >= 0), other=-1)
        m_f = b_f >= 0
    else:
        b_f = block * BK + o_k
        m_f = b_f < filters
    b_c = tile * BN + o_n
    mask = (b_c < channels)[:, None] & m_f[None, :]
    o_w = (group * filters + b_f)[None, :] * w_f + b_c[:, None].to(tl.int64) * w_c
    o_v = o_n[:, None] * BK + o_k[None, :]
    for tap in range(TAPS):
        at = ((group * tl.num_programs(1) + tile) * TAPS + tap) * blocks + block
        for m in tl.static_range(1 if SAMPLED else M):
            from_m = quantizer if SAMPLED else m
            b_w = tl.load(p_w + o_w + from_m * channels * w_c + tap * w_t, mask=mask, other=0.0)
            tl.store(p_v + (at if SAMPLED else at * M + m) * (BN * BK) + o_v, b_w.to(p_v.dtype.element_ty))


@triton.jit(do_not_specialize=SORT_SIZES)
def sort_grad_kernel(
    p_g,  # [N, groups · filters, plane], or [N, plane, groups · filters] with LAST
    p_sorted,  # [pixels, all_columns]
    p_filter,  # [groups, columns] of `FilterTable`
    p_quantizer,  # [all_columns / BLOCK]
    pixels,
    plane,
    filters,
    columns,
    all_columns,
    all_filters,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    """The filters of dy in the order of a table, zero where it is padded."""
    i_p = tl.program_id(0).to(tl.int64) * BP
    o_p = tl.arange(0, BP)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    m_p = o_p < pixels - i_p
    m_c = o_c < all_columns
    used = tl.load(p_quantizer + o_c // BLOCK, mask=m_c, other=-1) >= 0
    b_f = tl.load(p_filter + o_c, mask=used, other=-1)
    mask = m_p[:, None] & (b_f >= 0)[None, :]
    b_f += o_c // columns * filters
    if LAST:
        p_from = p_g + (i_p + o_p)[:, None] * all_filters + b_f[None, :]
    else:
        b_n = (i_p + o_p) // plane
        p_from = p_g + (b_n * (all_filters - 1) * plane + i_p + o_p)[:, None] + b_f[None, :].to(tl.int64) * plane
    b_g = tl.load(p_from, mask=mask, other=0.0)
    tl.store(p_sorted + (i_p + o_p)[:, None] * all_columns + o_c[None, :], b_g, mask=m_p[:, None] & m_c[None, :])


def tap_strides(weight: Tensor) -> tuple[int, int, int]:
    """Strides over filters, channels and taps of a weight that is contiguous or channels_last."""
    channels, taps = weight.size(1), weight.size(2) * weight.size(3)
    return (channels * taps, taps, 1) if weight.is_contiguous() else (channels * taps, 1, channels)


def pack_grad(weight: Tensor, dtype: torch.dtype, m: int, groups: int, table: FilterTable | None, bn: int, bk: int) -> Tensor:
    """Blocks of the weight [CO, M·C/groups, kh, kw] in the dtype of the product: [groups, tiles, taps, blocks, quantizers, BN, BK]."""
    if not weight.is_contiguous(memory_format=torch.channels_last):
        weight = weight.contiguous()
    filters, channels, taps = weight.size(0) // groups, weight.size(1) // m, weight.size(2) * weight.size(3)
    tiles = triton.cdiv(channels, bn)
    blocks = triton.cdiv(filters, bk) if table is None else table.quantizers.size(1)
    v = layout.empty((groups, tiles, taps, blocks, m if table is None else 1, bn, bk), weight, dtype)
    pack_grad_kernel[(blocks, tiles, groups)](
        weight, v, *((weight, weight) if table is None else table), filters, channels, *tap_strides(weight),
        M=m, SAMPLED=table is not None, TAPS=taps, BN=bn, BK=bk, num_warps=4,
    )  # fmt: skip
    return v


def sort_grad(grad: Tensor, table: FilterTable) -> Tensor:
    """dy [N, CO, OH, OW], contiguous or channels_last, as [N·OH·OW, groups·columns] in the order of the table."""
    groups, tiles, block = table.filters.shape
    plane, columns = grad.size(2) * grad.size(3), tiles * block
    pixels = grad.size(0) * plane
    if not grad.is_contiguous(memory_format=torch.channels_last):
        grad = grad.contiguous()
    out = layout.empty((pixels, groups * columns), grad, grad.dtype)
    bc = min(triton.next_power_of_2(groups * columns), 128)
    bp = 2048 // bc if grad.is_cuda else 65536 // bc
    sort_grad_kernel[(triton.cdiv(pixels, bp), triton.cdiv(groups * columns, bc))](
        grad, out, *table, pixels, plane, grad.size(1) // groups, columns, groups * columns, grad.size(1),
        LAST=grad.is_contiguous(memory_format=torch.channels_last), BLOCK=block, BP=bp, BC=bc, num_warps=4,
    )  # fmt: skip
    return out

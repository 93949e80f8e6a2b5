"""Convolution on integer codes as Triton kernels: the module that `dispatch` loads for "int8".

Inputs are x = d_a·(s + e) with s in int8 and one integer e for all of them, weights w = d_f·c with c in int8 for each filter f, hence

    conv(x, w)[f] = d_a·d_f·(Σ s·c + e·Σ c)

with both sums exact in int32. The code q = 0 … n of an input stands for β + q·d_a = d_a·(q + m), m = β/d_a, an integer by contract. For
n ≤ 127, s = q + m and e = 0. For n up to 255, s = q − 128 and e = m + 128, which is 0 again for a signed input (m = −128). Zero is s = −e:
the padding. See launch_int8.py for the two ways to get the codes.
"""

# The arguments of a @triton.jit function have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch_int8
from .candidates import MAGIC, device_of, guard
from .launch_int8 import EncodeTile, ProductTile, Shape

__all__ = ["forward"]


@triton.jit
def load_input_quantizer(p_offset, p_range, N: tl.constexpr):
    """1/r, −β/r, d, e, and the number whose addition to u·n leaves s in the low byte of the sum; scalars."""
    b_offset = tl.load(p_offset)
    b_range = tl.load(p_range)
    inverse = tl.div_rn(tl.full(b_range.shape, 1.0, tl.float32), b_range)
    step = tl.div_rn(b_range, tl.full(b_range.shape, N, tl.float32))
    level = (tl.div_rn(b_offset, step) + MAGIC) - MAGIC
    if N > 127:
        e = (level + 128.0).to(tl.int32)
        magic = tl.full(b_range.shape, MAGIC - 128.0, tl.float32)
    else:
        e = tl.full(b_range.shape, 0, tl.int32)
        magic = MAGIC + level
    return inverse, -b_offset * inverse, step, e, magic


@triton.jit
def input_code(b_x, inverse, shift, magic, N: tl.constexpr):
    """s of a block of inputs: int8."""
    b_u = tl.clamp(b_x.to(tl.float32) * inverse + shift, 0.0, 1.0)
    return (b_u * N + magic).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit(do_not_specialize=["rows", "height", "width", "padded_h", "padded_w", "pad_h", "pad_w"])
def encode_kernel(
    p_x,  # [N, C, H, W], any float type, any strides
    p_s,  # [N, H + 2·pad_h, W + 2·pad_w, C] int8
    p_offset,  # [1] float32
    p_range,  # [1] float32
    rows,
    channels,
    height,
    width,
    padded_h,
    padded_w,
    pad_h,
    pad_w,
    x_n,
    x_c,
    x_h,
    x_w,
    N: tl.constexpr,
    BR: tl.constexpr,
    BW: tl.constexpr,
    BC: tl.constexpr,
):
    """The codes s of x with a border of codes of zero. Reads x once and writes a byte per element; a program owns BR rows of BW columns."""
    inverse, shift, _, e, magic = load_input_quantizer(p_offset, p_range, N)
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)[:, None, None]
    o_w = tl.program_id(1) * BW + tl.arange(0, BW)[None, :, None]
    o_c = tl.program_id(2) * BC + tl.arange(0, BC)[None, None, :]
    o_h = o_r % padded_h - pad_h
    m_s = (o_r < rows) & (o_w < padded_w) & (o_c < channels)
    m_x = (o_h >= 0) & (o_h < height) & (o_w >= pad_w) & (o_w < width + pad_w)
    o_x = o_r // padded_h * x_n + o_h * x_h + (o_w - pad_w).to(tl.int64) * x_w + o_c.to(tl.int64) * x_c
    b_s = input_code(tl.load(p_x + o_x, mask=m_s & m_x, other=0.0), inverse, shift, magic, N)
    b_s = tl.where(m_x, b_s, (-e).to(tl.int8))
    tl.store(p_s + (o_r * padded_w + o_w) * channels + o_c, b_s, mask=m_s)


@triton.jit
def store(acc, p_rows, p_total, p_scale, p_bias, o_f, m_m, e, step, filters, y_f, N: tl.constexpr, BIAS: tl.constexpr):
    """d_a·d_f·(acc + e·Σ c) + bias to the filters o_f of the output positions p_rows."""
    m_f = o_f < filters
    if N > 127:
        acc += (e * tl.load(p_total + o_f, mask=m_f, other=0))[None, :]
    b_y = acc.to(tl.float32) * (step * tl.load(p_scale + o_f, mask=m_f, other=0.0))[None, :]
    if BIAS:
        b_y += tl.load(p_bias + o_f, mask=m_f, other=0.0)[None, :]
    tl.store(p_rows[:, None] + o_f[None, :] * y_f, b_y.to(p_rows.dtype.element_ty), mask=m_m & m_f[None, :])


@triton.jit(do_not_specialize=["batch", "out_w", "height", "width", "stride_h", "stride_w", "dilation_h", "dilation_w"])
def conv_int8_kernel(
    p_a,  # rows of channels: x [N, H, W, C] of any float type with INLINE, else s [N, H, W, C] int8, padding included
    p_w,  # c [F, taps, run] int8
    p_total,  # Σ c [F] int32, read for N > 127
    p_scale,  # d_f [F] float32
    p_bias,  # [F] float32, read with BIAS
    p_offset,  # [1] float32
    p_range,  # [1] float32
    p_y,  # [N, F, OH, OW], any float type
    batch,
    pixels,
    out_w,
    height,
    width,
    channels,
    filters,
    run,
    stride_h,
    stride_w,
    dilation_h,
    dilation_w,
    y_n,
    y_p,
    y_f,
    N: tl.constexpr,
    TAPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BIAS: tl.constexpr,
    INLINE: tl.constexpr,
    EVEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """y = d_a·d_f·(Σ s·c + e·Σ c) + bias. A program owns BM output positions and BN filters of one group; filters is F/groups.

    What a block reads past the end of a run meets zero weights. Rows past the end repeat some image, columns past the end the last filter,
    and neither is stored.
    """
    inverse, shift, step, e, magic = load_input_quantizer(p_offset, p_range, N)
    blocks = tl.cdiv(filters, BN)
    i_m = tl.program_id(0) // blocks * BM
    o_f = tl.program_id(0) % blocks * BN + tl.arange(0, BN)
    group = tl.program_id(1).to(tl.int64)
    i_f = group * filters
    o_m = i_m + tl.arange(0, BM)
    o_n = o_m // pixels
    o_p = o_m % pixels
    o_h = tl.minimum(o_n, batch - 1).to(tl.int64) * height + o_p // out_w * stride_h
    o_k = tl.arange(0, BK)
    p_rows = p_a + (o_h * width + o_p % out_w * stride_w)[:, None] * channels + group * run + o_k[None, :]
    p_columns = p_w + (i_f + tl.minimum(o_f, filters - 1))[None, :] * (TAPS * run) + o_k[:, None]
    acc = tl.zeros((BM, BN), tl.int32)
    tap = tl.full((), 0, tl.int32)
    i_k = tl.full((), 0, tl.int32)
    for _ in range(TAPS * tl.cdiv(run, BK)):
        at = i_k if TAPS == 1 else (tap // COLUMNS * dilation_h * width + tap % COLUMNS * dilation_w) * channels + i_k
        if EVEN:
            b_a = tl.load(p_rows + at)
            b_w = tl.load(p_columns + (tap * run + i_k))
        else:
            b_a = tl.load(p_rows + at, mask=(i_k + o_k < run)[None, :], other=0) if INLINE else tl.load(p_rows + at)
            b_w = tl.load(p_columns + (tap * run + i_k), mask=(i_k + o_k < run)[:, None], other=0)
        if INLINE:
            b_a = input_code(b_a, inverse, shift, magic, N)
        acc = tl.dot(b_a, b_w, acc, out_dtype=tl.int32)
        i_k += BK
        last = i_k >= run
        i_k = tl.where(last, 0, i_k)
        tap += last.to(tl.int32)
    p_y_rows = p_y + i_f * y_f + o_n.to(tl.int64) * y_n + o_p.to(tl.int64) * y_p
    m_m = (o_n < batch)[:, None]
    if BN > 64:
        # in two halves, whose scales and biases do not fill the registers together
        left, right = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))
        o_f = tl.program_id(0) % blocks * BN + tl.arange(0, BN // 2)
        store(left, p_y_rows, p_total + i_f, p_scale + i_f, p_bias + i_f, o_f, m_m, e, step, filters, y_f, N, BIAS)
        store(right, p_y_rows, p_total + i_f, p_scale + i_f, p_bias + i_f, o_f + BN // 2, m_m, e, step, filters, y_f, N, BIAS)
    else:
        store(acc, p_y_rows, p_total + i_f, p_scale + i_f, p_bias + i_f, o_f, m_m, e, step, filters, y_f, N, BIAS)


def encode_constants(tile: EncodeTile, steps: float) -> dict[str, Any]:
    return {"N": steps, "BR": tile.encode_rows, "BW": tile.encode_width, "BC": tile.encode_channels}


def product_constants(shape: Shape, tile: ProductTile, steps: float, bias: bool) -> dict[str, Any]:
    return {
        "N": steps, "TAPS": shape.taps, "COLUMNS": 1 if shape.merged else shape.kernel[1], "BIAS": bias, "INLINE": bool(tile.inline),
        "EVEN": shape.run % tile.block_k == 0, "BM": tile.block_m, "BN": tile.block_n, "BK": tile.block_k,
    }  # fmt: skip


def _encode(x: Tensor, offset: Tensor, range: Tensor, steps: float, shape: Shape) -> Tensor:
    """The codes of x with their border: [N, H + 2·pad_h, W + 2·pad_w, C] int8 in a flat tensor."""
    tile = launch_int8.encode(shape, device_of(x))
    rows, width = shape.batch * shape.padded[0], shape.padded[1]
    codes = torch.empty(rows * width * shape.channels + launch_int8.SLACK, dtype=torch.int8, device=x.device)
    blocks = ((rows, tile.encode_rows), (width, tile.encode_width), (shape.channels, tile.encode_channels))
    encode_kernel[tuple(triton.cdiv(n, block) for n, block in blocks)](
        x, codes, offset, range, rows, shape.channels, shape.height, shape.width, *shape.padded, *shape.padding, *x.stride(),
        **encode_constants(tile, steps), num_warps=tile.encode_warps, enable_fp_fusion=True,
    )  # fmt: skip
    return codes


def forward(
    x: Tensor,
    codes: Tensor,
    total: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    offset: Tensor,
    range: Tensor,
    steps: float,
    out: Tensor,
    shape: Shape,
) -> None:
    """Write the convolution into `out` [N, F, OH, OW], of any float dtype, contiguous or channels_last.

    x       [N, C, H, W], any float dtype and strides; rows of channels are read without a pass of their own where that pays
    codes   [F, kh, kw, C/g] int8, contiguous
    total   [F] int32; scale, bias [F] float32; offset, range [1] float32; all contiguous
    steps   n ≤ 255
    """
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    tile = launch_int8.product(shape, channels_last, x.element_size(), device_of(x))
    blocks = triton.cdiv(shape.filters // shape.groups, tile.block_n)
    grid = (triton.cdiv(shape.rows, tile.block_m) * blocks, shape.groups)
    with guard(x):
        rows = x if tile.inline else _encode(x, offset, range, steps, shape)
        conv_int8_kernel[grid](
            rows, codes, total, scale, scale if bias is None else bias, offset, range, out, shape.batch, shape.out[0] * shape.out[1],
            shape.out[1], *shape.padded, shape.channels, shape.filters // shape.groups, shape.run, *shape.stride, *shape.dilation,
            out.stride(0), out.stride(3), out.stride(1), **product_constants(shape, tile, steps, bias is not None),
            num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
        )  # fmt: skip

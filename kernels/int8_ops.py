"""torch.library contract of the convolution on integer codes. It has no gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import dispatch, reference_int8
from .errors import InputError, QPruneError
from .launch_int8 import MAX_SUM, Shape

_lib = torch.library.Library("qprune", "FRAGMENT")
_lib.define(
    "quant_conv2d_int8(Tensor x, Tensor codes, Tensor total, Tensor scale, Tensor? bias, Tensor offset, Tensor range, float steps,"
    " int[] stride, int[] padding, int[] dilation, int groups, ScalarType dtype) -> Tensor"
)


def quant_conv2d_int8(
    x: Tensor,
    codes: Tensor,
    total: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    offset: Tensor,
    range: Tensor,
    steps: float,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """conv(A(x), W) + bias with A(x) and W on integer grids: int8 codes, exact int32 sums, one scale per filter.

    x                    [N, C, H, W], any float dtype and strides (channels_last is fastest)
    codes, total, scale  what `reference_int8.weight_codes` returns: [F, C/g, kh, kw] int8 (channels_last in memory, else it is copied),
                         [F] int32, [F] float32
    bias                 [F] or None
    offset, range, steps A(x) = β + q·d, q = 0 … n ≤ 255, d = r/n; tensors [1] float32. β/d must be an even integer, as are 0 and −2^(b−1)
                         of unsigned and signed inputs of more than one bit. That is not checked: it would take a look at the device
    padding              with zeros

    Returns [N, F, OH, OW] in x's memory format and dtype (or `dtype`). Equal to the convolution of the dequantized tensors up to float32
    rounding. A NaN in x counts as the lowest level: integers cannot carry it.
    Raises InputError for shapes that do not match, and for more than 65,536 terms per sum, 2³¹ positions or 255 steps; QPruneError where a
    gradient is needed.
    """
    if not 0 < steps <= 255:
        raise InputError(f"quant_conv2d_int8: codes of the input must fit 8 bits, that is 1 to 255 steps, got {steps}")
    if (terms := math.prod(codes.shape[1:])) > MAX_SUM:
        raise InputError(f"quant_conv2d_int8: sums of {terms} products may not fit 32 bits; at most {MAX_SUM}")
    shape = _shape(x, codes, stride, padding, dilation, groups)
    if x.size(1) != groups * codes.size(1) or codes.size(0) % groups:
        raise InputError(f"quant_conv2d_int8: x {tuple(x.shape)} and codes {tuple(codes.shape)} do not match with groups = {groups}")
    if min(shape.out) < 1:
        raise InputError(f"quant_conv2d_int8: a padded input of {shape.padded} is too small for the kernel {shape.kernel}")
    if (positions := max(shape.rows, shape.batch * math.prod(shape.padded))) >= 2**31 - 2**16:
        raise InputError(f"quant_conv2d_int8: {positions} positions are too many for one call: split the batch")
    # torch.ops is reached through attributes that type checkers do not know
    op: Any = torch.ops.qprune.quant_conv2d_int8
    return op(x, codes, total, scale, bias, offset, range, steps, stride, padding, dilation, groups, x.dtype if dtype is None else dtype)


def _shape(x: Tensor, codes: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int) -> Shape:
    def pair(values: Sequence[int]) -> tuple[int, int]:
        return (values[0], values[-1])

    filters, _, kh, kw = codes.shape
    n, c, h, w = x.shape
    return Shape(n, c, h, w, filters, (kh, kw), pair(stride), pair(padding), pair(dilation), groups)


def empty_output(x: Tensor, shape: Shape, dtype: torch.dtype) -> Tensor:
    """Room for the result in x's memory format."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty((shape.batch, shape.filters, *shape.out), dtype=dtype, device=x.device, memory_format=memory_format)


def _forward(x, codes, total, scale, bias, offset, range, steps, stride, padding, dilation, groups, dtype):  # type: ignore[no-untyped-def]
    shape = _shape(x, codes, stride, padding, dilation, groups)
    out = empty_output(x, shape, dtype)
    module = dispatch.select(x, "int8")
    if out.numel() == 0:
        return out
    if module is None:
        return out.copy_(reference_int8.quant_conv2d_int8(x, codes, scale, bias, offset, range, steps, stride, padding, dilation, groups))
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    filters = codes.permute(0, 2, 3, 1).contiguous()
    module.forward(x, filters, total, scale, bias, offset, range, steps, out, shape)
    return out


for _device in ("CPU", "CUDA"):
    _lib.impl("quant_conv2d_int8", _forward, _device)


@torch.library.register_fake("qprune::quant_conv2d_int8", lib=_lib)
def _fake(x, codes, total, scale, bias, offset, range, steps, stride, padding, dilation, groups, dtype):  # type: ignore[no-untyped-def]
    return empty_output(x, _shape(x, codes, stride, padding, dilation, groups), dtype)


def _refuse(ctx: Any, *arguments: Any, **keywords: Any) -> None:
    raise QPruneError("quant_conv2d_int8 has no gradient: call it under torch.no_grad(), or use the layer in training mode")


torch.library.register_autograd("qprune::quant_conv2d_int8", _refuse, setup_context=_refuse, lib=_lib)

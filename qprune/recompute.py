"""A convolution of a mixed input that keeps the input it was made of instead: the memory of the plain layer, for one more pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qprune import kernels
from qprune.kernels import ConvGeometry
from qprune.quantizers import Candidates


class _Recomputing(torch.autograd.Function):
    """y = conv([Σ_{k in m} p_k A_k(x)]_m, V) + bias. Keeps x, which the layer before has kept anyway, and mixes it again backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        offset: Tensor,
        range: Tensor,
        p: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        static: Any,
        window: ConvGeometry,
    ) -> Tensor:
        mixed = kernels.mix_quantize(x, offset, range, p, *static)
        ctx.save_for_backward(x, offset, range, p, weight)
        ctx.static, ctx.window, ctx.dtype = static, window, mixed.dtype
        ctx.bias = None if bias is None else bias.dtype
        cast = None if bias is None else bias.to(mixed.dtype)
        w = window
        return F.conv2d(mixed, weight.to(mixed.dtype), cast, w.stride, w.padding, w.dilation, w.groups)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, offset, range, p, weight = ctx.saved_tensors
        steps, zero_point, axis, groups, through, seed = ctx.static
        ops: Any = torch.ops.qprune
        mixed = ops.mix_quantize(x, offset, range, p, steps, zero_point, axis, groups, through, seed, ctx.dtype)
        need, w = ctx.needs_input_grad, ctx.window
        inputs = any(need[:4])
        window = ([weight.size(0)], w.stride, w.padding, w.dilation, False, [0, 0], w.groups, [inputs, need[4], need[5]])
        d_mixed, d_weight, d_bias = torch.ops.aten.convolution_backward(grad, mixed, weight.to(ctx.dtype), *window)
        small: Sequence[Tensor | None] = (None,) * 4
        if inputs:
            found = ops.mix_quantize_backward(
                d_mixed, x, offset, range, p, steps, zero_point, axis, groups, through, seed, need[1]
            )  # fmt: skip
            small = [value if wanted else None for value, wanted in zip(found, need, strict=False)]
        return (
            *small,
            None if d_weight is None else d_weight.to(weight.dtype),
            d_bias if d_bias is None else d_bias.to(ctx.bias),
            None,
            None,
        )


def recomputing_conv2d(x: Tensor, weight: Tensor, a: Candidates, bias: Tensor | None, window: ConvGeometry) -> Tensor:
    """conv(a.mix(x), weight) + bias, [N, F, OH, OW], in the dtype of the mixed input (autocast's, if it is on).

    x, weight  [N, C, H, W], [F, M·C/groups, kh, kw]; with several groups of channels only for M = 1
    """
    static = (a.steps, a.zero_point, 1, a.groups, a.pass_through, None)
    y: Tensor = _Recomputing.apply(x, a.offset, a.range, a.p, weight, bias, static, window)
    return y

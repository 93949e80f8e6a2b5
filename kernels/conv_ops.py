"""The torch.library contract of the mixed convolution: schemas, implementations, fakes, autograd and autocast."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import dispatch, layout, reference_conv
from .errors import QPruneError
from .reference_conv import Geometry

_lib = torch.library.Library("qprune", "FRAGMENT")
_ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor offset, Tensor range, float[] steps, float[] zero_point, Tensor? choice, bool all_groups, "
    "int[] stride, int[] padding, int[] dilation, int groups"
)
_lib.define(f"mixed_conv2d({_ARGUMENTS}, ScalarType dtype) -> Tensor")
_lib.define(f"mixed_conv2d_backward(Tensor grad, {_ARGUMENTS}, bool need_x, bool need_weight) -> (Tensor, Tensor, Tensor, Tensor)")


def mixed_conv2d(
    x: Tensor,
    weight: Tensor,
    offset: Tensor,
    range: Tensor,
    steps: Sequence[float],
    zero_point: Sequence[float],
    choice: Tensor | None,
    all_groups: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """y = Σ_m conv(A_m(x), V_m) for M activation quantizers, without M quantized copies of x. Arguments are taken as valid.

    x              [N, C, H, W], any float dtype
    weight         [CO, M·C/groups, kh, kw], any float dtype: V_1 … V_M side by side along dimension 1, as mix_quantize returns them
    offset, range  [M] float32 (float64 for float64 x); steps, zero_point M numbers (0 = contributes nothing, IDENTITY = x itself)
    choice         [CO] int64: filter f uses activation quantizer choice[f] and its weight is zero in all other groups, so that it is
                   computed once; None: filters use all of them
    all_groups     with `choice`: whether the weight's gradient is wanted in all groups (straight-through gates need it) or only in the
                   chosen ones (zero elsewhere)

    Returns [N, CO, OH, OW] in x's memory format, in the autocast dtype if autocast is on, else x's. Keeps its arguments for the backward
    pass, nothing else.
    """
    dtype = x.dtype
    if dtype != torch.float64 and x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    op: Any = torch.ops.qprune.mixed_conv2d
    return op(x, weight, offset, range, steps, zero_point, choice, all_groups, stride, padding, dilation, groups, dtype)


def _geometry(stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int) -> Geometry:
    (s0, s1), (p0, p1), (d0, d1) = stride, padding, dilation
    return Geometry((s0, s1), (p0, p1), (d0, d1), groups)


def _empty(x: Tensor, weight: Tensor, geometry: Geometry, dtype: torch.dtype) -> Tensor:
    size = (x.size(0), weight.size(0), *geometry.output_size(x.size(2), x.size(3), weight.shape[2:]))
    return layout.empty(size, x, dtype)


def _forward(x, weight, offset, range, steps, zero_point, choice, all_groups, stride, padding, dilation, groups, dtype):  # type: ignore[no-untyped-def]
    geometry = _geometry(stride, padding, dilation, groups)
    out = _empty(x, weight, geometry, dtype)
    if out.numel() == 0:
        return out
    module = dispatch.select(x, "conv")
    if module is None:
        return out.copy_(reference_conv.mixed_conv2d(x, weight, offset, range, steps, zero_point, geometry))
    module.forward(x, out, weight, offset.contiguous(), range.contiguous(), steps, zero_point, choice, geometry)
    return out


def _backward(  # type: ignore[no-untyped-def]
    grad, x, weight, offset, range, steps, zero_point, choice, all_groups, stride, padding, dilation, groups, need_x, need_weight
):
    geometry, m = _geometry(stride, padding, dilation, groups), len(steps)
    dx, d_weight, d_offset, d_range = _empty_gradients(x, weight, offset, range, need_x, need_weight)
    if grad.numel() == 0:
        return dx.zero_(), d_weight.zero_(), d_offset.zero_(), d_range.zero_()
    module = dispatch.select(x, "conv")
    chosen = None if all_groups else choice
    if module is None:
        found = reference_conv.mixed_conv2d_backward(grad, x, weight, offset, range, steps, zero_point, geometry)
        if need_x:
            dx.copy_(found[0])
        if need_weight:
            d_weight.copy_(found[1] if chosen is None else reference_conv.chosen_only(found[1], chosen, m))
        return dx, d_weight, d_offset.copy_(found[2]), d_range.copy_(found[3])
    offset, range = offset.contiguous(), range.contiguous()
    if need_x:
        module.backward_input(grad, dx, d_offset, d_range, x, weight, offset, range, steps, zero_point, choice, geometry)
    else:
        d_offset.zero_()
        d_range.zero_()
    if need_weight:
        module.backward_weight(grad, d_weight, x, offset, range, steps, zero_point, chosen, geometry)
    return dx, d_weight, d_offset, d_range


def _empty_gradients(x: Tensor, weight: Tensor, offset: Tensor, range: Tensor, need_x: bool, need_weight: bool) -> tuple[Tensor, ...]:
    """Room for dx like x (also behind d_offset and d_range), d_weight like weight, d_offset and d_range; empty where nobody needs it."""
    dx = layout.empty(x.shape if need_x else (0,), x, x.dtype)
    d_weight = layout.empty(weight.shape if need_weight else (0,), weight, weight.dtype)
    return dx, d_weight, torch.empty_like(offset), torch.empty_like(range)


for _device in ("CPU", "CUDA"):
    _lib.impl("mixed_conv2d", _forward, _device)
    _lib.impl("mixed_conv2d_backward", _backward, _device)


@torch.library.register_fake("qprune::mixed_conv2d", lib=_lib)
def _fake_forward(x, weight, offset, range, steps, zero_point, choice, all_groups, stride, padding, dilation, groups, dtype):  # type: ignore[no-untyped-def]
    return _empty(x, weight, _geometry(stride, padding, dilation, groups), dtype)


@torch.library.register_fake("qprune::mixed_conv2d_backward", lib=_lib)
def _fake_backward(  # type: ignore[no-untyped-def]
    grad, x, weight, offset, range, steps, zero_point, choice, all_groups, stride, padding, dilation, groups, need_x, need_weight
):
    return _empty_gradients(x, weight, offset, range, need_x, need_weight)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, offset, range, steps, zero_point, choice, all_groups, *geometry, _ = inputs
    ctx.save_for_backward(x, weight, offset, range, choice)
    ctx.static = (all_groups, *geometry)
    ctx.grids = (steps, zero_point)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight, offset, range, choice = ctx.saved_tensors
    need_x, need_weight, need_offset, need_range = ctx.needs_input_grad[:4]
    op: Any = torch.ops.qprune.mixed_conv2d_backward
    small = need_offset or need_range
    dx, d_weight, d_offset, d_range = op(
        grad, x, weight, offset, range, *ctx.grids, choice, *ctx.static, need_x or small, need_weight
    )  # fmt: skip
    wanted = (dx if need_x else None, d_weight if need_weight else None, d_offset if need_offset else None, d_range if need_range else None)
    return *wanted, *[None] * 9


torch.library.register_autograd("qprune::mixed_conv2d", _autograd, setup_context=_setup_context, lib=_lib)


def _refuse(ctx: Any, *grads: Tensor) -> None:
    raise QPruneError("mixed_conv2d has no second derivatives: do not differentiate its gradients (create_graph=True)")


torch.library.register_autograd("qprune::mixed_conv2d_backward", _refuse, lib=_lib)

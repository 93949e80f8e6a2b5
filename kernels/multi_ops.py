"""The torch.library contract of mixing many weights in one operation: schemas, implementations, fakes, autograd and autocast.

A network has tens of weights, each of which costs an operator call, a launch and an entry of the autograd graph in each pass. Here one call
serves them all: with Triton one launch in each pass, on the CPU one loop over the C++ kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import dispatch, launch_multi, layout, reference
from .errors import QPruneError

_lib = torch.library.Library("qprune", "FRAGMENT")
_CANDIDATES = "Tensor[] xs, Tensor offset, Tensor range, Tensor p, float[] steps, float[] zero_point, int[] groups, int[] pass_through"
_lib.define(f"mix_quantize_many({_CANDIDATES}, ScalarType? dtype) -> Tensor[]")
_lib.define(f"mix_quantize_many_backward(Tensor[] grads, {_CANDIDATES}, bool need_offset) -> (Tensor[], Tensor, Tensor, Tensor)")


def mix_quantize_many(
    xs: Sequence[Tensor],
    offset: Tensor,
    range: Tensor,
    p: Tensor,
    steps: Sequence[float],
    zero_point: Sequence[float],
    groups: Sequence[int],
    pass_through: Sequence[int],
) -> list[Tensor]:
    """`mix_quantize` of every weight of a network, with a row of the parameters for each filter. Arguments are taken as valid.

    xs                weights [F, …] of rank 2 and more, of any float dtypes, on one device
    offset, range, p  [R, K], R = Σ F, rows in the order of xs; float32 (float64 for float64 weights)
    steps, zero_point K numbers; steps 0 = pruned, reference.IDENTITY = full precision
    groups            K group numbers 0 … M−1
    pass_through      K flags: gradient to x also where the candidate clips

    Returns, for each weight, [F, M · C, …] in its memory format, in the autocast dtype if autocast is on, else its own.
    Keeps xs and the parameters for the backward pass, nothing else.
    """
    dtype = None
    if xs and xs[0].dtype != torch.float64 and xs[0].device.type != "meta" and torch.is_autocast_enabled(xs[0].device.type):
        dtype = torch.get_autocast_dtype(xs[0].device.type)
    op: Any = torch.ops.qprune.mix_quantize_many
    outputs: list[Tensor] = op(list(xs), offset, range, p, steps, zero_point, groups, pass_through, dtype)
    return outputs


def _network(xs: Sequence[Tensor], groups: Sequence[int]) -> launch_multi.Network:
    return launch_multi.network(tuple([(x.shape, x.stride()) for x in xs]), max(groups) + 1)


def _dense(xs: Sequence[Tensor], net: launch_multi.Network) -> list[Tensor]:
    return [x if dense else layout.dense(x, net.groups) for x, dense in zip(xs, net.dense, strict=True)]


def _module(xs: Sequence[Tensor]) -> ModuleType | None:
    return dispatch.select(xs[0], "multi")


def _forward(xs, offset, range, p, steps, zero_point, groups, pass_through, dtype):  # type: ignore[no-untyped-def]
    if not xs:
        return []
    net = _network(xs, groups)
    xs = _dense(xs, net)
    outs = [layout.empty_output(x, net.groups, dtype or x.dtype) for x in xs]
    module = _module(xs)
    small = [t.contiguous() for t in (offset, range, p)]
    if module is not None and hasattr(module, "forward_many"):
        module.forward_many(xs, outs, *small, steps, zero_point, groups, net)
        return outs
    rows = (t.split(net.rows) for t in small)
    for x, out, described, b, r, q in zip(xs, outs, net.layouts, *rows, strict=True):
        if x.numel() == 0:
            continue
        if module is None:
            parts = reference.mix_quantize(x, b, r, q, steps, zero_point, 0, groups, None)
            out.copy_(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))
        else:
            module.forward(x, out, b, r, q, steps, zero_point, groups, None, described)
    return outs


def _like_outputs(grads: Sequence[Tensor], xs: Sequence[Tensor], net: launch_multi.Network) -> list[Tensor]:
    return [
        grad if grad.stride() == strides else layout.like_output(grad, x, net.groups)
        for grad, x, strides in zip(grads, xs, net.strides, strict=True)
    ]


def _layer_backward(module, grad, x, b, r, q, steps, zero_point, groups, pass_through, described, need_offset):  # type: ignore[no-untyped-def]
    if x.numel() == 0:
        return layout.empty_output(x, 1, x.dtype), *(torch.zeros_like(t) for t in (b, r, q))
    if module is not None:
        return module.backward(grad, x, b, r, q, steps, zero_point, groups, pass_through, None, described, need_offset)
    grads = grad.chunk(described.groups, dim=1)
    dx, *small = reference.mix_quantize_backward(grads, x, b, r, q, steps, zero_point, 0, groups, pass_through, None)
    return layout.empty_output(x, 1, x.dtype).copy_(dx), *small


def _backward(grads, xs, offset, range, p, steps, zero_point, groups, pass_through, need_offset):  # type: ignore[no-untyped-def]
    small = [t.contiguous() for t in (offset, range, p)]
    if not xs:
        return [], *(torch.zeros_like(t) for t in small)
    net = _network(xs, groups)
    xs = _dense(xs, net)
    grads = _like_outputs(grads, xs, net)
    module = _module(xs)
    if module is not None and hasattr(module, "backward_many"):
        return module.backward_many(grads, xs, *small, steps, zero_point, groups, pass_through, net, need_offset)
    results = [
        _layer_backward(module, grad, x, b, r, q, steps, zero_point, groups, pass_through, described, need_offset)
        for grad, x, described, b, r, q in zip(grads, xs, net.layouts, *(t.split(net.rows) for t in small), strict=True)
    ]
    dxs, *columns = zip(*results, strict=True)
    return list(dxs), *map(torch.cat, columns)


for _device in ("CPU", "CUDA"):
    _lib.impl("mix_quantize_many", _forward, _device)
    _lib.impl("mix_quantize_many_backward", _backward, _device)


@torch.library.register_fake("qprune::mix_quantize_many", lib=_lib)
def _fake_forward(xs, offset, range, p, steps, zero_point, groups, pass_through, dtype):  # type: ignore[no-untyped-def]
    m = max(groups) + 1
    return [layout.empty_output(layout.dense(x, m), m, dtype or x.dtype) for x in xs]


@torch.library.register_fake("qprune::mix_quantize_many_backward", lib=_lib)
def _fake_backward(grads, xs, offset, range, p, steps, zero_point, groups, pass_through, need_offset):  # type: ignore[no-untyped-def]
    small = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (offset, range, p))
    return [torch.empty_like(layout.dense(x, max(groups) + 1)) for x in xs], *small


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    xs, offset, range, p, steps, zero_point, groups, pass_through, _ = inputs
    ctx.save_for_backward(*xs, offset, range, p)
    ctx.static = (steps, zero_point, groups, pass_through)


def _autograd(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    *xs, offset, range, p = ctx.saved_tensors
    op: Any = torch.ops.qprune.mix_quantize_many_backward
    dxs, d_offset, d_range, d_p = op(grads, xs, offset, range, p, *ctx.static, ctx.needs_input_grad[1])
    return dxs, d_offset, d_range, d_p, *[None] * 5


torch.library.register_autograd("qprune::mix_quantize_many", _autograd, setup_context=_setup_context, lib=_lib)


def _refuse(ctx: Any, *grads: Any) -> None:
    raise QPruneError("mix_quantize_many has no second derivatives: do not differentiate its gradients (create_graph=True)")


torch.library.register_autograd("qprune::mix_quantize_many_backward", _refuse, lib=_lib)

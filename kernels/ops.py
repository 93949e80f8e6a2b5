"""The torch.library contract of the fused operations: schemas, implementations, fakes, autograd and autocast, on one page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import dispatch, layout, reference
from .errors import QPruneError

_lib = torch.library.Library("qprune", "DEF")
_CANDIDATES = "Tensor offset, Tensor range, Tensor p, float[] steps, float[] zero_point, int axis, int[] groups"
_lib.define(f"mix_quantize(Tensor x, {_CANDIDATES}, int[] pass_through, Tensor? seed, ScalarType dtype) -> Tensor")
_lib.define(
    f"mix_quantize_backward(Tensor grad, Tensor x, {_CANDIDATES}, int[] pass_through, Tensor? seed, bool need_offset)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)


def mix_quantize(
    x: Tensor,
    offset: Tensor,
    range: Tensor,
    p: Tensor,
    steps: Sequence[float],
    zero_point: Sequence[float],
    axis: int,
    groups: Sequence[int],
    pass_through: Sequence[int],
    seed: Tensor | None,
) -> Tensor:
    """V_1 … V_M of core candidates, concatenated along dimension 1, in one pass over x. Arguments are taken as valid.

    x                 any float dtype, dense in any order of dimensions (else it is copied)
    offset, range, p  [C, K] or [1, K], float32 (float64 for float64 x); C = x.size(axis). Where offset and range are one column each,
                      expanded to K (stride 0), the Triton kernels clip once for all candidates that have the same z/n
    steps, zero_point K numbers; steps 0 = pruned, reference.IDENTITY = full precision
    groups            K group numbers 0 … M−1
    pass_through      K flags: gradient to x also where the candidate clips
    seed              [1] int64 for noise instead of rounding, or None

    Returns [x.size(0), M · x.size(1), …] (x's shape for M = 1) in x's memory format, in the autocast dtype if autocast is on, else x's.
    Keeps x and the parameters for the backward pass, nothing else.
    """
    dtype = x.dtype
    if dtype != torch.float64 and x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    arguments = (x, offset, range, p, steps, zero_point, axis, groups, pass_through, seed, dtype)
    if _is_plain(x):
        out: Tensor = _Direct.apply(*arguments)
        return out
    # torch.ops is reached through attributes that type checkers do not know
    op: Any = torch.ops.qprune.mix_quantize
    return op(*arguments)


def _forward(x, offset, range, p, steps, zero_point, axis, groups, pass_through, seed, dtype):  # type: ignore[no-untyped-def]
    m = max(groups) + 1
    x = layout.dense(x, m)
    out = layout.empty_output(x, m, dtype)
    module = dispatch.select(x)
    if x.numel() == 0:
        return out
    if module is None:
        parts = reference.mix_quantize(x, offset, range, p, steps, zero_point, axis, groups, seed)
        return out.copy_(parts[0] if m == 1 else torch.cat(parts, dim=1))
    module.forward(x, out, offset, range, p, steps, zero_point, groups, seed, layout.describe(x, p.size(0), axis, m))
    return out


def _backward(grad, x, offset, range, p, steps, zero_point, axis, groups, pass_through, seed, need_offset):  # type: ignore[no-untyped-def]
    m = max(groups) + 1
    dense = layout.dense(x, m)
    grad = layout.like_output(grad, dense, m)
    module = dispatch.select(dense)
    if x.numel() == 0:
        return torch.empty_like(dense), *(torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (offset, range, p))
    if module is None:
        grads = [grad] if m == 1 else grad.chunk(m, dim=1)
        dx, *small = reference.mix_quantize_backward(grads, dense, offset, range, p, steps, zero_point, axis, groups, pass_through, seed)
        return torch.empty_like(dense).copy_(dx), *small
    described = layout.describe(dense, p.size(0), axis, m)
    return module.backward(grad, dense, offset, range, p, steps, zero_point, groups, pass_through, seed, described, need_offset)


for _device in ("CPU", "CUDA"):
    _lib.impl("mix_quantize", _forward, _device)
    _lib.impl("mix_quantize_backward", _backward, _device)


@torch.library.register_fake("qprune::mix_quantize", lib=_lib)
def _fake_forward(x, offset, range, p, steps, zero_point, axis, groups, pass_through, seed, dtype):  # type: ignore[no-untyped-def]
    m = max(groups) + 1
    return layout.empty_output(layout.dense(x, m), m, dtype)


@torch.library.register_fake("qprune::mix_quantize_backward", lib=_lib)
def _fake_backward(grad, x, offset, range, p, steps, zero_point, axis, groups, pass_through, seed, need_offset):  # type: ignore[no-untyped-def]
    small = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (offset, range, p))
    return torch.empty_like(layout.dense(x, max(groups) + 1)), *small


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, offset, range, p, steps, zero_point, axis, groups, pass_through, seed, _ = inputs
    ctx.save_for_backward(x, offset, range, p, seed)
    ctx.static = (steps, zero_point, axis, groups, pass_through)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, offset, range, p, seed = ctx.saved_tensors
    op: Any = torch.ops.qprune.mix_quantize_backward
    dx, d_offset, d_range, d_p = op(grad, x, offset, range, p, *ctx.static, seed, ctx.needs_input_grad[1])
    return dx, d_offset, d_range, d_p, *[None] * 7


torch.library.register_autograd("qprune::mix_quantize", _autograd, setup_context=_setup_context, lib=_lib)


def _refuse(ctx: Any, *grads: Tensor) -> None:
    raise QPruneError("mix_quantize has no second derivatives: do not differentiate its gradients (create_graph=True)")


torch.library.register_autograd("qprune::mix_quantize_backward", _refuse, lib=_lib)


class _Direct(torch.autograd.Function):
    """The same without the dispatcher, for plain tensors in eager mode: small layers notice its overhead."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        _setup_context(ctx, arguments, arguments[0])
        return _forward(*arguments)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled() or not _is_plain(grad):
            return _autograd(ctx, grad)
        x, offset, range, p, seed = ctx.saved_tensors
        found: tuple[Tensor, ...] = _backward(grad, x, offset, range, p, *ctx.static, seed, ctx.needs_input_grad[1])  # type: ignore[call-arg]
        return *found, *[None] * 7


def _is_plain(x: Tensor) -> bool:
    """Nothing is tracing, transforming or overriding the call."""
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        and x.device.type in ("cpu", "cuda")
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )

"""The torch.library contract of the depthwise mixed convolution: schemas, implementations, fakes, autograd and autocast."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import dispatch, layout, ops, reference_depthwise
from .errors import QPruneError
from .launch_depthwise import MOST_TAPS
from .reference import IDENTITY

_mix: Any = ops._forward
_mix_backward: Any = ops._backward

_lib = torch.library.Library("qprune", "FRAGMENT")
_ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor a_offset, Tensor a_range, Tensor a_p, float[] a_steps, float[] a_zero, int[] a_groups, "
    "Tensor w_offset, Tensor w_range, Tensor w_p, float[] w_steps, float[] w_zero, int[] w_groups, int[] w_through, "
    "int[] stride, int[] padding, int[] dilation"
)
_lib.define(f"mixed_depthwise({_ARGUMENTS}, ScalarType dtype) -> Tensor")
_lib.define(
    f"mixed_depthwise_backward(Tensor grad, {_ARGUMENTS}, bool need_offset)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def mixed_depthwise(
    x: Tensor,
    weight: Tensor,
    a_offset: Tensor,
    a_range: Tensor,
    a_p: Tensor,
    a_steps: Sequence[float],
    a_zero: Sequence[float],
    a_groups: Sequence[int],
    w_offset: Tensor,
    w_range: Tensor,
    w_p: Tensor,
    w_steps: Sequence[float],
    w_zero: Sequence[float],
    w_groups: Sequence[int],
    w_through: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """y[:, c] = Σ_m conv(X_m[:, c], V_m[c]) with X_m = Σ_{k in m} p_a[k]·A_k(x) padded with zeros and V_m = Σ_{k in m} p_w[c, k]·Q_k(W[c]).
    Arguments are taken as valid.

    x                           [N, C, H, W], any float dtype, any memory format
    weight                      [C, 1, kh, kw], any float dtype; or [C, M, kh, kw] with w_steps = [IDENTITY] · M and w_groups = 0 … M−1: a
                                weight that is mixed already, V_m = p_w[c, m]·weight[:, m]
    a_offset, a_range, a_p      [Ka], float32 (float64 for float64 x); a_groups: Ka group numbers 0 … M−1
    w_offset, w_range, w_p      [C, Kw] or [1, Kw], likewise; w_groups: Kw group numbers with the same M
    *_steps, *_zero             n and z of the candidates; steps 0 = pruned, reference.IDENTITY = full precision
    w_through                   Kw flags: gradient to the weight also where the candidate clips
    stride, padding, dilation   (height, width)

    Returns [N, C, OH, OW] in x's memory format, in the autocast dtype if autocast is on, else x's. Keeps its arguments for the backward
    pass, nothing else. A NaN in x makes y NaN wherever it is read, and at least the gradients that it touches.
    """
    dtype = x.dtype
    if dtype != torch.float64 and x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    op: Any = torch.ops.qprune.mixed_depthwise
    return op(
        x, weight, a_offset, a_range, a_p, a_steps, a_zero, a_groups, w_offset, w_range, w_p, w_steps, w_zero, w_groups, w_through,
        stride, padding, dilation, dtype,
    )  # fmt: skip


def _empty(x: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int], dtype: torch.dtype) -> Tensor:
    axes = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    return layout.empty((*x.shape[:2], *((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes)), x, dtype)


class _Weight:
    """The weight's candidates as arguments of mix_quantize. A weight [C, M, kh, kw] that is mixed already becomes one of C·M rows with one
    candidate each."""

    def __init__(self, weight, offset, range, p, steps, zero, groups, through) -> None:  # type: ignore[no-untyped-def]
        self.shape, self.slices, self.rows = weight.shape, weight.size(1), p.size(0)
        self.weight, self.small, self.lists = weight, (offset, range, p), (steps, zero, 0, groups)
        self.through = through
        if self.slices > 1:
            c, m = weight.shape[:2]
            self.weight = weight.reshape(c * m, 1, *weight.shape[2:])
            self.small = tuple(t.expand(c, m).reshape(c * m, 1) for t in (offset, range, p))
            self.lists, self.through = ([IDENTITY], [0.0], 0, [0]), [0]

    def mix(self, dtype: torch.dtype) -> Tensor:
        """V [C, M, kh, kw]."""
        mixed: Tensor = _mix(self.weight, *self.small, *self.lists, self.through, None, dtype)
        return mixed.reshape(self.shape[0], -1, *self.shape[2:])

    def backward(self, grad: Tensor) -> tuple[Tensor, ...]:
        """Gradients of weight, offset, range and p, given that of V [C, M, kh, kw]."""
        grad = grad.reshape(self.weight.size(0), -1, *self.shape[2:])
        found = _mix_backward(grad, self.weight, *self.small, *self.lists, self.through, None, True)
        if self.slices == 1:
            return tuple(found)
        small = (t.reshape(-1, self.slices) for t in found[1:])
        return found[0].reshape(self.shape), *(t if self.rows > 1 else t.sum(0, keepdim=True) for t in small)


def _kernels(x: Tensor, weight: Tensor, groups: Sequence[int]) -> Any:
    """The module with the kernels, or None for mix_quantize and PyTorch's convolution, also where V has too many taps."""
    fits = (max(groups) + 1) * weight[0, 0].numel() <= MOST_TAPS
    return dispatch.select(x, "depthwise") if fits else None


def _parts(mixed: Tensor, m: int) -> list[Tensor]:
    return [mixed] if m == 1 else list(mixed.chunk(m, dim=1))


def _forward(  # type: ignore[no-untyped-def]
    x, weight, a_offset, a_range, a_p, a_steps, a_zero, a_groups, w_offset, w_range, w_p, w_steps, w_zero, w_groups, w_through,
    stride, padding, dilation, dtype,
):  # fmt: skip
    out = _empty(x, weight, stride, padding, dilation, dtype)
    if out.numel() == 0:
        return out
    small = [t.reshape(1, -1).contiguous() for t in (a_offset, a_range, a_p)]
    module = _kernels(x, weight, a_groups)
    if module is None:
        m, wide = max(a_groups) + 1, torch.float64 if x.dtype == torch.float64 else torch.float32
        v = _Weight(weight, w_offset, w_range, w_p, w_steps, w_zero, w_groups, w_through).mix(wide)
        mixed = _mix(x, *small, a_steps, a_zero, 1, a_groups, [0] * len(a_steps), None, wide)
        return out.copy_(reference_depthwise.convolve(_parts(mixed, m), _parts(v, m), stride, padding, dilation))
    v = module.mix_weight(weight, w_offset.contiguous(), w_range.contiguous(), w_p.contiguous(), w_steps, w_zero, w_groups)
    window = (tuple(weight.shape[2:]), tuple(stride), tuple(padding), tuple(dilation))
    module.forward(x, out, v, *small, a_steps, a_zero, a_groups, *window)
    return out


def _backward(  # type: ignore[no-untyped-def]
    grad, x, weight, a_offset, a_range, a_p, a_steps, a_zero, a_groups, w_offset, w_range, w_p, w_steps, w_zero, w_groups, w_through,
    stride, padding, dilation, need_offset,
):  # fmt: skip
    dx, *others = _empty_gradients(x, weight, a_offset, a_range, a_p, w_offset, w_range, w_p)
    if grad.numel() == 0:
        return dx.zero_(), *(t.zero_() for t in others)
    grad = grad.contiguous(memory_format=layout._memory_format(dx))
    small = [t.reshape(1, -1).contiguous() for t in (a_offset, a_range, a_p)]
    mixing = _Weight(weight, w_offset, w_range, w_p, w_steps, w_zero, w_groups, w_through)
    module = _kernels(x, weight, a_groups)
    if module is None:
        m, wide = max(a_groups) + 1, torch.float64 if x.dtype == torch.float64 else torch.float32
        candidates = (*small, a_steps, a_zero, 1, a_groups, [0] * len(a_steps), None)
        parts = _parts(_mix(x, *candidates, wide), m), _parts(mixing.mix(wide), m)
        d_mixed, d_weights = reference_depthwise.convolve_backward(grad.to(wide), *parts, stride, padding, dilation)
        found, *d_small = _mix_backward(torch.cat(d_mixed, 1), x, *candidates, need_offset)
        dx.copy_(found)
        d_v = torch.cat(d_weights, 1)
    else:
        v = module.mix_weight(weight, w_offset.contiguous(), w_range.contiguous(), w_p.contiguous(), w_steps, w_zero, w_groups)
        window = (tuple(weight.shape[2:]), tuple(stride), tuple(padding), tuple(dilation))
        d_v, *d_small = module.backward(grad, dx, x, v, *small, a_steps, a_zero, a_groups, *window, need_offset)
    d_weight, *d_mixing = mixing.backward(d_v)
    return dx, d_weight.contiguous(), *(t.reshape(-1) for t in d_small), *d_mixing


def _empty_gradients(x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Room for dx in x's memory format, and for the other gradients."""
    return layout.empty(x.shape, x, x.dtype), *(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in others)


for _device in ("CPU", "CUDA"):
    _lib.impl("mixed_depthwise", _forward, _device)
    _lib.impl("mixed_depthwise_backward", _backward, _device)


@torch.library.register_fake("qprune::mixed_depthwise", lib=_lib)
def _fake_forward(x, weight, *rest):  # type: ignore[no-untyped-def]
    *_, stride, padding, dilation, dtype = rest
    return _empty(x, weight, stride, padding, dilation, dtype)


@torch.library.register_fake("qprune::mixed_depthwise_backward", lib=_lib)
def _fake_backward(  # type: ignore[no-untyped-def]
    grad, x, weight, a_offset, a_range, a_p, a_steps, a_zero, a_groups, w_offset, w_range, w_p, *rest
):
    return _empty_gradients(x, weight, a_offset, a_range, a_p, w_offset, w_range, w_p)


_TENSORS = (0, 1, 2, 3, 4, 8, 9, 10)
"""Where the arguments are that have gradients."""


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*(inputs[i] for i in _TENSORS))
    ctx.static = (inputs[5:8], inputs[11:18])


def _autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    tensors, (activation, static) = ctx.saved_tensors, ctx.static
    op: Any = torch.ops.qprune.mixed_depthwise_backward
    found = op(grad, *tensors[:5], *activation, *tensors[5:], *static, ctx.needs_input_grad[2])
    gradients: list[Tensor | None] = [None] * 19
    for i, value in zip(_TENSORS, found, strict=True):
        gradients[i] = value if ctx.needs_input_grad[i] else None
    return tuple(gradients)


torch.library.register_autograd("qprune::mixed_depthwise", _autograd, setup_context=_setup_context, lib=_lib)


def _refuse(ctx: Any, *grads: Tensor) -> None:
    raise QPruneError("mixed_depthwise has no second derivatives: do not differentiate its gradients (create_graph=True)")


torch.library.register_autograd("qprune::mixed_depthwise_backward", _refuse, lib=_lib)

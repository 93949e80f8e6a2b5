"""The fused operations as functions of tensors, with their arguments checked."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qprune.kernels import IDENTITY, InputError
from qprune.kernels import mix_quantize as _mix_quantize

_MAX_STEPS = 2**21


def _steps(steps: Sequence[float], zero_point: Sequence[float], k: int) -> tuple[list[float], list[float]]:
    if not (len(steps) == len(zero_point) == k) or k == 0:
        raise InputError(f"mix_quantize: steps and zero_point must hold K = {k} ≥ 1 numbers, got {len(steps)} and {len(zero_point)}")
    for n, z in zip(steps, zero_point, strict=True):
        if n != math.inf and n != IDENTITY and not (0 <= n <= _MAX_STEPS and n == int(n)):
            raise InputError(f"mix_quantize: steps must be integers from 0 to {_MAX_STEPS}, or math.inf for full precision, got {n}")
        if 0 < n < math.inf and not (0 <= z <= n and 2 * z == int(2 * z)):
            raise InputError(f"mix_quantize: zero_point must be a multiple of 1/2 between 0 and steps = {n}, got {z}")
    return [IDENTITY if n == math.inf else float(n) for n in steps], [float(z) for z in zero_point]


def mix_quantize(
    x: Tensor,
    offset: Tensor,
    range: Tensor,
    p: Tensor,
    steps: Sequence[float],
    zero_point: Sequence[float],
    *,
    axis: int = 0,
    groups: Sequence[int] | None = None,
    pass_through: bool | Sequence[bool] = False,
    seed: Tensor | None = None,
) -> Tensor:
    """Quantize x with K candidates and return their weighted sum, reading x once.

        u = clamp((x − β)/r + z/n, 0, 1),   Q(x) = β + (round_half_even(n·u) − z)·r/n,   V = Σ_k p_k Q_k(x)

    x                 float64, float32, bfloat16 or float16, any shape and any strides; a dense memory format (channels_last, …) is kept
    offset, range, p  β, r, p: [K], or [C, K] with C = x.size(axis); range > 0. Computed in float32 (float64 for float64 x)
    steps             n per candidate: 2^bits − 1 or similar; 0 = pruned (contributes 0), math.inf = full precision (contributes x)
    zero_point        z per candidate: 0 ≤ z ≤ n, a multiple of 1/2
    axis              dimension of x that the rows of [C, K] parameters follow: 0 for weights, 1 for activations
    groups            group number per candidate, 0 … M−1: returns V_m = Σ over group m, stacked as [M, *x.shape]. The memory is that of the
                      tensor concatenated along dimension 1: `out.movedim(0, 1).flatten(1, 2)` is what a convolution consumes, not a copy
    pass_through      True (or one flag per candidate): the gradient reaches x also where the candidate clips
    seed              [1] int64: add uniform noise of one step's width instead of rounding (Philox, keyed by seed and storage position)

    Gradients: x straight-through inside the clip range; range, offset and p as derived in kernels/README.md. Keeps only x for the
    backward pass.
    Raises InputError for integer inputs, wrong shapes, and values outside the ranges above.
    """
    if not x.is_floating_point():
        raise InputError(f"mix_quantize: x must be a floating-point tensor, got {x.dtype}: convert it with x.float() first")
    if x.dim() == 0 or not -x.dim() <= axis < x.dim():
        raise InputError(f"mix_quantize: axis {axis} is not a dimension of x with shape {tuple(x.shape)}")
    axis %= x.dim()
    k, channels = p.size(-1) if p.dim() else 0, x.size(axis)
    wanted = torch.float64 if x.dtype == torch.float64 else torch.float32
    for name, t in (("offset", offset), ("range", range), ("p", p)):
        if tuple(t.shape) not in {(k,), (channels, k), (1, k)}:
            raise InputError(f"mix_quantize: {name} must be [K] or [C, K] = [{channels}, {k}] for axis {axis}, got {tuple(t.shape)}")
        if t.device != x.device:
            raise InputError(f"mix_quantize: {name} is on {t.device}, x on {x.device}")
    n, z = _steps(steps, zero_point, k)
    group = [0] * k if groups is None else [int(g) for g in groups]
    if len(group) != k or any(i != g for i, g in enumerate(sorted(set(group)))):
        raise InputError(f"mix_quantize: groups must number K = {k} candidates 0 … M−1 without gaps, got {groups}")
    through = [pass_through] * k if isinstance(pass_through, bool) else list(pass_through)
    if len(through) != k:
        raise InputError(f"mix_quantize: pass_through must be a bool or K = {k} bools, got {len(through)}")
    if seed is not None and (seed.dtype != torch.int64 or seed.numel() != 1):
        raise InputError(f"mix_quantize: seed must be one int64 number as a tensor, got {seed.dtype} of shape {tuple(seed.shape)}")

    rows = channels if any(t.dim() == 2 and t.size(0) == channels for t in (offset, range, p)) else 1
    offset, range, p = (t.to(wanted).expand(rows, k) for t in (offset, range, p))
    m = max(group) + 1
    flat = x.unsqueeze(1) if m > 1 and x.dim() == 1 else x
    out = _mix_quantize(flat, offset, range, p, n, z, axis, group, [int(t) for t in through], seed)
    if groups is None:
        return out
    return out.unflatten(1, (m, flat.size(1))).movedim(1, 0).reshape(m, *x.shape)

"""The fused operations as functions of tensors, with their arguments checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qprune.convolution import joint_conv2d
from qprune.kernels import IDENTITY, ConvGeometry, InputError, routes
from qprune.kernels import mix_quantize as _mix_quantize
from qprune.quantizers import Candidates, spread

_MAX_STEPS = 2**21


def _steps(steps: Sequence[float], zero_point: Sequence[float], k: int, name: str = "mix_quantize") -> tuple[list[float], list[float]]:
    if not (len(steps) == len(zero_point) == k) or k == 0:
        raise InputError(f"{name}: steps and zero_point must hold K = {k} ≥ 1 numbers, got {len(steps)} and {len(zero_point)}")
    for n, z in zip(steps, zero_point, strict=True):
        if n != math.inf and n != IDENTITY and not (0 <= n <= _MAX_STEPS and n == int(n)):
            raise InputError(f"{name}: steps must be integers from 0 to {_MAX_STEPS}, or math.inf for full precision, got {n}")
        if 0 < n < math.inf and not (0 <= z <= n and 2 * z == int(2 * z)):
            raise InputError(f"{name}: zero_point must be a multiple of 1/2 between 0 and steps = {n}, got {z}")
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


class Quantizers(NamedTuple):
    """K candidate quantizers in the letters of `mix_quantize`: offset and range are [K], or [F, K] for weights with own ones per filter."""

    offset: Tensor
    range: Tensor
    steps: Sequence[float]
    zero_point: Sequence[float]


FORMS = ("shared", "joint", "sampled")


def mixed_conv2d(
    x: Tensor,
    weight: Tensor,
    p: Tensor,
    w: Quantizers,
    a: Quantizers,
    *,
    a_p: Tensor | None = None,
    pairs: Sequence[tuple[int, int]] | None = None,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    form: str | None = None,
    route: str | None = None,
) -> Tensor:
    """The mixed operation y[:, f] = Σ_k p[f, k] · conv(A_{a_k}(x), Q_{w_k}(W[f])) + bias[f], without a convolution per candidate.

    x, weight  [N, C, H, W], [F, C/groups, kh, kw]
    w, a       candidate quantizers of the weight and of x (`Quantizers`; those of x have one offset and range for the whole tensor)
    form       "shared"   factorised candidates: p over w ([K_w] or [F, K_w]) and a_p over a ([K_a]); one mixed input, one mixed weight,
                          one convolution
               "joint"    p over `pairs` of (number in w, number in a), by default all of them in the order of nested loops, w outside:
                          [K] or [F, K]
               "sampled"  the same with one-hot rows of p, which the caller promises: every filter is computed once. Gradients reach all of
                          p, as straight-through estimators need them
               default: "shared" if a_p is given, else "joint"
    route      of the joint forms: "library", "fused", or None for the table of `qprune.kernels.routes`

    Returns [N, F, OH, OW] in x's memory format. Raises InputError for shapes that do not fit and for unknown forms and routes.
    """
    routes.check(route)
    form = form or ("joint" if a_p is None else "shared")
    if form not in FORMS:
        raise InputError(f"mixed_conv2d: form must be one of {', '.join(FORMS)}, got {form!r}")
    if (form == "shared") != (a_p is not None) or (form == "shared" and pairs is not None):
        raise InputError("mixed_conv2d: form 'shared' takes a_p and no pairs, the joint forms take pairs and no a_p")
    if x.dim() != 4 or weight.dim() != 4 or x.size(1) != weight.size(1) * groups:
        raise InputError(
            f"mixed_conv2d: expected x [N, C, H, W] and weight [F, C/groups, kh, kw] with groups = {groups}, "
            f"got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    window = ConvGeometry(_pair("stride", stride), _pair("padding", padding), _pair("dilation", dilation), groups)
    k_w, k_a = len(w.steps), len(a.steps)
    if a_p is not None:
        mixed = mix_quantize(weight, w.offset, w.range, p, w.steps, w.zero_point)
        x = mix_quantize(x, a.offset, a.range, a_p, a.steps, a.zero_point, axis=1)
        return F.conv2d(x, mixed, bias, window.stride, window.padding, window.dilation, groups)
    pairs = [(i, j) for i in range(k_w) for j in range(k_a)] if pairs is None else list(pairs)
    if any(not (0 <= i < k_w and 0 <= j < k_a) for i, j in pairs) or {j for _, j in pairs} != set(range(k_a)):
        raise InputError(
            f"mixed_conv2d: pairs must number {k_w} weight and {k_a} input quantizers, each input one at least once, got {pairs}"
        )
    picks, which = [i for i, _ in pairs], [j for _, j in pairs]
    offset, range_ = (spread(t if t.dim() == 2 else t.unsqueeze(0), picks) for t in (w.offset, w.range))
    steps, zero_point = ([values[i] for i in picks] for values in (w.steps, w.zero_point))
    v = mix_quantize(weight, offset, range_, p, steps, zero_point, groups=which)
    v = v.movedim(0, 1).flatten(1, 2)
    choice = None
    if form == "sampled":
        rows = p.expand(weight.size(0), -1)
        chosen = [torch.stack([rows[:, k] for k, j in enumerate(which) if j == m]).sum(0) for m in range(k_a)]
        choice = torch.stack(chosen, dim=1).argmax(1)
    one = torch.ones(1, k_a, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32, device=x.device)
    n, z = _steps(a.steps, a.zero_point, k_a, "mixed_conv2d")
    beta, r = (t.to(one.dtype).view(1, k_a) for t in (a.offset, a.range))
    return joint_conv2d(x, v, Candidates(beta, r, one, n, z, list(range(k_a)), [0] * k_a), bias, window, choice, True, route)


def _pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    values = (value, value) if isinstance(value, int) else tuple(value)
    least = 0 if name == "padding" else 1
    if len(values) != 2 or any(not isinstance(v, int) or v < least for v in values):
        raise InputError(f"mixed_conv2d: {name} must be one integer or two, each at least {least}, got {value!r}")
    return values[0], values[1]

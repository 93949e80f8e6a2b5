"""mix_quantize in plain PyTorch: the definition, and the fallback on any device.

Everything else in this folder must agree with this file. float64 inputs are computed in float64, all others in float32. Candidates are
handled one after the other, so the peak is a few tensors of the size of x whatever K is, and nothing but x is kept for the backward pass.

A candidate is (offset β, range r, steps n, zero point z), with step d = r / n:

    û = (x − β) · (1/r) + z/n        u = clamp(û, 0, 1)        q = round_half_even(u · n)        Q(x) = β + (q − z) · d

n = 0 is the pruned candidate (Q = 0), n = IDENTITY the full-precision one (Q = x). Straight-through gradients:

    dQ/dx = 1 inside (0 ≤ û ≤ 1), 0 outside; 1 everywhere for a candidate with pass_through
    dQ/dr = (q − z)/n − inside · (u − z/n)
    dQ/dβ = 0 inside, 1 outside

With noise (`seed` given), the code is not rounded: q = clamp(û + (v − 1/2)/n, 0, 1) · n, v ~ U[0, 1) from Philox; `inside` then refers to
the noisy value. This is Q(x) = clamp(x + e, lowest level, highest level) with e ~ U(−d/2, d/2) (UNIQ, arXiv:1804.10969, section 3).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

IDENTITY = -1.0
"""The value of n that marks the full-precision candidate (a finite number, since compilers print constants)."""

_PHILOX_M = (0xD2511F53, 0xCD9E8D57)
_PHILOX_W = (0x9E3779B9, 0xBB67AE85)
_U32 = 0xFFFFFFFF


def _mul_hi_lo(m: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of m · x for 32-bit unsigned values held in int64."""
    low = m * (x & 0xFFFF)
    high = m * (x >> 16)
    mid = (low >> 16) + (high & 0xFFFF)
    return ((high >> 16) + (mid >> 16)) & _U32, ((mid << 16) | (low & 0xFFFF)) & _U32


def philox_uniform(seed: Tensor, index: Tensor) -> Tensor:
    """v in [0, 1) with 24 bits: Philox4x32-10, key = seed, counter = (index low, index high, 0, 0), first output word.

    seed [1] int64, index int64 of any shape; returns float32 of index's shape.
    """
    k0, k1 = seed & _U32, (seed >> 32) & _U32
    c0, c1 = index & _U32, (index >> 32) & _U32
    c2 = c3 = torch.zeros_like(index)
    for _ in range(10):
        hi0, lo0 = _mul_hi_lo(_PHILOX_M[0], c0)
        hi1, lo1 = _mul_hi_lo(_PHILOX_M[1], c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _PHILOX_W[0]) & _U32, (k1 + _PHILOX_W[1]) & _U32
    return (c0 >> 8).to(torch.float32) * 2.0**-24


def _storage_index(x: Tensor) -> Tensor:
    """The position of every element of a dense x in its storage."""
    index = torch.zeros((), dtype=torch.int64, device=x.device)
    for dim, (size, stride) in enumerate(zip(x.shape, x.stride(), strict=True)):
        shape = [1] * x.dim()
        shape[dim] = size
        index = index + (torch.arange(size, device=x.device) * (stride if size > 1 else 0)).view(shape)
    return index


class _Candidates:
    """The K candidates of one call, with parameters shaped to broadcast against x."""

    def __init__(self, x: Tensor, offset: Tensor, range: Tensor, p: Tensor, axis: int, seed: Tensor | None) -> None:
        self.dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.x = x.to(self.dtype)
        shape = [1] * x.dim()
        if p.size(0) > 1:
            shape[axis] = p.size(0)
        self.offset, self.range, self.p = ([column.reshape(shape) for column in t.to(self.dtype).unbind(1)] for t in (offset, range, p))
        self.noise = None if seed is None else philox_uniform(seed, _storage_index(x)).to(self.dtype) - 0.5
        self.reduced = [d for d, size in enumerate(shape) if size == 1]
        self.rows = p.size(0)

    def code(self, k: int, n: float, z: float) -> tuple[Tensor, Tensor, Tensor]:
        """q, u − z/n before the clamp, and the mask `inside` of candidate k."""
        u = (self.x - self.offset[k]) * (1.0 / self.range[k]) + z / n
        if self.noise is None:
            return torch.round(u.clamp(0, 1) * n), u - z / n, (u >= 0) & (u <= 1)
        noisy = u + self.noise / n
        return noisy.clamp(0, 1) * n, u - z / n, (noisy >= 0) & (noisy <= 1)

    def sum(self, value: Tensor) -> Tensor:
        """Sum over everything but the channel axis: [C] or [1]."""
        return value.sum(self.reduced).reshape(self.rows) if self.reduced else value.reshape(self.rows)


def mix_quantize(
    x: Tensor,
    offset: Tensor,
    range: Tensor,
    p: Tensor,
    steps: Sequence[float],
    zero_point: Sequence[float],
    axis: int,
    groups: Sequence[int],
    seed: Tensor | None,
) -> list[Tensor]:
    """V_m = Σ_{k in group m} p_k · Q_k(x) for m = 0 … M−1, each of x's shape, in float32 (float64 for float64).

    offset, range, p  [C, K] or [1, K]; C = x.size(axis)
    groups            K group numbers; M = max + 1
    """
    c = _Candidates(x, offset, range, p, axis, seed)
    out: list[Tensor | None] = [None] * (max(groups) + 1)
    for k, (n, z, m) in enumerate(zip(steps, zero_point, groups, strict=True)):
        if n == 0:
            continue
        if n == IDENTITY:
            term = c.p[k] * c.x
        else:
            q, _, _ = c.code(k, n, z)
            term = c.p[k] * (c.offset[k] + (q - z) * (c.range[k] / n))
        previous = out[m]
        out[m] = term if previous is None else previous + term
    return [torch.zeros_like(c.x).where(~c.x.isnan(), c.x) if v is None else v for v in out]


def mix_quantize_backward(
    grads: Sequence[Tensor],
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `mix_quantize` with respect to x (x's shape), offset, range and p (each [C, K] or [1, K]); dtypes as in the forward.

    grads are the M gradients of the outputs. A NaN in x makes the gradients that it touches NaN.
    """
    c = _Candidates(x, offset, range, p, axis, seed)
    nan = c.x.isnan()
    g_of = [g.to(c.dtype).masked_fill(nan, torch.nan) for g in grads]
    dx = torch.zeros_like(c.x).masked_fill(nan, torch.nan)
    zero = torch.zeros(c.rows, dtype=c.dtype, device=x.device)
    columns: list[tuple[Tensor, Tensor, Tensor]] = []
    for k, (n, z, m) in enumerate(zip(steps, zero_point, groups, strict=True)):
        g = g_of[m]
        if n == 0:
            columns.append((zero, zero, zero))
        elif n == IDENTITY:
            dx = dx + c.p[k] * g
            columns.append((zero, zero, c.sum(g * c.x)))
        else:
            q, v, inside = c.code(k, n, z)
            dx = dx + c.p[k] * (g if pass_through[k] else g * inside)
            d_range = c.p[k] * g * ((q - z) / n - torch.where(inside, v, 0))
            d_offset = c.p[k] * g * ~inside
            d_p = g * (c.offset[k] + (q - z) * (c.range[k] / n))
            columns.append((c.sum(d_offset), c.sum(d_range), c.sum(d_p)))
    d_offset, d_range, d_p = (torch.stack(list(column), dim=1) for column in zip(*columns, strict=True))
    return dx, d_offset, d_range, d_p

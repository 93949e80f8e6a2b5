"""The grids of the candidate bits: steps and zero points, starting ranges, and how much of a signed input's range is negative."""

from __future__ import annotations

import functools

import numpy as np
from scipy.optimize import minimize_scalar

from qprune.kernels import IDENTITY
from qprune.space import FLOAT, PRUNED


def weight_grid(kind: str, bits: int) -> tuple[float, float]:
    """(n, z) of a signed weight quantizer. One bit is the two levels ±r/2 for every kind."""
    if bits in (PRUNED, FLOAT):
        return (0.0, 0.0) if bits == PRUNED else (IDENTITY, 0.0)
    if bits == 1:
        return 1.0, 0.5
    if kind in ("symmetric", "nice"):
        return 2.0 * (2 ** (bits - 1) - 1), 2.0 ** (bits - 1) - 1
    n = 2.0**bits - 1
    return n, 2.0 ** (bits - 1) if kind == "lsq" else n / 2


def input_grid(bits: int) -> tuple[float, float]:
    """(n, z) of an activation quantizer: z = 0, since a signed input is expressed by a negative offset."""
    return {PRUNED: (0.0, 0.0), FLOAT: (IDENTITY, 0.0)}.get(bits, (2.0**bits - 1, 0.0))


@functools.cache
def gaussian_range(n: float, z: float) -> float:
    """The range r that minimises E[(x − Q(x))²] for x ~ N(0, 1) (Max 1960 tabulates the same steps r/n)."""
    x = np.linspace(-6, 6, 6001)
    density = np.exp(-(x**2) / 2)

    def error(step: float) -> float:
        q = np.clip(np.round(x / step + z), 0, n) - z
        return float((density * (x - q * step) ** 2).sum())

    return float(minimize_scalar(error, bounds=(0.5 / (n + 1), 4.0), method="bounded", options={"xatol": 1e-6}).x) * n


def negative_share(bits: int) -> float:
    """The part of a signed activation's range that lies below zero: 2^(b−1) of 2^b − 1 steps (two's complement); half for one bit."""
    if bits in (PRUNED, FLOAT):
        return 0.0
    return 0.5 if bits == 1 else 2.0 ** (bits - 1) / (2.0**bits - 1)

"""How much of the spread of repeated trainings lies between configurations, and how much is the noise of single runs.

Model, for configuration i and run j: y_ij = x_i·β + b_i + e_ij, with independent b_i ~ N(0, σ_b²) and e_ij ~ N(0, σ_w²). With x_i = 1 it is
the one-way random effects model; x_i = (1, cost_i) asks whether configurations of equal cost differ. Intervals of the ratio σ_b²/σ_w² are
exact for any number of runs per configuration (Wald, Ann. Math. Stat. 11, 1940); with equal numbers they are the textbook F interval
(Searle, Casella, McCulloch, Variance Components, 1992, section 3.6).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from qprune.errors import InputError

Array = NDArray[np.float64]
_LARGEST = 1e12  # a ratio of variances beyond this is reported as infinite


@dataclass(frozen=True)
class Mean:
    """A mean over runs with half widths of its Student-t intervals; None for a single run."""

    mean: float
    runs: int
    half_68: float | None
    half_95: float | None


def mean_interval(values: Sequence[float]) -> Mean:
    """Mean and Student-t intervals at 68.27 % (the interval that Zur et al. draw) and 95 %. Raises InputError for no value."""
    if not len(values):
        raise InputError("mean_interval: expected at least one value, got none")
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return Mean(mean, n, None, None)
    error = float(np.std(values, ddof=1)) / math.sqrt(n)
    return Mean(mean, n, *(float(stats.t.ppf((1 + level) / 2, n - 1)) * error for level in (0.6827, 0.95)))


@dataclass(frozen=True)
class Components:
    """Variance components. Variances are in squared units of the values; intervals are two-sided at `level`.

    between           estimate of σ_b² by the mean squares, cut off at 0; `between_raw` is not cut off
    within            estimate of σ_w²
    within_interval   from χ²
    ratio             between / within, with its exact interval
    icc               σ_b² / (σ_b² + σ_w²), the intraclass correlation, with its exact interval
    f, p_value        test of σ_b² = 0
    groups, df, df_w  configurations, degrees of freedom between (configurations − columns of x) and within
    mean_runs         n0, the effective number of runs per configuration
    """

    between: float
    between_raw: float
    within: float
    within_interval: tuple[float, float]
    ratio: float
    ratio_interval: tuple[float, float]
    icc: float
    icc_interval: tuple[float, float]
    f: float
    p_value: float
    groups: int
    df: int
    df_w: int
    mean_runs: float
    level: float


def one_way(values: Sequence[Sequence[float]], covariate: Sequence[float] | None = None, level: float = 0.95) -> Components:
    """One-way random effects. values: the runs of every configuration, any number each.

    covariate  one number per configuration (its cost): its linear effect is taken out first

    Raises InputError where nothing can be estimated: too few configurations, or nowhere more than one run.
    """
    groups = [np.asarray(group, dtype=np.float64) for group in values if len(group)]
    sizes = np.array([len(group) for group in groups], dtype=np.float64)
    df_w = int(sizes.sum()) - len(groups)
    squares = sum(float(((group - group.mean()) ** 2).sum()) for group in groups)
    means = np.array([group.mean() for group in groups])
    if covariate is not None:
        covariate = [c for c, group in zip(covariate, values, strict=True) if len(group)]
    return components(means, sizes, squares, df_w, covariate, level)


def blocked(table: Sequence[Sequence[float]], covariate: Sequence[float] | None = None, level: float = 0.95) -> tuple[Components, float]:
    """Configurations x seeds, every configuration with the same seeds: what a seed does to all configurations alike (their common float
    network) is taken out, and σ_w² is what remains. Returns the components and the estimated variance between seeds, cut off at 0."""
    y = np.asarray(table, dtype=np.float64)
    if y.ndim != 2 or y.shape[1] < 2 or not np.isfinite(y).all():
        raise InputError(f"blocked: expected a full table of configurations x at least 2 seeds, got shape {y.shape}")
    rows, seeds = y.shape
    rest = y - y.mean(1, keepdims=True) - y.mean(0, keepdims=True) + y.mean()
    df_w = (rows - 1) * (seeds - 1)
    squares = float((rest**2).sum())
    seed_square = rows * float(((y.mean(0) - y.mean()) ** 2).sum()) / (seeds - 1)
    result = components(y.mean(1), np.full(rows, float(seeds)), squares, df_w, covariate, level)
    return result, max(0.0, (seed_square - result.within) / rows)


def components(
    means: Array, sizes: Array, squares: float, df_w: int, covariate: Sequence[float] | None = None, level: float = 0.95
) -> Components:
    """From the means [A] of configurations with so many runs [A], and the sum of squares within them with df_w degrees of freedom."""
    x = np.ones((len(means), 1)) if covariate is None or not len(means) else np.stack([np.ones(len(means)), _standardised(covariate)], 1)
    df = len(means) - int(np.linalg.matrix_rank(x)) if len(means) else 0
    if df < 1 or df_w < 1:
        raise InputError(
            f"variance components need at least {x.shape[1] + 1} configurations and one with 2 runs; got {len(means)} configurations with "
            f"{int(sizes.sum())} runs"
        )
    if np.linalg.matrix_rank(x) < x.shape[1]:
        x = x[:, :1]
    within = squares / df_w
    between_square = _weighted_squares(means, x, sizes) / df
    n0 = float(sizes.sum() - np.trace(np.linalg.solve((x.T * sizes) @ x, (x.T * sizes**2) @ x))) / df
    tail = (1 - level) / 2
    within_interval = (squares / float(stats.chi2.ppf(1 - tail, df_w)), squares / float(stats.chi2.ppf(tail, df_w)))
    raw = (between_square - within) / n0
    if within <= 0:
        f = math.inf if between_square > 0 else math.nan
        low, high = (math.inf, math.inf) if between_square > 0 else (0.0, math.inf)
    else:
        f = between_square / within
        bounds = (float(stats.f.ppf(1 - tail, df, df_w)), float(stats.f.ppf(tail, df, df_w)))
        low, high = (_solve(means, x, sizes, df * within * bound) for bound in bounds)
    between = max(0.0, raw)
    ratio = between / within if within > 0 else math.inf if between > 0 else 0.0
    return Components(
        between, raw, within, within_interval, ratio, (low, high), _icc(ratio), (_icc(low), _icc(high)),
        f, float(stats.f.sf(f, df, df_w)), len(means), df, df_w, n0, level,
    )  # fmt: skip


def _standardised(values: Sequence[float]) -> Array:
    x = np.asarray(values, dtype=np.float64)
    return (x - x.mean()) / (x.std() or 1.0)


def _weighted_squares(means: Array, x: Array, weights: Array) -> float:
    """min over β of Σ w_i (m_i − x_i·β)²."""
    root = np.sqrt(weights)
    beta, *_ = np.linalg.lstsq(x * root[:, None], means * root, rcond=None)
    return float((weights * (means - x @ beta) ** 2).sum())


def _solve(means: Array, x: Array, sizes: Array, target: float) -> float:
    """The θ >= 0 at which the squares weighted by n/(1 + nθ) equal the target; they fall with θ."""

    def excess(theta: float) -> float:
        return _weighted_squares(means, x, sizes / (1 + sizes * theta)) - target

    if excess(0.0) <= 0:
        return 0.0
    high = 1.0
    while excess(high) > 0:
        high *= 4
        if high > _LARGEST:
            return math.inf
    return float(optimize.brentq(excess, 0.0, high, xtol=1e-12, rtol=1e-10))


def _icc(ratio: float) -> float:
    return 1.0 if math.isinf(ratio) else ratio / (1 + ratio)


def power(
    ratio: float, groups: int, runs: int, threshold: float = 1.0, columns: int = 1, crossed: bool = False, level: float = 0.95
) -> float:
    """The probability that an experiment of `groups` configurations with `runs` runs each decides, by its interval of σ_b²/σ_w², on which
    side of threshold² that ratio lies, if it truly is `ratio`. In closed form: F / (1 + n·ratio) has the F distribution.

    threshold  of σ_b/σ_w
    columns    columns of x: 1, or 2 with a covariate
    crossed    the runs are the same seeds for all configurations, as in `blocked`
    """
    df, df_w = groups - columns, (groups - crossed) * (runs - 1)
    if df < 1 or df_w < 1:
        return 0.0
    tail = (1 - level) / 2
    scale = (1 + runs * threshold**2) / (1 + runs * ratio)
    above = float(stats.f.sf(scale * float(stats.f.ppf(1 - tail, df, df_w)), df, df_w))
    below = float(stats.f.cdf(scale * float(stats.f.ppf(tail, df, df_w)), df, df_w))
    return above if ratio >= threshold**2 else below


def runs_needed(
    ratio: float, groups: int, threshold: float = 1.0, columns: int = 1, crossed: bool = False, wanted: float = 0.8, most: int = 1000
) -> int | None:
    """The least number of runs per configuration with which `power` reaches `wanted`; None if `most` are too few: then only more
    configurations can decide."""

    def enough(runs: int) -> bool:
        return power(ratio, groups, runs, threshold, columns, crossed) >= wanted

    if not enough(most):
        return None
    low, high = 1, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high

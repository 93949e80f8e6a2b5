"""Variance components and their intervals: closed forms, scipy, and simulations with known components."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from qprune.errors import InputError
from qprune.study.statistics import blocked, mean_interval, one_way, power, runs_needed

Simulate = Callable[[np.random.Generator], list[list[float]]]


def simulated(rng: np.random.Generator, sizes: list[int], between: float, within: float, slope: float = 0.0) -> list[list[float]]:
    """Configuration i of cost i: slope·i + b_i + e_ij, with deviations `between` and `within`."""
    return [list(slope * i + rng.normal(0, between) + rng.normal(0, within, n)) for i, n in enumerate(sizes)]


def test_mean_intervals() -> None:
    found = mean_interval([2.0, 4.0, 6.0])
    assert (found.mean, found.runs) == (4.0, 3)
    # t(0.975, 2) = 4.302653; t(0.84135, 2) = 1.321291
    assert found.half_95 == pytest.approx(4.302653 * 2 / math.sqrt(3), rel=1e-6)
    assert found.half_68 == pytest.approx(1.321291 * 2 / math.sqrt(3), rel=1e-4)
    assert mean_interval([0.3]) == mean_interval([0.3]).__class__(0.3, 1, None, None)
    with pytest.raises(InputError, match="at least one value"):
        mean_interval([])


def test_balanced_closed_form() -> None:
    # Group means 2, 5, 8; each group m − 1, m, m + 1: MSW = 1, MSB = 3·9 = 27.
    c = one_way([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])
    assert (c.within, c.between, c.f) == (pytest.approx(1.0), pytest.approx((27 - 1) / 3), pytest.approx(27.0))
    assert (c.df, c.df_w, c.mean_runs) == (2, 6, pytest.approx(3.0))
    assert c.icc == pytest.approx((26 / 3) / (26 / 3 + 1))
    upper, lower = stats.f.ppf(0.975, 2, 6), stats.f.ppf(0.025, 2, 6)
    assert c.ratio_interval == (pytest.approx((27 / upper - 1) / 3), pytest.approx((27 / lower - 1) / 3))
    assert c.icc_interval[0] == pytest.approx(c.ratio_interval[0] / (1 + c.ratio_interval[0]))
    assert c.within_interval == (pytest.approx(6 / stats.chi2.ppf(0.975, 6)), pytest.approx(6 / stats.chi2.ppf(0.025, 6)))


def test_f_test_is_scipy_s() -> None:
    values = simulated(np.random.default_rng(3), [3, 5, 2, 4], 0.4, 1.0)
    c = one_way(values)
    assert (c.f, c.p_value) == pytest.approx(tuple(stats.f_oneway(*values)))


def test_unbalanced_effective_runs() -> None:
    c = one_way([[1.0, 2.0], [3.0, 3.5, 4.0, 4.5], [0.0, 1.0, 2.0]])
    assert c.mean_runs == pytest.approx((9 - (4 + 16 + 9) / 9) / 2)
    assert c.between_raw == pytest.approx((c.f - 1) * c.within / c.mean_runs)


def test_a_negative_estimate_is_cut_off() -> None:
    c = one_way([[0.0, 2.0], [1.0, 1.0], [0.5, 1.5]])
    assert c.between == 0 == c.ratio and c.between_raw < 0 and c.ratio_interval[0] == 0


def test_adjustment_removes_a_linear_effect_of_cost() -> None:
    values = simulated(np.random.default_rng(5), [3, 4, 2, 5, 3], 0.3, 0.5)
    costs = [10.0, 12.0, 19.0, 30.0, 33.0]
    tilted = [[y + 0.7 * cost for y in group] for group, cost in zip(values, costs)]
    plain, adjusted = one_way(values, costs), one_way(tilted, costs)
    assert adjusted.between_raw == pytest.approx(plain.between_raw, abs=1e-9)
    assert adjusted.ratio_interval == pytest.approx(plain.ratio_interval, abs=1e-7)
    assert (adjusted.df, one_way(tilted).df) == (3, 4)
    assert one_way(tilted).between > 100 * adjusted.between


def test_equal_costs_leave_nothing_to_adjust() -> None:
    values = simulated(np.random.default_rng(6), [3, 3, 3], 0.3, 0.5)
    assert one_way(values, [7.0, 7.0, 7.0]) == one_way(values)


@pytest.mark.parametrize(
    ("sizes", "between", "adjusted"),
    [([4] * 10, 0.0, False), ([4] * 10, 0.8, False), ([2, 3, 6, 1, 4, 5, 2, 3], 0.8, False), ([2, 3, 6, 1, 4, 5, 2, 3], 1.5, True)],
    ids=["none", "balanced", "unbalanced", "cost-adjusted"],
)
def test_the_interval_of_the_ratio_covers_the_truth(sizes: list[int], between: float, adjusted: bool) -> None:
    rng = np.random.default_rng(len(sizes) + adjusted)
    costs = [float(i) for i in range(len(sizes))] if adjusted else None
    below, above, repeats = 0, 0, 1000
    for _ in range(repeats):
        low, high = one_way(simulated(rng, sizes, between, 1.0, slope=0.4 if adjusted else 0.0), costs).ratio_interval
        below += high < between**2
        above += low > between**2
    # Exactly 2.5 % on either side, but for a truth at the edge: no interval lies below 0.
    for count in (below, above) if between else (above,):
        assert stats.binomtest(count, repeats, 0.025).pvalue > 1e-4


def test_the_estimates_are_unbiased() -> None:
    rng = np.random.default_rng(12)
    found = [one_way(simulated(rng, [2, 5, 3, 4, 1, 6], 0.7, 0.5)) for _ in range(500)]
    for values, truth in (([c.between_raw for c in found], 0.49), ([c.within for c in found], 0.25)):
        assert abs(np.mean(values) - truth) < 4 * np.std(values) / math.sqrt(len(values))


def test_seeds_that_shift_all_configurations() -> None:
    rng = np.random.default_rng(13)
    seeds, plain = rng.normal(0, 3.0, 6), np.array(simulated(rng, [6] * 12, 0.5, 0.2))
    c, between_seeds = blocked(plain + seeds)
    undisturbed, _ = blocked(plain)
    assert (c.between, c.within) == (pytest.approx(undisturbed.between), pytest.approx(undisturbed.within))
    assert between_seeds == pytest.approx(float(np.var(seeds + plain.mean(0), ddof=1)) - c.within / 12)
    assert (c.df, c.df_w) == (11, 55)
    assert one_way((plain + seeds).tolist()).within > 50 * c.within


@pytest.mark.parametrize("ratio", [0.2, 0.6, 3.0])
def test_power_is_the_share_of_experiments_that_decide(ratio: float) -> None:
    rng = np.random.default_rng(14)
    groups, runs, repeats, right = 12, 4, 300, 0
    for _ in range(repeats):
        low, high = one_way(simulated(rng, [runs] * groups, math.sqrt(ratio), 1.0)).ratio_interval
        right += high < 1 if ratio < 1 else low > 1
    expected = power(ratio, groups, runs)
    assert abs(right / repeats - expected) < 4 * math.sqrt(expected * (1 - expected) / repeats) + 1e-9


def test_the_least_number_of_runs() -> None:
    needed = runs_needed(0.3, 40)
    assert needed is not None
    assert power(0.3, 40, needed) >= 0.8 > power(0.3, 40, needed - 1)
    assert runs_needed(0.3, 40, columns=2) in (needed, needed + 1)
    crossed = runs_needed(0.3, 40, crossed=True)
    assert crossed is not None and power(0.3, 40, crossed, crossed=True) >= 0.8 > power(0.3, 40, crossed - 1, crossed=True)
    assert runs_needed(0.95, 10) is None
    assert runs_needed(0.3, 1) is None


@pytest.mark.parametrize("values", [[], [[1.0, 2.0]], [[1.0], [2.0], [3.0]]], ids=["nothing", "one-configuration", "one-run-each"])
def test_too_little_to_estimate(values: list[list[float]]) -> None:
    with pytest.raises(InputError, match="variance components need at least 2 configurations"):
        one_way(values)


def test_runs_without_any_spread() -> None:
    c = one_way([[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]])
    assert (c.between, c.within, c.ratio) == (0, 0, 0) and math.isnan(c.f)
    c = one_way([[1.0, 1.0], [2.0, 2.0], [4.0, 4.0]])
    assert math.isinf(c.ratio) and c.icc == 1 and c.ratio_interval == (math.inf, math.inf)

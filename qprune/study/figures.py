"""The figures of a study, drawn from what its result.json says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from qprune.drawing import SERIES, THEME, WIDTH, at_most_100, nothing, styled
from qprune.result import si

Row = Mapping[str, Any]
_HETEROGENEOUS, _HOMOGENEOUS = SERIES["searched"], SERIES["uniform"]


@styled
def accuracy_cost(result: Mapping[str, Any]) -> Figure:
    """Mean test accuracy against cost with 68.27 % Student-t intervals; the homogeneous networks as a dashed line with a band."""
    rows = [row for row in result["points"] if row["runs"]]
    if not rows:
        return nothing("no trial is finished yet")
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    axis = figure.subplots()
    mixed = [row for row in rows if not row["homogeneous"]]
    line = sorted((row for row in rows if row["homogeneous"]), key=lambda row: float(row["cost"]))
    if mixed:
        bars: dict[str, Any] = {"fmt": "o", "markersize": 3.2, "elinewidth": 0.7, "alpha": 0.75, "color": _HETEROGENEOUS}
        axis.errorbar(
            [row["cost"] for row in mixed], [_mean(row) for row in mixed], [_half(row) for row in mixed], **bars, label="heterogeneous"
        )
    if line:
        costs, means, halves = [row["cost"] for row in line], [_mean(row) for row in line], [_half(row) for row in line]
        look: dict[str, Any] = {"color": _HOMOGENEOUS, "linestyle": (0, (5, 3)), "marker": "D", "markersize": 5, "linewidth": 1.4}
        axis.plot(costs, means, **look, label="homogeneous", zorder=3)
        low, high = ([m + sign * h for m, h in zip(means, halves)] for sign in (-1, 1))
        axis.fill_between(costs, low, high, color=_HOMOGENEOUS, alpha=0.15, linewidth=0)
    axis.set(xlabel=f"{result['measure']} per sample", ylabel="test accuracy (%)")
    at_most_100(axis)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: si(value, digits=4)))
    axis.grid(True, axis="y", linewidth=0.6)
    axis.set_axisbelow(True)
    figure.legend(loc="outside upper left", ncols=2)
    return figure


@styled
def differences(result: Mapping[str, Any]) -> Figure:
    """Every heterogeneous network's test accuracy minus the homogeneous line at its cost, sorted, with 95 % intervals."""
    rows = sorted((row for row in result["points"] if row.get("matched")), key=lambda row: float(row["matched"]["difference"]))
    if not rows:
        return nothing("no heterogeneous network lies between homogeneous ones yet")
    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    axis = figure.subplots()
    means = [100 * row["matched"]["difference"] for row in rows]
    halves = [100 * (row["matched"]["half_95"] or 0.0) for row in rows]
    axis.errorbar(range(len(rows)), means, halves, fmt="o", markersize=3, elinewidth=0.7, color=_HETEROGENEOUS)
    axis.axhline(0, color=_HOMOGENEOUS, linestyle=(0, (5, 3)), linewidth=1.4)
    axis.annotate("homogeneous", (0, 0), (2, 3), textcoords="offset points", color=THEME["muted"])
    axis.set(xlabel="heterogeneous networks, sorted", ylabel="difference of test accuracy (points)")
    axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axis.grid(True, axis="y", linewidth=0.6)
    axis.set_axisbelow(True)
    return figure


def _mean(row: Row) -> float:
    return 100 * float(row["test_accuracy"]["mean"])


def _half(row: Row) -> float:
    return 100 * float(row["test_accuracy"]["half_68"] or 0.0)

"""The figure of a comparison, drawn from what its result.json says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from qprune.compare.summary import REFERENCE
from qprune.drawing import SERIES, WIDTH, at_most_100, nothing, styled

_ROW = 0.27  # inches per method
_MANY = 3  # panels side by side


@styled
def accuracies(result: Mapping[str, Any]) -> Figure:
    """One panel per budget, one line per method: mean test accuracy with its 95 % interval. The uniform baseline is a dashed line, the
    float network a dotted one."""
    rows = result["rows"]
    budgets = [budget for budget in result["options"]["budgets"] if any(row["budget"] == budget for row in rows)]
    methods = [method for method in result["options"]["methods"] if any(row["method"] == method for row in rows)]
    if not budgets:
        return nothing("no cell is finished yet")
    across = min(len(budgets), _MANY)
    down = -(-len(budgets) // across)
    figure = Figure(figsize=(WIDTH, down * (0.9 + _ROW * len(methods))), layout="constrained")
    panels = figure.subplots(down, across, sharey=True, squeeze=False)
    for axis, budget in zip(panels.flat, budgets):
        _panel(axis, [row for row in rows if row["budget"] == budget], methods, result["float"])
        axis.set_title(budget)
    for axis in panels.flat[len(budgets) :]:
        axis.set_axis_off()
    panels.flat[0].set_yticks(range(len(methods)), methods)
    panels.flat[0].set_ylim(len(methods) - 0.5, -0.5)
    figure.supxlabel("test accuracy (%)", fontsize=8)
    return figure


def _panel(axis: Any, rows: list[Mapping[str, Any]], methods: list[str], floats: Mapping[str, Any] | None) -> None:
    for row in rows:
        accuracy = row["test_accuracy"]
        color = SERIES["uniform" if row["baseline"] else "searched"]
        half = 100 * (accuracy["half_95"] or 0.0)
        look: dict[str, Any] = {"fmt": "D" if row["baseline"] else "o", "markersize": 4.5, "elinewidth": 1.4, "color": color}
        axis.errorbar([100 * accuracy["mean"]], [methods.index(row["method"])], xerr=[half], **look, zorder=3)
        if row["method"] == REFERENCE:
            axis.axvline(100 * accuracy["mean"], color=color, linestyle=(0, (5, 3)), linewidth=1.1)
    if floats is not None:
        axis.axvline(100 * floats["test_accuracy"]["mean"], color=SERIES["float"], linestyle=(0, (1, 2)), linewidth=1.3)
    at_most_100(axis, "x")
    axis.grid(True, axis="x", linewidth=0.6)
    axis.set_axisbelow(True)

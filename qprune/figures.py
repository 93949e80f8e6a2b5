"""The figures of a run, drawn from what `result.json` says; qprune/report.py puts them on a page.

Every function takes the result (a mapping) and returns a matplotlib Figure of its own: pyplot and the user's matplotlib settings are
neither used nor changed. What the result does not hold is not drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, MultipleLocator, NullLocator

from qprune.drawing import SERIES, THEME, WIDTH, at_most_100, nothing, styled
from qprune.result import FLOAT, NETWORKS, PRUNED, Result, budget_label, get, layers_of, number, runs_of, si, summary

_MARKERS = {"float": "s", "searched": "o", "uniform": "D"}
_BITS = LinearSegmentedColormap.from_list("bits", ["#f6f3c2", "#a6dab5", "#4fb3bf", "#2f7fb8", "#3c4fa3", "#43307f"])
_TOP_BITS = 8
_FLOAT_FILL = "#b4bcc6"


def bits_color(bits: float) -> Any:
    return _FLOAT_FILL if bits >= FLOAT else _BITS(min(bits, _TOP_BITS) / _TOP_BITS)


def _short(name: str, limit: int = 24) -> str:
    return name if len(name) <= limit else name[: limit // 2 - 1] + "…" + name[-limit // 2 :]


def _name_columns(axis: Any, names: Sequence[str]) -> None:
    count, longest = len(names), max(map(len, names))
    upright = count * longest > 110
    steep = count > 20
    axis.set_xticks(range(count), [_short(name) for name in names])
    for label in axis.get_xticklabels():
        label.set(fontsize=max(4.5, min(8.0, 440 / count)), rotation_mode="anchor")
        if upright:
            label.set(rotation=90 if steep else 40, ha="right", va="center" if steep else "top")
    axis.tick_params(axis="x", length=0)
    axis.set_xlim(-0.6, count - 0.4)


def _scatter(axis: Any, result: Result, networks: Sequence[str]) -> list[float]:
    """Draw every seed and the mean of these networks; returns the costs that were drawn."""
    runs, costs = runs_of(result), []
    for network in networks:
        pairs = [(number(run, "networks", network, "bops"), number(run, "networks", network, "accuracy")) for run in runs]
        points = [(cost, 100 * accuracy) for cost, accuracy in pairs if cost and cost > 0 and accuracy is not None]
        look: dict[str, Any] = {"color": SERIES[network], "marker": _MARKERS[network], "linestyle": "none"}
        if len(points) > 1:
            axis.plot(*zip(*points), **look, alpha=0.5, markersize=4, markeredgewidth=0)
        costs += [cost for cost, _ in points]
        mean, cost, half = (summary(result, network, key) for key in ("accuracy_mean", "bops", "accuracy_ci95"))
        if mean is None or not cost or cost < 0:
            continue
        costs.append(cost)
        name = get(runs[0], "networks", network, "label") if runs else None
        text = f"{100 * mean:.1f} %" if half is None else f"{100 * mean:.1f} ± {100 * half:.1f} %"
        look |= {"label": f"{name if isinstance(name, str) else network}: {text}, {si(cost, 'BOPs')}", "markeredgecolor": THEME["card"]}
        axis.errorbar(
            [cost], [100 * mean], None if half is None else [100 * half], **look, markersize=7, capsize=3, elinewidth=1.2, zorder=3
        )
    return costs


@styled
def accuracy_cost(result: Result) -> Figure:
    """Test accuracy against bit operations: every seed faint, the mean with its 95 % interval, the budget; with a close-up."""
    figure = Figure(figsize=(WIDTH, 3.3), layout="constrained")
    wide, close = figure.subplots(1, 2, width_ratios=(3, 2))
    costs, near = _scatter(wide, result, NETWORKS), _scatter(close, result, NETWORKS[1:])
    if not costs:
        return nothing("no accuracy was recorded")
    limit = number(result, "budget", "limits", "bops")
    if limit and limit > 0:
        costs, near = [*costs, limit], [*near, limit]
        for axis in (wide, close):
            axis.axvline(limit, color=THEME["muted"], linestyle=(0, (4, 3)), linewidth=1, zorder=1)
        right = math.log(limit / min(costs)) <= 0.6 * math.log(max(costs) / min(costs))
        place: dict[str, Any] = {"ha": "left" if right else "right", "va": "top", "color": THEME["muted"]}
        text = f"{budget_label(result)}\n{si(limit, 'BOPs')}"
        wide.annotate(text, (limit, 1), (8 if right else -8, -2), xycoords=("data", "axes fraction"), textcoords="offset points", **place)
    low, high = min(costs) / 1.8, max(costs) * 1.8
    wide.set(xscale="log", xlim=(low, high), title="all networks", ylabel="test accuracy (%)", xlabel="BOPs per sample, log scale")
    wide.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 200 else (1,)))
    wide.xaxis.set_minor_locator(NullLocator())
    if near:
        pad = max(0.25 * (max(near) - min(near)), 0.02 * max(near))
        close.set(xlim=(min(near) - pad, max(near) + pad), title="close to the budget", xlabel="BOPs per sample")
    close.xaxis.set_major_locator(MaxNLocator(4))
    close.set_visible(bool(near))
    for axis in (wide, close):
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: si(value, digits=6)))
        axis.margins(y=0.2)
        at_most_100(axis)
        axis.grid(True, axis="y", linewidth=0.6)
        axis.set_axisbelow(True)
    bars, labels = wide.get_legend_handles_labels()
    figure.legend([bar[0] for bar in bars], labels, loc="outside upper left", ncols=3, handletextpad=0.2, columnspacing=1.6)
    return figure


@styled
def bits_by_layer(result: Result) -> Figure:
    """Weight bits (mean over filters), activation bits and share of the multiplications of every layer, in network order (first run)."""
    layers = layers_of(result)
    if not layers or all(layer["w"] is None and layer["a"] is None for layer in layers):
        return nothing("no policy was recorded")
    macs = [number(layer["info"], "macs") for layer in layers]
    total = sum(value for value in macs if value is not None)
    figure = Figure(figsize=(WIDTH, 4.1), layout="constrained")
    axes = figure.subplots(3, 1, sharex=True, height_ratios=(4, 4, 1.6))
    size = 7 if len(layers) <= 24 else max(3.6, 260 / len(layers))
    means = [None if layer["w"] is None else sum(layer["w"]) / len(layer["w"]) for layer in layers]
    low = [bits for bits in [*means, *(layer["a"] for layer in layers)] if bits is not None and bits < FLOAT]
    top = max([4.0, *low]) * 1.22
    for axis, title, bits in ((axes[0], "weight bits", means), (axes[1], "activation bits", [layer["a"] for layer in layers])):
        heights = [0 if value is None else min(value, top / 1.22) for value in bits]
        bars = axis.bar(range(len(layers)), heights, 0.8, color=[bits_color(value or 0) for value in bits])
        for bar, value in zip(bars, bits):
            text = "–" if value is None else f"{value:.0f}" if value == int(value) else f"{value:.1f}"
            text = "float" if text == str(FLOAT) and len(layers) <= 24 else text
            where = (bar.get_x() + bar.get_width() / 2, bar.get_height())
            axis.annotate(text, where, (0, 1.5), textcoords="offset points", ha="center", va="bottom", fontsize=size)
        axis.set(title=title, ylim=(0, top))
        axis.yaxis.set_major_locator(MultipleLocator(2))
        axis.grid(True, axis="y", linewidth=0.6)
        axis.set_axisbelow(True)
    shares = [100 * value / total if value is not None and total else 0 for value in macs]
    axes[2].bar(range(len(layers)), shares, 0.8, color=THEME["muted"])
    axes[2].set(title="share of the float network's multiplications (%)")
    axes[2].yaxis.set_major_locator(MaxNLocator(2))
    _name_columns(axes[2], [layer["name"] for layer in layers])
    for axis in axes:
        axis.tick_params(axis="x", length=0)
    return figure


@styled
def bits_by_filter(result: Result) -> Figure:
    """One column per layer, one cell per filter coloured by its bits and sorted by them; pruned filters are hatched (first run)."""
    layers = layers_of(result)
    if not layers or all(layer["w"] is None for layer in layers):
        return nothing("no policy was recorded")
    count = len(layers)
    figure = Figure(figsize=(WIDTH, 3.7), layout="constrained")
    axis = figure.subplots()
    base = np.zeros(count)
    choices = sorted({bits for layer in layers for bits in layer["w"] or []}, key=lambda bits: (bits == PRUNED, -bits))
    handles = []
    for bits in choices:
        share = np.array([(layer["w"] or []).count(bits) / max(1, len(layer["w"] or [])) for layer in layers])
        fill = THEME["empty"] if bits == PRUNED else bits_color(bits)
        look: dict[str, Any] = {"facecolor": fill, "edgecolor": THEME["muted"] if bits == PRUNED else fill, "linewidth": 0}
        look |= {"hatch": "/////"} if bits == PRUNED else {}
        axis.bar(range(count), share, 0.86, base, **look)
        base += share
        handles.append(Patch(**look, label="pruned (0)" if bits == PRUNED else "float" if bits >= FLOAT else str(bits)))
    # Lines between cells of less than three points would hide the cells.
    cells = [(x, len(layer["w"] or [])) for x, layer in enumerate(layers)]
    lines = [[(x - 0.43, k / n), (x + 0.43, k / n)] for x, n in cells if n <= 64 for k in range(1, n)]
    widths = [min(0.6, 8 / n) for _, n in cells if n <= 64 for _ in range(1, n)]
    axis.add_collection(LineCollection(lines, colors=THEME["card"], linewidths=widths))
    for x, layer in enumerate(layers):
        bits = layer["w"] or []
        kept = len(bits) - bits.count(PRUNED)
        text = "–" if not bits else str(kept) if kept == len(bits) else f"{kept}/{len(bits)}"
        turn = {"rotation": 90, "rotation_mode": "anchor", "ha": "left", "va": "center"} if count > 14 else {"ha": "center", "va": "bottom"}
        axis.annotate(
            text, (x, 1), (0, 3), textcoords="offset points", fontsize=max(4.5, min(7, 400 / count)), color=THEME["muted"], **turn
        )
    axis.set(ylim=(0, 1), yticks=(0, 0.5, 1), yticklabels=("0", "50", "100"), ylabel="filters of the layer (%)")
    axis.spines[["left", "bottom"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    _name_columns(axis, [layer["name"] for layer in layers])
    title = "bits of every filter (one choice per layer)" if not any(layer["per_filter"] for layer in layers) else "bits of every filter"
    figure.legend(handles=handles[::-1], loc="outside upper left", ncols=len(handles), title=title, alignment="left", columnspacing=1.4)
    return figure


def _history(run: Any) -> list[Any]:
    history = get(run, "search_history")
    return [row for row in history if number(row, "epoch") is not None] if isinstance(history, (list, tuple)) else []


def _curve(run: Any, key: str) -> tuple[list[Any], list[Any]]:
    known = [row for row in _history(run) if number(row, key) is not None]
    return [number(row, "epoch") for row in known], [number(row, key) for row in known]


@styled
def evolution(result: Result) -> Figure:
    """How the search went: expected cost over budget and gate entropy (every run), expected bits of every layer (first run)."""
    runs = runs_of(result)
    rows = _history(runs[0]) if runs else []
    if not rows:
        return nothing("no search was recorded")
    expected = [get(row, "expected") for row in rows]
    known = {name: None for layers in expected if isinstance(layers, Mapping) for name in layers}
    listed = [layer["name"] for layer in layers_of(result) if layer["name"] in known]
    names = [*listed, *(name for name in known if name not in listed)]
    tall = max(1.3, min(7.0, 0.12 * len(names)))
    figure = Figure(figsize=(WIDTH, 2.0 + (tall + 0.5 if names else 0)), layout="constrained")
    grid = figure.add_gridspec(2 if names else 1, 2, height_ratios=(1.6, tall) if names else None)
    for column, (key, title) in enumerate((("cost_ratio", "expected cost / budget"), ("entropy", "gate entropy (0 = decided)"))):
        axis = figure.add_subplot(grid[0, column])
        for position, run in reversed(list(enumerate(runs))):
            first = position == 0
            shape: dict[str, Any] = {
                "color": SERIES["searched"],
                "linewidth": 1.8 if first else 0.9,
                "alpha": 1 if first else 0.3,
                "marker": "o",
            }
            axis.plot(*_curve(run, key), **shape, markersize=2.5 if len(rows) <= 40 else 0, zorder=3 if first else 2)
        if key == "cost_ratio":
            axis.axhline(1, color=THEME["muted"], linestyle=(0, (4, 3)), linewidth=1)
            place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "top"}
            axis.annotate("budget", (0, 1), (3, -3), **place, color=THEME["muted"])
        axis.set(title=title)
        axis.set_ylim(bottom=0, top=None if key == "cost_ratio" else max([1.0, *axis.get_ylim()]))
        axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axis.grid(True, axis="y", linewidth=0.6)
        axis.set_xlabel("epoch of the search")
    if not names:
        return figure
    epochs = [int(number(row, "epoch") or 0) for row in rows]
    left = None
    for column, (key, title) in enumerate((("w_bits", "expected weight bits"), ("a_bits", "expected activation bits"))):
        axis = left = figure.add_subplot(grid[1, column], sharey=left)
        table = [[number(row, "expected", name, key) for row in rows] for name in names]
        bits = np.array([[math.nan if value is None else value for value in line] for line in table])
        image = axis.imshow(bits, cmap=_BITS, vmin=0, vmax=_TOP_BITS, aspect="auto")
        axis.set(title=title, xlabel="epoch of the search")
        step = math.ceil(len(epochs) / 8)
        axis.set_xticks(range(step - 1, len(epochs), step), [str(epoch) for epoch in epochs[step - 1 :: step]])
        axis.set_yticks(range(len(names)), [_short(name) for name in names], fontsize=max(4.5, min(8.0, 72 * tall / len(names) * 0.85)))
        axis.tick_params(axis="y", length=0, labelleft=column == 0)
        axis.spines[["left", "bottom"]].set_visible(False)
    bar = figure.colorbar(image, ax=figure.axes[-2:], aspect=30, pad=0.01, fraction=0.04, ticks=range(0, _TOP_BITS + 1, 2), label="bits")
    bar.outline.set_visible(False)
    return figure


@styled
def progress(result: Result) -> Figure:
    """Accuracy and loss of every phase so far; result["metrics"] holds the rows of metrics.jsonl."""
    metrics = [row for row in get(result, "metrics") or [] if number(row, "epoch") is not None]
    phases = list(dict.fromkeys(str(get(row, "phase")) for row in metrics))
    if not phases:
        return nothing("no epoch has ended yet")
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    axes = figure.subplots(2, len(phases), squeeze=False, sharey="row")
    for column, phase in enumerate(phases):
        rows = [row for row in metrics if get(row, "phase") == phase]
        for line, (key, scale, label) in enumerate((("accuracy", 100, "accuracy (%)"), ("loss", 1, "loss"))):
            axis = axes[line, column]
            for seed in dict.fromkeys(str(get(row, "seed")) for row in rows):
                pairs = [(number(row, "epoch"), number(row, key)) for row in rows if str(get(row, "seed")) == seed]
                points = [(epoch, scale * value) for epoch, value in pairs if epoch is not None and value is not None]
                color = SERIES.get("searched" if phase in ("search", "finetune") else phase, THEME["muted"])
                axis.plot([x for x, _ in points], [y for _, y in points], color=color, linewidth=1.2, marker="o", markersize=2, alpha=0.7)
            axis.set(title=phase if line == 0 else "", ylabel=label if column == 0 else "", xlabel="epoch" if line else "")
            axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axis.grid(True, axis="y", linewidth=0.6)
    at_most_100(axes[0, 0])
    return figure


def plot(result: Result) -> dict[str, Figure]:
    """The four figures of a finished run by name: accuracy_cost, bits_by_layer, bits_by_filter, evolution."""
    return {draw.__name__: draw(result) for draw in (accuracy_cost, bits_by_layer, bits_by_filter, evolution)}

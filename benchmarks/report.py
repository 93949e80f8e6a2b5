"""Files of results → tables for a README and a bar chart.

python -m benchmarks.report benchmarks/results/NVIDIA-H200.json --chart docs/speed.svg
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qprune.errors import QPruneError

from . import against, shapes
from .correctness import sentence
from .machine import headline
from .roofline import as_python, gpu_from
from .table import markdown_table, number
from .targets import TARGETS

Content = Mapping[str, Any]
CHARTED = ("float", "cudnn", "eager", "branches", "compile", "qprune")
COLOURS = {"float": "#9aa5b1", "cudnn": "#9aa5b1", "eager": "#e0b15a", "branches": "#c97b63", "compile": "#7a9cc6", "qprune": "#2f7d5b"}


def _is_h200(content: Content) -> bool:
    return "H200" in str(content["machine"].get("device", ""))


def targets(content: Content | None) -> str:
    """The targets with what the model predicts and what was measured; without measurements on a GPU the last columns say so."""
    measured = content is not None and bool(content["machine"].get("cuda"))
    gpu = gpu_from(content["machine"].get("rates") if content is not None and measured else None)
    lines = []
    for target in TARGETS:
        value = target.measured(content["rows"]) if content is not None and measured else None
        lines.append([target.what, target.goal, target.show(target.predicted(gpu)), target.show(value), target.met(value)])
    return markdown_table(("target", "bound", "predicted", "measured", ""), lines, left=("target", "bound", ""))


def steps(rows: Sequence[Mapping[str, Any]]) -> str:
    """Training steps: time and memory, and both against the plain eager step."""
    found = [row for row in rows if row.get("kernel") == "imagenet_step"]
    plain = next((row for row in found if (row["form"], row["implementation"]) == ("float", "eager") and "ms" in row), None)
    lines = []
    for row in found:
        if "ms" not in row:
            lines.append([row["form"], row["implementation"], row["skipped"], "", "", ""])
            continue
        peak = row.get("peak_bytes")
        ratio = f"{row['ms'] / plain['ms']:.2f}" if plain else ""
        memory = f"{peak / plain['peak_bytes']:.2f}" if plain and peak and plain.get("peak_bytes") else ""
        lines.append([row["form"], row["implementation"], f"{row['ms']:.1f}", ratio, "" if peak is None else f"{peak / 2**30:.2f}", memory])
    return markdown_table(
        ("form", "implementation", "ms", "against plain", "peak, GiB", "against plain"), lines, ("form", "implementation")
    )


def operations(rows: Sequence[Mapping[str, Any]], kernel: str) -> str:
    """The cases of one operation: time, shares of the machine's rates, and how many times as fast as each baseline."""
    found = [row for row in rows if row.get("kernel") == kernel and row.get("values")]
    names = [name for name in CHARTED if any(name in row["ratios"] for row in found)]
    lines = []
    for row in found:
        shares = [f"{row[key]:.0%}" if row.get(key) else "" for key in ("of_copy", "of_matmul")]
        faster = [f"{1 / row['ratios'][name]:.2f}" if row["ratios"].get(name) else "" for name in names]
        lines.append([row["case"], f"{number(row['value'])} {row['unit']}", *shares, *faster])
    columns = ("case", "qprune", "of copy", "of matmul", *(f"faster than {name}" for name in names))
    return markdown_table(columns, lines, left=("case",))


def report(content: Content) -> str:
    """Everything as Markdown."""
    described = content["machine"]
    parts = [f"{headline(dict(described))}\n\n    {content['command']}"]
    rates = described.get("rates")
    if rates:
        parts[0] += f"\n\nCopy {rates['copy'] / 1e9:.0f} GB/s, matrix product {number(rates['matmul'] / 1e12)} TFLOP/s."
    if notes := [f"- {name}: {text['ended']}" for name, text in content.get("parts", {}).items() if text["ended"] != "done"]:
        parts.append("Not complete:\n\n" + "\n".join(notes))
    note = "" if _is_h200(content) else " The bounds are for an H200; this is another machine." if described.get("cuda") else ""
    parts += [f"Tests on the GPU: {sentence(row)}." for row in content["rows"] if row.get("kernel") == "correctness"]
    parts.append(f"### Targets\n\n{targets(content)}\n\nPredictions come from the model in `roofline.py`.{note}")
    rows = content["rows"]
    if any(row.get("kernel") == "imagenet_step" for row in rows):
        parts.append(f"### Training step\n\n{steps(rows)}")
    for kernel in dict.fromkeys(row.get("kernel", "") for row in rows if row.get("values")):
        if kernel and kernel != "imagenet_step":
            parts.append(f"### {kernel}\n\n{operations(rows, kernel)}")
    return "\n\n".join(parts) + "\n"


def routes(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[int, int, int, int], str]:
    """(taps, input channels, output channels, quantizers) → the faster route, where both were measured: forward and backward, channels per
    group. Of shapes that differ in size the largest counts."""
    found: dict[tuple[int, int, int, int], tuple[int, str]] = {}
    for row in rows:
        times = {name: row["values"].get(f"qprune-{name}") for name in ("library", "fused")} if row.get("kernel") == "mixed_conv2d" else {}
        if row.get("direction") != "both" or not all(times.values()) or not times:
            continue
        shape = shapes.convolution(row["shape"])
        key = (shape.taps, shape.channels // shape.groups, shape.filters // shape.groups, row["quantizers"])
        if shape.rows > found.get(key, (0, ""))[0]:
            found[key] = (shape.rows, min(times, key=lambda name: times[name]))
    return {key: found[key][1] for key in sorted(found)}


def _bars(content: Content) -> tuple[str, list[tuple[str, dict[str, float]]]]:
    """Unit, and groups of bars: the steps where there are any, else the operations."""
    found = [row for row in content["rows"] if row.get("kernel") == "imagenet_step" and "ms" in row]
    if found:
        groups: dict[str, dict[str, float]] = {}
        for row in found:
            name = "qprune" if row["implementation"] in ("qprune", "graph", "search") else row["implementation"]
            group = groups.setdefault(row["form"], {})
            group[name] = min(row["ms"], group.get(name, row["ms"]))
        return "milliseconds a step", list(groups.items())
    cases = []
    for row in content["rows"]:
        if row.get("unit") == "ms" and row.get("ratios"):
            relative = {name: 1 / ratio for name, ratio in row["ratios"].items() if name in CHARTED and ratio}
            cases.append((row["case"], {**relative, "qprune": 1.0}))
    return "time, qprune = 1", cases


def chart(content: Content, path: Path) -> None:
    """Horizontal bars, shorter is better, one group for each form of step or each case."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib.figure import Figure

    unit, groups = _bars(content)
    labels = [(group, name, value) for group, values in groups for name in CHARTED if (value := values.get(name)) is not None]
    figure = Figure(figsize=(8, 0.8 + 0.24 * (len(labels) + len(groups))))
    axes = figure.add_subplot()
    y, ticks, names, seen = 0.0, [], [], set()
    for i, (group, name, value) in enumerate(labels):
        y += 0.0 if i == 0 else 1.0 if labels[i - 1][0] == group else 1.8
        axes.barh(y, value, color=COLOURS[name], label=None if name in seen else name)
        axes.annotate(f" {number(value)}", (value, y), va="center", fontsize=7)
        seen.add(name)
        ticks.append(y)
        names.append(f"{group} · {name}")
    axes.set_yticks(ticks, names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(f"{unit} (shorter is better)", fontsize=8)
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(str(content["machine"]["device"]), fontsize=9, loc="left")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description="Tables and a chart from a file of results.")
    parser.add_argument("results", type=Path, nargs="?", help="without it: the targets with their predictions")
    parser.add_argument("--chart", type=Path, help="also draw this .svg or .png")
    parser.add_argument("--out", type=Path, help="write the Markdown here instead of printing it")
    parser.add_argument("--routes", action="store_true", help="print which route of the joint convolution was faster, as Python, instead")
    options = parser.parse_args(arguments)
    try:
        content = None if options.results is None else against.load(options.results, "results")
    except QPruneError as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    if content is None and options.chart:
        parser.error("--chart needs a file of results")
    if content is not None and options.routes:
        print(as_python(routes(content["rows"])))
        return 0
    text = targets(None) + "\n" if content is None else report(content)
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    else:
        print(text, end="")
    if options.chart and content is not None:
        chart(content, options.chart)
    return 0


if __name__ == "__main__":
    sys.exit(main())

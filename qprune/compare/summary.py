"""What the cells of a comparison say: one row per budget and method, with differences to the uniform baseline paired by seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

import numpy as np
from scipy import stats

from qprune.compare.options import BASELINES
from qprune.study.analysis import holm
from qprune.study.statistics import mean_interval

REFERENCE = "uniform"
Cell = Mapping[str, Any]
_MEANS = ("bops", "macs", "size_bits", "w_bits", "a_bits")
_SIZES = ("values", "index", "codebooks")
_WITHIN = 1 + 1e-9


def is_baseline(method: str) -> bool:
    return method in BASELINES or method.startswith("uniform-")


def float_row(floats: Sequence[Cell]) -> dict[str, Any] | None:
    """The float networks of all seeds."""
    return {"method": "float", "label": "float", **_common(floats)} if floats else None


def rows_of(
    cells: Sequence[Cell], floats: Sequence[Cell], order: Sequence[tuple[str, str]], limits: Mapping[str, Mapping[str, float]]
) -> list[dict[str, Any]]:
    """One row per (budget, method) of `order` that has a cell, budgets in their order:

    test_accuracy, val_accuracy  mean and 95 % Student-t half width over seeds
    difference    of test accuracy to the baseline "uniform" of the same budget and seeds: mean, half width, p of the paired t test, and p
                  after Holm's correction for all rows; None for the baseline itself and without common seeds
    of_budget     cost over the budget, in the measure in which that is most
    size          bits: values, with index, with index and codebooks
    epochs        median over seeds of the time after the float network's training, in epochs of that
    memory        the highest peak over seeds and phases, `memory_used` the highest rise within a phase, in bytes
    """
    found: dict[tuple[str, str], dict[int, Cell]] = {}
    for cell in cells:
        found.setdefault((cell["budget"], cell["method"]), {})[cell["seed"]] = cell
    epoch = {cell["seed"]: _time(cell["usage"]["float"]) / cell["float_epochs"] for cell in floats if cell["float_epochs"]}
    rows = []
    for budget, method in order:
        runs = found.get((budget, method))
        if runs:
            row = {"budget": budget, "method": method, "baseline": is_baseline(method), **_common(list(runs.values()))}
            measures = limits[budget].items()
            row["of_budget"] = max(row[name] / limit for name, limit in measures)
            row["within"] = all(run[name] <= limit * _WITHIN for run in runs.values() for name, limit in measures)
            spent = [sum(map(_time, run["usage"].values())) / epoch[seed] for seed, run in runs.items() if epoch.get(seed)]
            row["epochs"] = median(spent) if spent else None
            row["difference"] = None if method == REFERENCE else _difference(runs, found.get((budget, REFERENCE), {}))
            rows.append(row)
    compared = [row["difference"] for row in rows if row["difference"] is not None]
    for difference, p in zip(compared, holm([difference["p"] for difference in compared])):
        difference["p_holm"] = p
    return rows


def _common(runs: Sequence[Cell]) -> dict[str, Any]:
    labels = list(dict.fromkeys(run["label"] for run in runs))
    usages = [usage for run in runs for usage in run["usage"].values()]
    parts = np.cumsum([[run["size"][part] for part in _SIZES] for run in runs], axis=1).mean(axis=0)
    return {
        "label": labels[0] if len(labels) == 1 else "",
        "seeds": sorted(run["seed"] for run in runs),
        **{name: asdict(mean_interval([run[name] for run in runs])) for name in ("test_accuracy", "val_accuracy")},
        **{name: float(np.mean([run[name] for run in runs])) for name in _MEANS},
        "size": dict(zip(_SIZES, map(float, parts))),
        "memory": max((usage["memory"] for usage in usages), default=None),
        "memory_used": max((usage["memory"] - usage["before"] for usage in usages if usage["measure"] != "process"), default=None),
        "measures": sorted({usage["measure"] for usage in usages}),
    }


def _time(usage: Mapping[str, Any]) -> float:
    """Processor time: other processes on the machine do not count. On a GPU it says nothing, there it is time."""
    return float(usage["seconds"] if usage["measure"] == "cuda" else usage["cpu_seconds"])


def _difference(runs: Mapping[int, Cell], reference: Mapping[int, Cell]) -> dict[str, Any] | None:
    differences = [runs[seed]["test_accuracy"] - reference[seed]["test_accuracy"] for seed in sorted(runs) if seed in reference]
    if not differences:
        return None
    interval = mean_interval(differences)
    spread = len(differences) > 1 and float(np.std(differences)) > 1e-12
    p = float(stats.ttest_1samp(differences, 0.0).pvalue) if spread else None
    return {"mean": interval.mean, "half_95": interval.half_95, "runs": interval.runs, "p": p, "p_holm": None}


def sentence(rows: Sequence[Mapping[str, Any]], budget: str) -> str:
    """What the rows of a budget show, in plain words."""
    here = [row for row in rows if row["budget"] == budget]
    reference = next((row for row in here if row["method"] == REFERENCE), None)
    searched = [row for row in here if not row["baseline"] and row["difference"] is not None]
    if reference is None or not searched:
        return f"At {budget} there is nothing to compare yet."
    judged: dict[str, list[str]] = {"better": [], "worse": []}
    for row in searched:
        difference = row["difference"]
        if difference["p_holm"] is not None and difference["p_holm"] < 0.05:
            judged["better" if difference["mean"] > 0 else "worse"].append(f"{row['method']} ({points(difference)} points)")
    against = f"At {budget}, against the uniform network" + (f" ({reference['label']})" if reference["label"] else "")
    if not any(row["difference"]["runs"] > 1 for row in searched):
        best = max(searched, key=lambda row: float(row["difference"]["mean"]))
        change = f"{100 * best['difference']['mean']:+.2f} points"
        return f"{against}: the best search is {best['method']} with {change}; one seed says nothing about significance."
    parts = [f"significantly {word}: {', '.join(names)}" for word, names in judged.items() if names]
    others = len(searched) - sum(map(len, judged.values()))
    tail = f"no significant difference for {others} of {len(searched)} methods" if others else ""
    return f"{against}: {'; '.join(filter(None, (*parts, tail)))} (paired by seed, 5 %, Holm)."


def points(difference: Mapping[str, Any]) -> str:
    """A difference of accuracies in points."""
    half = "" if difference["half_95"] is None else f" ± {100 * difference['half_95']:.2f}"
    return f"{100 * difference['mean']:+.2f}{half}"

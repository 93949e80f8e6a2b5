"""Several seeds of a run, compared with uniform networks of equal or higher cost: means, confidence intervals, and a plain verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from scipy import stats

KINDS = ("float", "searched", "uniform")
AVERAGED = ("bops", "macs", "size_bits", "index_bits", "codebook_bits", "w_bits", "a_bits")


def student_interval(values: Sequence[float], level: float = 0.95) -> float | None:
    """Half the width of the Student-t confidence interval of the mean; None for fewer than two values."""
    n = len(values)
    if n < 2:
        return None
    mean = sum(values) / n
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    return float(stats.t.ppf((1 + level) / 2, n - 1)) * deviation / math.sqrt(n)


def summarise(runs: Sequence[dict[str, Any]], measure: str = "bops") -> dict[str, Any]:
    """Means and 95 % intervals over seeds of the three networks, the search's time in float epochs, and the verdict in one sentence.

    measure  what the budget limits: "bops", "macs" or "size_bits"
    """
    summary: dict[str, Any] = {}
    for kind in KINDS:
        networks = [run["networks"][kind] for run in runs]
        accuracies = [network["accuracy"] for network in networks]
        summary[kind] = {
            "label": networks[0]["label"],
            "accuracy_mean": sum(accuracies) / len(accuracies),
            "accuracy_ci95": student_interval(accuracies),
            **{key: sum(network[key] for network in networks) / len(networks) for key in AVERAGED},
        }
    ratios = [run["seconds"]["search"] / run["seconds"]["float_epoch"] for run in runs if run["seconds"]["float_epoch"]]
    summary["search_in_float_epochs"] = sorted(ratios)[len(ratios) // 2] if ratios else None
    differences = [run["networks"]["searched"]["accuracy"] - run["networks"]["uniform"]["accuracy"] for run in runs]
    summary["difference_mean"] = sum(differences) / len(differences)
    summary["difference_ci95"] = student_interval(differences)
    summary["verdict"] = verdict(summary, len(runs), measure)
    return summary


def verdict(summary: dict[str, Any], seeds: int, measure: str = "bops") -> str:
    """What the comparison shows, in one plain sentence."""
    mean, interval = summary["difference_mean"], summary["difference_ci95"]
    cheaper = 1 - summary["searched"][measure] / summary["uniform"][measure]
    what = {"bops": "bit operations", "macs": "multiplications", "size_bits": "bits of weights"}[measure]
    cost = f"at the same {what}" if abs(cheaper) <= 5e-4 else f"at {abs(cheaper):.1%} {'fewer' if cheaper > 0 else 'more'} {what}"
    over = "on one seed" if seeds == 1 else f"on average over {seeds} seeds"
    name = summary["uniform"]["label"]
    if mean < 0:
        text = f"The searched network is worse than {name} by {-100 * mean:.2f} points of test accuracy {over}, {cost}"
    elif mean == 0:
        text = f"The searched network equals {name} in test accuracy {over}, {cost}"
    else:
        text = f"The searched network is better than {name} by {100 * mean:.2f} points of test accuracy {over}, {cost}"
    if interval is None:
        return text + "; one seed says nothing about significance."
    if abs(mean) <= interval:
        return text + f"; with a 95 % interval of ±{100 * interval:.2f} points, the difference is not significant."
    return text + f" (95 % interval ±{100 * interval:.2f} points)."

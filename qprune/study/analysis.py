"""What the finished trials of a study say: means, variance components, the comparison at matched cost, and one sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from qprune.errors import InputError
from qprune.study.grid import Point
from qprune.study.queue import Finished
from qprune.study.statistics import Components, blocked, mean_interval, one_way, runs_needed

METRICS = ("val_accuracy", "test_accuracy", "test_loss")
POWER = 0.8
_MOST_SEEDS = 1000
_WIDE = 2  # ratio of costs from which accuracy is taken to follow their logarithm
_PREFERRED = ("blocked_cost", "blocked", "one_way_cost", "one_way")


@dataclass(frozen=True)
class Decision:
    """answer    "yes" where the interval of σ_b/σ_w lies above the threshold, "no" where it lies below, else "undecided"
    seeds     how many per configuration would decide with 80 % power if the estimated ratio were the true one; None where 1000 would not
    analysis  the one of `variances` that was used, "" for none
    text      the answer in a sentence
    """

    answer: str
    seeds: int | None
    analysis: str
    text: str


def analyse(points: Sequence[Point], finished: Sequence[Finished], threshold: float, measure: str) -> dict[str, Any]:
    """The plain content of result.json: "points", "variance", "matched" and "sentence". Non-finite numbers are None."""
    runs: list[dict[int, Mapping[str, Any]]] = [{} for _ in points]
    for trial in finished:
        runs[trial.point[0]][trial.point[1]] = trial.result
    rows = [_row(index, point, runs[index]) for index, point in enumerate(points)]
    matched = compare_at_cost(rows)
    variance = variances([row for row in rows if not row["homogeneous"] and row["runs"]])
    decision = decide(variance, threshold)
    return _plain(
        {
            "points": rows,
            "variance": {name: asdict(c) if isinstance(c, Components) else c for name, c in variance.items()},
            "matched": matched,
            "decision": asdict(decision),
            "sentence": f"{decision.text} {matched_text(matched, measure)}".strip(),
        }
    )


def _row(index: int, point: Point, runs: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {"index": index, **asdict(point), "runs": [{"seed": s, **runs[s]} for s in sorted(runs)]}
    for metric in METRICS:
        row[metric] = asdict(mean_interval([float(run[metric]) for run in runs.values()])) if runs else None
    return row


def variances(rows: Sequence[Mapping[str, Any]]) -> dict[str, Components | float]:
    """Components of the test accuracy of these configurations, as far as there are enough runs:

    one_way, one_way_cost   configurations against repeated runs; with "_cost", configurations of equal cost: a linear effect of cost is
                            taken out first, or of its logarithm where costs span more than a factor of 2
    blocked, blocked_cost   the same without what a seed does to all configurations alike; only where every configuration has every seed
    seeds                   variance between seeds that `blocked` takes out
    """
    values = [[float(run["test_accuracy"]) for run in row["runs"]] for row in rows]
    costs = [float(row["cost"]) for row in rows]
    if costs and max(costs) > _WIDE * min(costs):
        costs = [math.log(cost) for cost in costs]
    complete = len({tuple(run["seed"] for run in row["runs"]) for row in rows}) == 1
    found: dict[str, Components | float] = {}
    for suffix, covariate in (("", None), ("_cost", costs)):
        try:
            found[f"one_way{suffix}"] = one_way(values, covariate)
            if complete:
                found[f"blocked{suffix}"], found["seeds"] = blocked(values, covariate)
        except InputError:
            continue
    return found


def decide(variance: Mapping[str, Components | float], threshold: float) -> Decision:
    """Whether heterogeneous configurations of equal cost differ by more than repeated trainings of one configuration do.

    All configurations share the float network of a seed, so their runs are not independent between configurations: the blocked analysis
    is used where every configuration has every seed, else the one-way analysis, which then understates the differences.
    """
    name = next((name for name in _PREFERRED if name in variance), "")
    chosen = variance.get(name)
    if not isinstance(chosen, Components):
        text = "Too few runs to tell configurations from noise: at least two heterogeneous ones and two seeds are needed."
        return Decision("undecided", None, "", text)
    adjusted, crossed = name.endswith("_cost"), name.startswith("blocked")
    ratio, (low, high) = math.sqrt(chosen.ratio), (math.sqrt(bound) for bound in chosen.ratio_interval)
    answer = "yes" if low > threshold else "no" if high < threshold else "undecided"
    needed = runs_needed(chosen.ratio, chosen.groups, threshold, 2 if adjusted else 1, crossed, POWER, _MOST_SEEDS)
    which = "heterogeneous networks of equal cost" if adjusted else "heterogeneous networks"
    than = "seed noise" if threshold == 1 else f"{threshold:g} times seed noise"
    text = (
        f"Is the difference between {which} larger than {than}? {answer.capitalize()}: their test accuracy varies by "
        f"{_points(chosen.between)} points between configurations and by {_points(chosen.within)} between seeds (standard deviations), "
        f"a ratio of {ratio:.2f} with a 95 % interval of {low:.2f} to {high:.2f}; "
        f"that configurations differ at all has p = {chosen.p_value:.2g}."
    )
    if answer == "undecided":
        text += (
            f" About {needed} seeds per configuration would decide."
            if needed
            else f" With {chosen.groups} configurations no number of seeds would decide: more configurations are needed."
        )
    return Decision(answer, needed, name, text)


def _points(variance: float) -> str:
    return f"{100 * math.sqrt(variance):.2f}"


def compare_at_cost(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Each heterogeneous configuration against the homogeneous line at its cost: linear interpolation between the neighbouring homogeneous
    networks, seed by seed, so that what a seed does to all networks cancels. Adds "matched" to those rows: mean difference of the test
    accuracy, half width of its 95 % Student-t interval, two-sided p, and p after Holm's correction for the number of configurations.

    The comparisons share the homogeneous runs, so they are not independent; Holm's correction holds nevertheless. `best` is the
    configuration with the best mean validation accuracy: the one that a search would return.
    """
    line = sorted((row for row in rows if row["homogeneous"] and row["runs"]), key=lambda row: float(row["cost"]))
    compared = []
    for row in rows:
        differences = [] if row["homogeneous"] else _differences(row, line)
        row["matched"] = None
        if differences:
            interval = mean_interval(differences)
            row["matched"] = {"difference": interval.mean, "half_95": interval.half_95, "runs": interval.runs, "p": _p_value(differences)}
            compared.append(row)
    for row, p in zip(compared, holm([row["matched"]["p"] for row in compared])):
        row["matched"]["p_holm"] = p
    significant = [row["matched"] for row in compared if row["matched"]["p_holm"] is not None and row["matched"]["p_holm"] < 0.05]
    best = max(compared, key=lambda row: float(row["val_accuracy"]["mean"]), default=None)
    return {
        "compared": len(compared),
        "above": sum(row["matched"]["difference"] > 0 for row in compared),
        "better": sum(m["difference"] > 0 for m in significant),
        "worse": sum(m["difference"] < 0 for m in significant),
        "mean_difference": float(np.mean([row["matched"]["difference"] for row in compared])) if compared else None,
        "best": None if best is None else {"label": best["label"], **best["matched"]},
    }


def _differences(row: Mapping[str, Any], line: Sequence[Mapping[str, Any]]) -> list[float]:
    """Test accuracy minus the line's, for every seed that all three networks have."""
    left = [other for other in line if other["cost"] <= row["cost"]]
    right = [other for other in line if other["cost"] >= row["cost"]]
    if not left or not right:
        return []
    low, high = left[-1], right[0]
    span = float(high["cost"]) - float(low["cost"])
    share = (float(row["cost"]) - float(low["cost"])) / span if span else 0.0
    own, below, above = ({run["seed"]: float(run["test_accuracy"]) for run in item["runs"]} for item in (row, low, high))
    common = [seed for seed in own if seed in below and seed in above]
    return [own[seed] - (1 - share) * below[seed] - share * above[seed] for seed in common]


def _p_value(differences: Sequence[float]) -> float | None:
    """Two-sided, of Student's t test; None for one run or for differences without spread."""
    if len(differences) < 2 or np.std(differences) < 1e-12:
        return None
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction (Scandinavian J. of Statistics 6, 1979); unknown values stay unknown and do not count."""
    known = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        corrected[i] = largest
    return corrected


def matched_text(matched: Mapping[str, Any], measure: str) -> str:
    """The comparison at matched cost in a sentence or two."""
    count, best = matched["compared"], matched["best"]
    if not count:
        return ""
    text = f"Against the homogeneous line at the same {measure}, {matched['above']} of {count} heterogeneous networks are higher"
    text += f"; {matched['better']} significantly, and {matched['worse']} significantly lower (5 %, Holm)."
    half = "" if best["half_95"] is None else f" ± {100 * best['half_95']:.2f}"
    return text + f" The one that is best in validation, {best['label']}, differs by {100 * best['difference']:+.2f}{half} points."


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

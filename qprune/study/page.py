"""report.html of a study: one page, readable with no network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from qprune.page import CSS, PAGE, duration, figure_section, html_table, html_tile, percent
from qprune.result import si

_ANALYSES = {
    "one_way": "Configurations against repeated runs",
    "one_way_cost": "The same at equal cost",
    "blocked": "Configurations, common effect of seeds taken out",
    "blocked_cost": "The same at equal cost",
}


def study_page(result: Mapping[str, Any]) -> str:
    """The page as HTML, from the content of result.json; the same content gives the same bytes."""
    from qprune.study import figures

    options, trials = result["options"], result["trials"]
    what = f"{options['layer']} of {options['model']}" if options["kind"] == "bits" else f"widths of {options['model']}"
    title = escape(f"Grid study: {what} on {options['data']}")
    facts = f"{len(result['points'])} configurations · {options['seeds']} seeds · {trials['done']} of {trials['total']} trials finished"
    missing = trials["total"] - trials["done"]
    note = f'<p class="note">This study is unfinished: {missing} trials are missing. The numbers below are of those that are there.</p>'
    body = (
        f'<p class="verdict">{escape(result["sentence"])}</p>',
        note if missing else "",
        _tiles(result),
        figure_section("Accuracy against cost", figures.accuracy_cost(result), "f1", _COST_CAPTION),
        figure_section("At matched cost", figures.differences(result), "f2", _MATCHED_CAPTION),
        _variance(result),
        _homogeneous(result),
        _heterogeneous(result),
        _failures(result),
        _settings(result),
    )
    return PAGE.format(title=title, css=CSS, line=f"<p>{escape(facts)}</p>", body="\n".join(filter(None, body)))


_COST_CAPTION = "Means over seeds; bars and band: 68.27 % Student-t intervals of the mean."
_MATCHED_CAPTION = (
    "Each heterogeneous network minus the homogeneous line, interpolated at its cost, seed by seed; bars: 95 % Student-t intervals, not "
    "corrected for their number."
)


def _tiles(result: Mapping[str, Any]) -> str:
    variance = result["variance"]
    chosen = variance.get(result["decision"]["analysis"])
    matched = result["matched"]
    tiles = []
    if chosen:
        low, high = (_root(bound) for bound in chosen["ratio_interval"])
        tiles += [
            ("Between configurations", _deviation(chosen["between"]), "points", "standard deviation of test accuracy, at equal cost"),
            ("Between seeds", _deviation(chosen["within"]), "points", "standard deviation of repeated trainings"),
            ("Ratio", _root(chosen["ratio"]), "", f"95 % interval {low} to {high}; p = {chosen['p_value'] or 0:.2g} for none at all"),
        ]
    if matched["compared"]:
        counts = f"{matched['better']} significantly higher, {matched['worse']} lower"
        tiles.append(("Above the homogeneous line", f"{matched['above']}", f"of {matched['compared']}", counts))
    return '<div class="tiles">' + "".join(html_tile(*tile) for tile in tiles) + "</div>" if tiles else ""


def _root(value: float | None) -> str:
    return "∞" if value is None else f"{math.sqrt(value):.2f}"


def _deviation(variance: float) -> str:
    return f"{100 * math.sqrt(variance):.2f}"


def _variance(result: Mapping[str, Any]) -> str:
    rows = []
    for name, label in _ANALYSES.items():
        c = result["variance"].get(name)
        if c:
            low, high = (_root(bound) for bound in c["ratio_interval"])
            icc = "–" if c["icc"] is None else f"{c['icc']:.2f}"
            p = "–" if c["p_value"] is None else f"{c['p_value']:.2g}"
            cells = [
                _deviation(c["between"]),
                _deviation(c["within"]),
                _root(c["ratio"]),
                f"{low} to {high}",
                icc,
                p,
                f"{c['df']}, {c['df_w']}",
            ]
            rows.append(("main" if name == result["decision"]["analysis"] else "", [label, *cells]))
    if not rows:
        return ""
    head = ("Heterogeneous networks", "σ between", "σ within", "Ratio", "95 % interval", "ICC", "p", "df")
    seeds = result["variance"].get("seeds")
    caption = (
        "Random effects; σ in points of test accuracy; intervals of the ratio are exact (Wald 1940). “At equal cost”: a linear effect of "
        "cost is taken out, or of its logarithm where costs span more than a factor of 2. Bold: the one that the answer rests on."
    )
    caption += "" if seeds is None else f" Common to all configurations of a seed (its float network): σ = {_deviation(seeds)}."
    return f'<section><h2>Variance components</h2>{html_table(head, rows)}<p class="caption">{caption}</p></section>'


def _homogeneous(result: Mapping[str, Any]) -> str:
    rows = [row for row in result["points"] if row["homogeneous"]]
    rows.sort(key=lambda row: float(row["cost"]))
    table = html_table(("Homogeneous", result["measure"], "Test accuracy", "Validation", "Runs"), [("", _cells(row)) for row in rows])
    caption = "± 95 % Student-t interval of the mean over seeds."
    return f'<section><h2>Homogeneous networks</h2>{table}<p class="caption">{caption}</p></section>'


def _heterogeneous(result: Mapping[str, Any]) -> str:
    rows = [row for row in result["points"] if not row["homogeneous"]]
    rows.sort(key=lambda row: -row["test_accuracy"]["mean"] if row["test_accuracy"] else math.inf)
    cells = [("", [*_cells(row), *_matched_cells(row["matched"])]) for row in rows]
    head = ("Configuration", result["measure"], "Test accuracy", "Validation", "Runs", "Against the line", "p", "p (Holm)")
    return (
        f"<section><h2>Heterogeneous networks</h2><details><summary>All {len(rows)}</summary>{html_table(head, cells)}</details></section>"
    )


def _cells(row: Mapping[str, Any]) -> list[str]:
    test, val = row["test_accuracy"], row["val_accuracy"]
    shown = [percent(m["mean"], m["half_95"]) if m else "–" for m in (test, val)]
    return [escape(row["label"]), si(row["cost"], digits=4), *shown, str(len(row["runs"]))]


def _matched_cells(matched: Mapping[str, Any] | None) -> list[str]:
    if not matched:
        return ["–"] * 3
    half = "" if matched["half_95"] is None else f" ± {100 * matched['half_95']:.2f}"
    return [f"{100 * matched['difference']:+.2f}{half}", *("–" if p is None else f"{p:.2g}" for p in (matched["p"], matched["p_holm"]))]


def _failures(result: Mapping[str, Any]) -> str:
    if not result["errors"]:
        return ""
    rows = [("", [escape(error["label"]), str(error["seed"]), escape(error["error"])]) for error in result["errors"]]
    return f"<section><h2>Failed trials</h2>{html_table(('Configuration', 'Seed', 'Error'), rows, numeric=False)}</section>"


def _settings(result: Mapping[str, Any]) -> str:
    seconds = {"one trial (mean)": duration(result["trials"]["seconds_mean"]), "all trials": duration(result["trials"]["seconds_total"])}
    parts = []
    for title, table in (("Options", result["options"]), ("Time", seconds), ("Environment", result["environment"])):
        rows: Sequence[tuple[str, list[str]]] = [("", [escape(str(key)), escape(str(value))]) for key, value in table.items()]
        parts.append(f"<section><h2>{title}</h2>{html_table(('Name', 'Value'), rows, numeric=False)}</section>")
    return f'<div class="pair">{parts[0]}<div>{parts[1]}{parts[2]}</div></div>'

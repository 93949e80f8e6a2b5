"""report.html of a comparison: one page, readable with no network."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from qprune.compare.tables import EXPLAINED, HEAD, cells_of
from qprune.page import CSS, PAGE, duration, figure_section, html_table
from qprune.usage import MEASURES

_CAPTION = (
    "Means over seeds with 95 % Student-t intervals. Circles: search methods; diamonds: baselines. Dashed: the uniform network within the "
    "budget; dotted: float."
)
_ACCURACY = ("Method", "Budget", "Network", "Test accuracy", "Against uniform", "p (Holm)", "Seeds")
_COST = ("Method", "Budget", "BOPs", "Of budget", "Weights", "+ index", "+ codebooks", "Time", "Peak memory")


def compare_page(result: Mapping[str, Any]) -> str:
    """The page as HTML, from the content of result.json; the same content gives the same bytes."""
    from qprune.compare import figures

    options, cells = result["options"], result["cells"]
    title = escape(f"Comparison: {options['model']} on {options['data']}")
    facts = f"{options['seeds']} seeds · budgets {', '.join(options['budgets'])} · {cells['done']} of {cells['total']} cells finished"
    missing = cells["total"] - cells["done"]
    note = f'<p class="note">{missing} of {cells["total"]} cells are missing. The numbers below are of those that are there.</p>'
    verdicts = "".join(f'<p class="verdict">{escape(text)}</p>' for text in result["sentences"])
    body = (
        verdicts,
        note if missing else "",
        figure_section("Accuracy", figures.accuracies(result), "f1", _CAPTION),
        _tables(result),
        _failures(result),
        _settings(result),
    )
    return PAGE.format(title=title, css=CSS, line=f"<p>{escape(facts)}</p>", body="\n".join(filter(None, body)))


def _tables(result: Mapping[str, Any]) -> str:
    """The table in two, which fit a page: accuracies, and costs."""
    rows = ([result["float"]] if result["float"] else []) + result["rows"]
    parts = []
    for columns in (_ACCURACY, _COST):
        shown = []
        for row in rows:
            cells = dict(zip(HEAD, map(escape, cells_of(row))))
            shown.append(("main" if row.get("baseline") is False else "", [cells[name] for name in columns]))
        parts.append(html_table(columns, shown))
    over = [f"{row['method']} at {row['budget']}" for row in result["rows"] if not row["within"]]
    caption = f"{EXPLAINED} {memory_text(result)}"
    caption += f" Above the budget: {', '.join(over)}." if over else ""
    return f'<section><h2>Tables</h2>{parts[0]}<p></p>{parts[1]}<p class="caption">{escape(caption)}</p></section>'


def memory_text(result: Mapping[str, Any]) -> str:
    """What the column of memory measures."""
    measures = sorted({measure for row in result["rows"] for measure in row["measures"]})
    text = "; ".join(MEASURES[measure] for measure in measures)
    return f"Peak memory: {text}; in brackets the highest rise above what was in use when a phase began." if measures else ""


def _failures(result: Mapping[str, Any]) -> str:
    if not result["errors"]:
        return ""
    rows = [("", [escape(str(error[name])) for name in ("method", "budget", "seed", "error")]) for error in result["errors"]]
    return f"<section><h2>Failed cells</h2>{html_table(('Method', 'Budget', 'Seed', 'Error'), rows, numeric=False)}</section>"


def _settings(result: Mapping[str, Any]) -> str:
    seconds = {"all cells": duration(result["cells"]["seconds_total"])}
    limits = {budget: ", ".join(f"{name} ≤ {limit:.6g}" for name, limit in given.items()) for budget, given in result["limits"].items()}
    parts = []
    tables = (("Options", result["options"]), ("Budgets", limits), ("Time", seconds), ("Environment", result["environment"]))
    for title, table in tables:
        rows = [("", [escape(str(key)), escape(str(value))]) for key, value in table.items()]
        parts.append(f"<section><h2>{title}</h2>{html_table(('Name', 'Value'), rows, numeric=False)}</section>")
    return f'<div class="pair">{parts[0]}<div>{"".join(parts[1:])}</div></div>'

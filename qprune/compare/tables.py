"""The table of a comparison: as text for the console, and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qprune.compare.summary import points
from qprune.page import percent
from qprune.result import si

HEAD = (
    "Budget", "Method", "Network", "Test accuracy", "Against uniform", "p (Holm)", "BOPs", "Of budget", "Weights", "+ index",
    "+ codebooks", "Time", "Peak memory", "Seeds",
)  # fmt: skip
EXPLAINED = (
    "Accuracy and difference: mean and 95 % Student-t interval over seeds; differences in points, paired by seed. Of budget: the highest "
    "ratio of cost to limit. Sizes: of the weights; with masks and widths; with codebooks or ranges of quantizers too. Time: of search, "
    "pruning and training after the float network's, in epochs of that (median)."
)
_CELL_COLUMNS = (
    "budget", "method", "seed", "label", "test_accuracy", "val_accuracy", "bops", "macs", "size_bits", "w_bits", "a_bits",
    "float_network", "host", "pid",
)  # fmt: skip


def cells_of(row: Mapping[str, Any]) -> list[str]:
    """A row as text, in the order of HEAD."""
    accuracy, difference = row["test_accuracy"], row.get("difference")
    p = None if difference is None else difference["p_holm"]
    sizes = [si(row["size"][part] / 8, "B") for part in ("values", "index", "codebooks")]
    used = "" if row["memory_used"] is None else f" (+ {si(row['memory_used'], 'B')})"
    share = row.get("of_budget")
    return [
        row.get("budget", ""),
        row["method"],
        row["label"] if row["label"] != row["method"] else f"w{row['w_bits']:.2f} a{row['a_bits']:.2f}" if "budget" in row else "",
        percent(accuracy["mean"], accuracy["half_95"]),
        "–" if difference is None else points(difference),
        "–" if p is None else f"{p:.2g}",
        si(row["bops"]),
        "–" if share is None else f"{share:.1%}",
        *sizes,
        "–" if row.get("epochs") is None else f"{row['epochs']:.1f}",
        "–" if row["memory"] is None else f"{si(row['memory'], 'B')}{used}",
        str(len(row["seeds"])),
    ]


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table in Markdown, columns aligned."""
    table = [list(HEAD), *(cells_of(row) for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(HEAD))]
    text = [i < 3 for i in range(len(HEAD))]

    def line(cells: Iterable[str]) -> str:
        padded = (cell.ljust(width) if left else cell.rjust(width) for cell, width, left in zip(cells, widths, text))
        return f"| {' | '.join(padded)} |"

    rule = "|".join("-" * (width + 2) if left else "-" * (width + 1) + ":" for width, left in zip(widths, text))
    return "\n".join([line(table[0]), f"|{rule}|", *map(line, table[1:])]) + "\n"


def table_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line per row; accuracies as shares, sizes in bits, memory in bytes."""
    columns = (
        "budget", "method", "label", "seeds", "test_accuracy", "test_half_95", "val_accuracy", "difference", "difference_half_95", "p",
        "p_holm", "bops", "macs", "of_budget", "size_values", "size_index", "size_codebooks", "float_epochs", "memory", "memory_used",
        "w_bits", "a_bits",
    )  # fmt: skip

    def values(row: Mapping[str, Any]) -> Iterable[Any]:
        difference = row.get("difference") or {}
        yield from (row.get("budget", ""), row["method"], row["label"], len(row["seeds"]))
        yield from (row["test_accuracy"]["mean"], row["test_accuracy"]["half_95"], row["val_accuracy"]["mean"])
        yield from (difference.get(name) for name in ("mean", "half_95", "p", "p_holm"))
        yield from (row["bops"], row["macs"], row.get("of_budget"), *row["size"].values(), row.get("epochs"), row["memory"])
        yield from (row["memory_used"], row["w_bits"], row["a_bits"])

    return _csv(columns, map(values, rows))


def cells_csv(cells: Sequence[Mapping[str, Any]]) -> str:
    """One line per cell; size in bits, seconds and peak memory in bytes over its phases."""
    sizes = ("values", "index", "codebooks")

    def values(cell: Mapping[str, Any]) -> Iterable[Any]:
        usages = cell["usage"].values()
        yield from (cell[name] for name in _CELL_COLUMNS)
        yield from (cell["size"][part] for part in sizes)
        yield f"{sum(usage['seconds'] for usage in usages):.3f}"
        yield f"{sum(usage['cpu_seconds'] for usage in usages):.3f}"
        yield max((usage["memory"] for usage in usages), default=None)

    return _csv((*_CELL_COLUMNS, *(f"bits_{part}" for part in sizes), "seconds", "cpu_seconds", "memory"), map(values, cells))


def _csv(columns: Sequence[str], rows: Iterable[Iterable[Any]]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return file.getvalue()

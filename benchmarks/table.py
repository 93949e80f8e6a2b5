"""The rows as a table for the terminal or for a README, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from .machine import headline
from .rows import Row

BASELINES = ("float", "eager", "branches", "compile")
COLUMNS = ("case", "qprune", *BASELINES, "target", "met")
NOTE = (
    "Columns after qprune: its value divided by the baseline's, below 1 is better. float: the plain network; eager: quantizers and their "
    "mixture in PyTorch operations, one convolution (joint: one per input quantizer); branches: one convolution per pair of candidates; "
    "compile: the faster of torch.compile on the eager code and on the reference with its explicit backward."
)


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value < 1 else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def _target(row: Row) -> str:
    return ", ".join(f"{'' if name == 'value' else name + ' '}≤ {_number(bound)}" for name, bound in row.target.items())


def cells(row: Row) -> list[str]:
    """A row in the order of COLUMNS."""
    ratios = [_number(row.ratios[name]) if name in row.ratios else "" for name in BASELINES]
    met = {None: "", True: "yes", False: "no"}[row.met]
    return [row.case, f"{_number(row.value)} {row.unit}", *ratios, _target(row), met]


def rich_table(rows: Sequence[Row], machine: dict[str, Any]) -> Table:
    table = Table(title=headline(machine), caption=NOTE, title_justify="left", caption_justify="left")
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in ("case", "target", "met") else "right")
    for row in rows:
        table.add_row(*cells(row))
    return table


def markdown(rows: Sequence[Row], machine: dict[str, Any]) -> str:
    rule = ["---" if name in ("case", "target", "met") else "--:" for name in COLUMNS]
    lines = [f"| {' | '.join(line)} |" for line in (COLUMNS, rule, *map(cells, rows))]
    return "\n".join([headline(machine), "", *lines, "", NOTE])


def write_json(path: Path, rows: Sequence[Row], machine: dict[str, Any], command: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"command": command, "machine": machine, "rows": [row.as_dict() for row in rows]}
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

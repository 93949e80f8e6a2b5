"""The rows as a table for the terminal or for a README, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from qprune.files import write_atomically

from .machine import headline
from .rows import Row

BASELINES = ("float", "eager", "branches", "layers", "compile", "cudnn", "reference")
COLUMNS = ("case", "qprune", "20 to 80 %", "GB/s", "of copy", "TFLOP/s", "of matmul", "memory", *BASELINES, "target", "met")
MEASURED = ("20 to 80 %", "GB/s", "of copy", "TFLOP/s", "of matmul", "memory")
PAIRS = (("qprune", "20 to 80 %"), ("GB/s", "of copy"), ("TFLOP/s", "of matmul"), ("memory",))
LEFT = ("case", "target", "met")
NOTE = (
    "Baselines: qprune's value divided by theirs, below 1 is better. float: the plain network; eager: quantizers and their mixture in "
    "PyTorch operations, one convolution (joint: one per input quantizer); branches: one convolution per pair of candidates; layers: "
    "qprune layer by layer; compile: torch.compile of the eager code or, for mix_quantize, the faster of that and of the reference with "
    "its explicit backward compiled; cudnn: the plain convolution without quantizers. GB/s: logical bytes. {memory}"
)
MEMORY = {
    "cpu": "memory: what autograd keeps for the backward pass, without parameters.",
    "cuda": "memory: the peak that a call adds to what is allocated.",
}


def number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value < 1 else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def _size(size: int) -> str:
    return f"{number(size / 2**20)} MiB" if size >= 2**17 else f"{number(size / 2**10)} KiB"


def _target(row: Row) -> str:
    return ", ".join(
        f"{'' if name == 'value' else name + ' '}≤ {number(bound)}" for name, bound in row.target.items() if name in ("value", *row.ratios)
    )


def _share(rate: float, rates: Mapping[str, Any] | None, of: str) -> str:
    return f"{rate / rates[of]:.0%}" if rate and rates and rates.get(of) else ""


def cells(row: Row, rates: Mapping[str, Any] | None = None) -> dict[str, str]:
    """A row by column."""
    if row.skipped:
        return {"case": row.case, "qprune": f"{'failed' if row.failed else 'skipped'}: {row.skipped}"}
    moved, done = row.rate(row.bytes), row.rate(row.flops)
    variant = row.variant.get("qprune", "").partition("-")[2]
    memory = row.memory.get(row.variant.get("qprune", "qprune"))
    found = {
        "case": row.case,
        "qprune": f"{number(row.value)} {row.unit}" + (f" ({variant})" if variant else ""),
        "20 to 80 %": f"{number(row.band[0])} to {number(row.band[1])}" if row.band else "",
        "GB/s": number(moved / 1e9) if moved else "",
        "of copy": _share(moved, rates, "copy"),
        "TFLOP/s": number(done / 1e12) if done else "",
        "of matmul": _share(done, rates, "matmul"),
        "memory": "" if memory is None else _size(memory),
        "target": _target(row),
        "met": {None: "", True: "yes", False: "no"}[row.met],
    }
    return {**found, **{name: number(row.ratios[name]) for name in BASELINES if name in row.ratios}}


def _lines(rows: Sequence[Row], machine: Mapping[str, Any]) -> tuple[list[str], list[list[str]], str]:
    """The columns that any row fills, the cells, and the note below."""
    found = [cells(row, machine.get("rates")) for row in rows]
    columns = [name for name in COLUMNS if any(line.get(name) for line in found)]
    note = NOTE.format(memory=MEMORY["cuda" if machine.get("cuda") else "cpu"] if "memory" in columns else "").strip()
    return columns, [[line.get(name, "") for name in columns] for line in found], note


def _title(machine: Mapping[str, Any]) -> str:
    rates = machine.get("rates")
    most = f"; copy {rates['copy'] / 1e9:.0f} GB/s, matmul {number(rates['matmul'] / 1e12)} TFLOP/s" if rates else ""
    return headline(dict(machine)) + most


def rich_tables(rows: Sequence[Row], machine: Mapping[str, Any]) -> list[Table]:
    """What qprune takes, and how that compares: two tables, with pairs of columns above each other, so that they fit a terminal."""
    columns, lines, note = _lines(rows, machine)
    found = [dict(zip(columns, line, strict=True)) for line in lines]
    wide = [name for name in columns if name in MEASURED]
    first: list[tuple[str, ...]] = [("case",), *(tuple(n for n in pair if n in columns) for pair in PAIRS if pair[0] in columns)]
    second: list[tuple[str, ...]] = [(name,) for name in columns if name not in wide]
    tables = []
    for part in [first, second] if wide else [second]:
        last = part is second
        title = "qprune's value divided by the baseline's" if last and wide else _title(machine)
        table = Table(title=title, caption=note if last else None, title_justify="left", caption_justify="left")
        for names in part:
            left = names[0] in LEFT
            table.add_column("\n".join(names), justify="left" if left else "right", overflow="fold", no_wrap=not left)
        for row in found:
            table.add_row(*("\n".join(row[name] for name in names) for names in part))
        tables.append(table)
    return tables


def markdown_table(columns: Sequence[str], lines: Sequence[Sequence[str]], left: Sequence[str] = LEFT) -> str:
    rule = ["---" if name in left else "--:" for name in columns]
    return "\n".join(f"| {' | '.join(line)} |" for line in (columns, rule, *lines))


def markdown(rows: Sequence[Row], machine: Mapping[str, Any]) -> str:
    columns, lines, note = _lines(rows, machine)
    return "\n".join([_title(machine), "", markdown_table(columns, lines), "", note])


def write_json(path: Path, rows: Sequence[Mapping[str, Any]], machine: Mapping[str, Any], command: str, **more: Any) -> None:
    """Written whole or not at all, so that a run can save what it has after every case."""
    content = {"command": command, "machine": machine, "rows": list(rows), **more}
    write_atomically(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())

"""The measured tables of docs/scale.md, from the files in benchmarks/results: the check of the model, the driver, checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .machine import ROOT
from .table import markdown_table

RESULTS = ROOT / "benchmarks" / "results"
TIMES = ("float epochs", "search", "fine-tuning", "uniform baseline", "all else", "total")


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def _where(machine: Mapping[str, Any]) -> str:
    busy = f"load {machine['load']} before and {machine.get('load after', machine['load'])} after"
    threads = f"{machine['threads']} thread" + ("s" if machine["threads"] > 1 else "")
    return f"{machine['device']}, {machine['cores']} cores, {threads} a process, torch {machine['torch']}, {machine['date']}, {busy}"


def runs(folder: Path = RESULTS) -> str:
    """Predicted and measured, of every end-to-end-*.json."""
    texts = []
    for path in sorted(folder.glob("end-to-end-*.json")):
        found = _read(path)
        request, rows = found["request"], {row["name"]: row for row in found["rows"]}
        ranks = found["machine"].get("ranks", 1)
        size = f"{request['image_size']} x {request['image_size']}"
        title = f"{request['model']}, {size}, batch {request['batch']}, {request['method']}" + (f", {ranks} processes" if ranks > 1 else "")
        lines = [
            [name, str(row["steps"] or ""), *_pair(row), f"{row['error']:+.1%}", _computed(row)]
            for name, row in rows.items()
            if name in TIMES or name.startswith("memory")
        ]
        table = markdown_table(("", "steps", "predicted", "measured", "error", "of processor time"), lines, left=("",))
        texts.append(f"{title} ([file](../benchmarks/results/{path.name}); {_where(found['machine'])}):\n\n{table}")
    return "\n\n".join(texts)


def _pair(row: Mapping[str, Any]) -> list[str]:
    return [f"{v:.1f} s" if row["unit"] == "s" else f"{v / 1e6:.1f} MB" for v in (row["predicted"], row["measured"])]


def _computed(row: Mapping[str, Any]) -> str:
    return f"{row['error of processor time']:+.1%}" if row["unit"] == "s" else ""


def driver(folder: Path = RESULTS) -> str:
    """Of driver-cpu.json."""
    found = _read(folder / "driver-cpu.json")
    lines = [
        [
            f"{row['network']}, batch {row['batch']}, {row['phase']}", f"{row['bare'] * 1e3:.1f}", f"{row['driven'] * 1e3:.1f}",
            f"{row['ratio']:.3f}", f"{row['band'][0]:.3f} to {row['band'][1]:.3f}", f"{row['cpu_ratio']:.3f}",
        ]
        for row in found["rows"]
    ]  # fmt: skip
    columns = ("step of", "bare, ms", "in a run, ms", "ratio", "10 to 90 %", "ratio of processor time")
    return f"{_where(found['machine'])}:\n\n{markdown_table(columns, lines, left=('step of',))}"


def checkpoints(folder: Path = RESULTS) -> str:
    """Of checkpoint-cpu.json."""
    found = _read(folder / "checkpoint-cpu.json")
    lines = [
        [row["network"], row["phase"], f"{row['parameters']:,}", f"{row['bytes'] / 1e6:.1f}", f"{row['save']:.2f}", f"{row['load']:.2f}"]
        for row in found["rows"]
    ]
    columns = ("network", "phase", "parameters", "MB", "save, s", "load, s")
    return f"{_where(found['machine'])}:\n\n{markdown_table(columns, lines, left=('network', 'phase'))}"


def loading(folder: Path = RESULTS) -> str:
    """Of data-cpu.json."""
    found = _read(folder / "data-cpu.json")
    lines = [
        [
            row["data"],
            "" if row["workers"] is None else str(row["workers"]),
            "not measured" if row["rate"] is None else f"{row['rate']:,.0f}",
        ]
        for row in found["rows"]
    ]
    return f"{_where(found['machine'])}:\n\n{markdown_table(('data', 'processes', 'images/s'), lines, left=('data',))}"

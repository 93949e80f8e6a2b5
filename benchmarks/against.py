"""What moved since an earlier run: `qprune bench --against old.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from qprune.errors import InputError

from .machine import headline
from .table import number

COLUMNS = ("case", "implementation", "before", "now", "change", "noise", "")


def load(path: Path, option: str = "--against") -> dict[str, Any]:
    """A file that `--out` wrote. Raises InputError for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{option}: expected a JSON file written by --out, got {path}: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("rows"), list) or "machine" not in content:
        raise InputError(f"{option}: expected a JSON file written by --out, got {path}, which has no rows and machine")
    return content


def noise(row: Mapping[str, Any]) -> float:
    """Half of the band in which most rounds lay, as a share of the value. Files of older versions have the interquartile range instead."""
    if not row.get("value"):
        return 0.0
    if band := row.get("band"):
        return float(band[1] - band[0]) / 2 / float(row["value"])
    return float(row.get("spread", 0.0)) / 2


def compare(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """A line for every implementation of every case that both have. A time has moved if it changed by more than the noise of both runs."""
    before = {(row["case"], row["unit"], row.get("dtype", "")): row for row in old}
    before |= {(row["case"], row["unit"], ""): row for row in old if not row.get("dtype")}
    lines: list[tuple[str, ...]] = []
    for row in new:
        match = before.get((row["case"], row["unit"], row.get("dtype", ""))) or before.get((row["case"], row["unit"], ""))
        if match is None:
            continue
        both = noise(match) + noise(row)
        pairs = {"qprune": (match["value"], row["value"])}
        names = [name for name in row["values"] if name in match["values"] and name != "qprune"]
        pairs |= {name: (match["values"][name], row["values"][name]) for name in names}
        for name, (a, b) in pairs.items():
            change = b / a - 1 if a else 0.0
            verdict = "within noise" if abs(change) <= both else "slower" if change > 0 else "faster"
            if row["unit"] not in ("ms", "s"):
                verdict = "same" if abs(change) <= 1e-3 else "more" if change > 0 else "less"
            lines.append((row["case"], name, f"{number(a)} {row['unit']}", number(b), f"{change:+.1%}", f"±{both:.0%}", verdict))
    return lines


def rich_table(old: Mapping[str, Any], new: Sequence[Mapping[str, Any]], machine: Mapping[str, Any]) -> Table:
    lines = compare(old["rows"], new)
    other = [name for name in ("device", "threads", "torch") if old["machine"].get(name) != machine.get(name)]
    caption = f"before: {headline(old['machine'])}." if lines else "No case is in both."
    if other:
        caption += f" The runs differ in {', '.join(other)}, so changes are not due to the code alone."
    missing = len({row["case"] for row in new} - {line[0] for line in lines})
    caption += f" {missing} cases are new." if lines and missing else ""
    table = Table(title="what moved", caption=caption, title_justify="left", caption_justify="left")
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in ("case", "implementation", "") else "right")
    for line in lines:
        table.add_row(*line)
    return table

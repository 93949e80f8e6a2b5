"""The compiled kernels keep to their budgets of registers, spills, memory and instructions, on a machine without a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qprune.kernels import BackendError, aot

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """The quick table, from a process of its own: this one may be set up to interpret kernels."""
    path = tmp_path_factory.mktemp("aot") / "rows.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "error", "-m", "qprune.kernels.aot", "--quick", "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert path.is_file(), done.stderr
    table: list[Row] = json.loads(path.read_text())
    return table


@needs_triton
def test_every_kernel_is_within_its_budget(rows: list[Row]) -> None:
    broken = [{name: row[name] for name in ("kernel", "family", "k", "dtype", "arch", "violations")} for row in rows if row["violations"]]
    assert not broken, "\n".join(map(str, broken))


@needs_triton
def test_the_table_has_every_kernel_and_family(rows: list[Row]) -> None:
    assert {row["kernel"] for row in rows} == set(aot.KERNELS)
    for kernel in ("forward", "backward"):
        assert {row["family"] for row in rows if row["kernel"] == kernel} == set(aot.FAMILIES)
    assert {row["arch"] for row in rows} == {80, 90}
    assert {row["noise"] for row in rows} == {False, True}


@needs_triton
def test_slots_are_measured(rows: list[Row]) -> None:
    """A loop that the parser of the disassembly no longer finds would pass every bound."""
    assert all(row["slots"] > 2 * row["k"] for row in rows if row["kernel"] != "finish")
    assert all(row["registers"] > 0 for row in rows)


ROW: Row = {
    "kernel": "forward", "family": "flat", "k": 5, "dtype": "bf16", "noise": False, "offset": False, "arch": 90,
    "registers": 32, "stack": 0, "spills": 0, "shared": 0, "ldg128": 2, "stg128": 2, "frnd": 0, "fmnmx": 0, "slots": 27.0, "threads": 128,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None),
        ({"spills": 4}, "spills 4 > 0"),
        ({"frnd": 1}, "frnd 1 > 0"),
        ({"slots": 80.0}, "slots 80.0 >"),
        ({"ldg128": 0}, "16-byte"),
        ({"registers": 255, "threads": 512}, "do not fit"),
        ({"ldg128": 0, "stg128": 0, "family": "short rows"}, None),
    ],
)
def test_violations(change: Row, words: str | None) -> None:
    found = aot.violations({**ROW, **change})
    assert any(words in what for what in found) if words else not found


def test_refuses_to_run_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(BackendError, match="TRITON_INTERPRET"):
        aot.table()


def test_says_that_triton_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(BackendError, match="pip install triton"):
        aot.table()

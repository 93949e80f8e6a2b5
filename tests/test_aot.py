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
from qprune.kernels.aot.table import FAMILIES

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture(scope="module", params=FAMILIES)
def rows(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """The quick table of one family, from a process of its own: this one may be set up to interpret kernels."""
    path = tmp_path_factory.mktemp("aot") / "rows.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "error", "-m", "qprune.kernels.aot", "--quick", "--only", request.param, "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert path.is_file(), done.stderr
    table: list[Row] = json.loads(path.read_text())
    return table


@needs_triton
def test_every_kernel_is_within_its_budget(rows: list[Row]) -> None:
    broken = [f"{row['kernel']}, {row['case']}, sm_{row['arch']}: {row['violations']}" for row in rows if row["violations"]]
    assert not broken, "\n".join(broken)


@needs_triton
def test_both_architectures_and_all_directions(rows: list[Row]) -> None:
    assert {row["arch"] for row in rows} == {80, 90}
    assert len({row["kernel"] for row in rows}) >= (1 if rows[0]["family"] == "int8" else 2)
    assert all(row["registers"] > 0 for row in rows)


USE: Row = {"registers": 32, "stack": 0, "spills": 0, "shared": 0, "slots": 27.0, "threads": 128}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None),
        ({"spills": 4}, "spills 4 > 0"),
        ({"stack": 8}, "stack 8 > 0"),
        ({"slots": 80.0}, "slots 80.0 > 40"),
        ({"slots": 0.0}, "no storing loop"),
        ({"registers": 65}, "registers 65 > 64"),
        ({"registers": 64, "threads": 1056}, "do not fit"),
        ({"shared": 200_000}, "shared 200000 > 166912"),
    ],
)
def test_violations(change: Row, words: str | None) -> None:
    found = aot.violations({**USE, **change}, aot.Budget(registers=64, slots=40), arch=80)
    assert any(words in what for what in found) if words else not found


def test_instructions_that_must_or_must_not_occur() -> None:
    found = aot.violations(USE, aot.Budget(registers=64), 90, missing=("HGMMA",), forbidden=("FRND",))
    assert found == ["no HGMMA", "has FRND"]


def test_refuses_to_run_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(BackendError, match="TRITON_INTERPRET"):
        next(iter(aot.table()))


def test_says_that_triton_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(BackendError, match="pip install triton"):
        next(iter(aot.table()))

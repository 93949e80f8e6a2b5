"""The benchmarks run: every target once, without timing, its correctness check included; and the table reads what it is given."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks import machine, measure, mixing, table
from benchmarks.__main__ import main
from benchmarks.rows import Row

ROOT = Path(__file__).resolve().parents[1]
ROWS = [
    Row("a step", 101.5, "ms", {"float": 1.3, "branches": 0.11}, {"float": 1.35, "branches": 1 / 3}, {"qprune": 101.5, "float": 78.0}),
    Row("an operation", 0.0301, "ms", {"compile": 1.2, "eager": 0.05}, {"compile": 1.0}),
    Row("a load", 14.0, "s", target={"value": 60.0}),
    Row("no target", 2.0, "MiB"),
]


def test_every_target_runs_once() -> None:
    command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "--benchmark-disable", "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTEST_ADDOPTS": ""}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert "40 passed" in result.stdout


def test_wrong_results_are_not_timed() -> None:
    case = mixing.CASES[2]
    right = mixing.call(case, "eager", backward=True)
    mixing.check(case, "eager", right)
    with pytest.raises(measure.WrongResultError, match="dx differs"):
        mixing.check(case, "eager", lambda: tuple(t * (1.01 if i == 1 else 1.0) for i, t in enumerate(right())))


def test_a_failed_check_ends_without_a_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def wrong(quick: bool, device: str) -> list[Row]:
        raise measure.WrongResultError("eager: dx differs")

    monkeypatch.setattr("benchmarks.rows.measure", wrong)
    threads = torch.get_num_threads()
    assert main(["--out", str(tmp_path / "cpu.json"), "--threads", str(threads)]) == 1
    assert "not timed: eager: dx differs" in capsys.readouterr().err
    assert not (tmp_path / "cpu.json").exists()


def test_table_and_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("benchmarks.rows.measure", lambda quick, device: iter(ROWS))
    out = tmp_path / "results" / "cpu.json"
    assert main(["--markdown", "--out", str(out), "--threads", str(torch.get_num_threads())]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "| a step | 102 ms | 1.30 |  | 0.11 |  | float ≤ 1.35, branches ≤ 0.333 | yes |" in lines
    assert "| an operation | 0.0301 ms |  | 0.05 |  | 1.20 | compile ≤ 1.00 | no |" in lines
    content = json.loads(out.read_text(encoding="utf-8"))
    assert content["command"].startswith("python -m benchmarks --markdown")
    assert content["machine"]["torch"] == torch.__version__ and content["machine"]["commit"]
    assert [row["met"] for row in content["rows"]] == [True, False, True, None]
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(table.rich_table(ROWS, machine.describe("cpu")))
    assert "an operation" in console.export_text()


def test_rounds_alternate_and_ratios_are_paired() -> None:
    order: list[str] = []
    timings = measure.alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, least=0.0)
    assert order[4:] == ["a", "b", "b", "a", "a", "b"]
    assert all(len(seconds) == 3 for seconds in timings.rounds.values())
    paired = measure.Timings({"a": [2.0, 20.0, 4.0], "b": [1.0, 10.0, 3.0]})
    assert paired.ratio("a", "b") == 2.0 and paired.fastest(["a", "b"]) == "b"


def test_kept_bytes_counts_each_storage_once() -> None:
    x, w = torch.randn(8, 4, requires_grad=True), torch.randn(4, requires_grad=True)
    assert measure.kept_bytes(lambda: (x * w) * (x * w).exp(), [w]) == 3 * x.nbytes

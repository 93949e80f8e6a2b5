"""The benchmark of filterwise layers: what it compares, and what it says when the comparison fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qprune.benchmarks import filterwise
from qprune.benchmarks.measure import Timings, WrongResultError

SETUP = filterwise.Setup(network="resnet8", batch=4, configurations=2, rounds=1, device="cpu")
ARGUMENTS = ["--network", "resnet8", "--batch", "4", "--configurations", "2", "--rounds", "1", "--device", "cpu"]


def untimed(functions: Any, rounds: int, device: str) -> Timings:
    """Every implementation called once; the times are made up."""
    for function in functions.values():
        function()
    return Timings({name: [float(i + 1)] * rounds for i, name in enumerate(functions)})


def test_rows_and_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filterwise, "alternate", untimed)
    shown: list[Any] = []
    assert filterwise.main([*ARGUMENTS, "--json", str(tmp_path / "rows.json")], shown.append) == 0
    data = json.loads((tmp_path / "rows.json").read_text())
    assert [row["case"] for row in data["rows"][:4]] == ["eval, own", "step, own", "stack of 2, batch 4, own", "stack of 2, batch 1, own"]
    assert data["rows"][0]["seconds"] == {"float": 1.0, "qprune": 2.0, "per-filter": 3.0} and data["rows"][0]["ratio"] == 1.5
    assert data["rows"][4]["case"] == "eval, shared" and shown[0].row_count == 8


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    nets = filterwise.networks(SETUP, shared=True)
    filterwise.check(nets)
    with torch.no_grad():
        nets.dense.layer1[0].conv1.weight.mul_(1.5)
    with pytest.raises(WrongResultError, match="dense evaluation differs from the per-filter one"):
        filterwise.check(nets)
    monkeypatch.setattr(filterwise, "networks", lambda setup, shared: nets)
    said: list[Any] = []
    assert filterwise.main(ARGUMENTS, said.append) == 1 and "differs" in said[0]

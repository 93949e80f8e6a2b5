"""The benchmark of nested candidates: its implementations agree, and a wrong one is not timed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qprune.benchmarks import sbs
from qprune.benchmarks.measure import Timings, WrongResultError

ARGUMENTS = ["--network", "resnet8", "--batch", "4", "--rounds", "1", "--device", "cpu"]


def untimed(functions: Any, rounds: int, device: str) -> Timings:
    """Every implementation called once; the times are made up."""
    for function in functions.values():
        function()
    return Timings({name: [float(i + 1)] * rounds for i, name in enumerate(functions)})


def test_rows_and_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sbs, "alternate", untimed)
    shown: list[Any] = []
    assert sbs.main([*ARGUMENTS, "--json", str(tmp_path / "rows.json")], shown.append) == 0
    found = {row["implementation"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    assert [found[name]["ratio"] for name in ("float", "qprune", "recompute", "residuals", "paths")] == [0.5, 1.0, 1.5, 2.0, 2.5]
    assert (
        found["float"]["kept"] < found["recompute"]["kept"] < found["qprune"]["kept"] < found["residuals"]["kept"] < found["paths"]["kept"]
    )
    assert shown[0].row_count == 5


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    networks, batch = sbs.networks(sbs.Setup("resnet8", 4, 1, "cpu"))
    sbs.check(networks, batch[0])
    with torch.no_grad():
        networks["paths"].get_parameter("layer1.0.conv1.weight").mul_(torch.linspace(0.5, 1.5, 3))
    with pytest.raises(WrongResultError, match="paths differ from qprune"):
        sbs.check(networks, batch[0])
    monkeypatch.setattr(sbs, "networks", lambda setup: (networks, batch))
    said: list[Any] = []
    assert sbs.main(ARGUMENTS, said.append) == 1 and "differ" in said[0]

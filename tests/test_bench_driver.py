"""The benchmarks of the driver and of checkpoints, on a small network: what they time, and what they write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qprune.benchmarks import checkpoint, driver
from qprune.benchmarks.driver import Turns
from qprune.nn import MixedConv2d
from qprune.search.optimizers import Optimizers


def test_rows_of_the_driver(tmp_path: Path) -> None:
    shown: list[Any] = []
    arguments = ["--network", "resnet8", "--batch", "4", "--steps", "3", "--warm", "1", "--side", "8", "--out", str(tmp_path / "rows.json")]
    assert driver.main(arguments, shown.append) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [(row["phase"], row["steps"]) for row in rows] == [("float", 3), ("search", 3)]
    for row in rows:
        assert row["bare"] > 0 and row["driven"] > 0 and row["checkpoint"] > 0
        assert row["band"][0] <= row["ratio"] <= row["band"][1]
    assert shown[0].row_count == 2


def test_bare_steps_take_turns_with_driven_ones() -> None:
    calls: list[str] = []
    batch = (torch.zeros(1), torch.zeros(1))
    turns = Turns([batch, batch])
    for _ in turns:
        calls.append("before")
    turns.begin("float", lambda x, y: calls.append("bare"))
    for _ in turns:
        calls.append("driven")
    turns.end()
    assert calls == ["before", "before", "bare", "driven", "bare", "driven"]
    assert len(turns.taken["float"]) == len(turns.cpu["float"]) == 2


def test_rows_of_checkpoints(tmp_path: Path) -> None:
    shown: list[Any] = []
    out = tmp_path / "rows.json"
    assert checkpoint.main(["--networks", "resnet8", "--rounds", "1", "--folder", str(tmp_path), "--out", str(out)], shown.append) == 0
    plain, search = json.loads(out.read_text())["rows"]
    assert (plain["phase"], search["phase"]) == ("float", "search") and search["parameters"] > plain["parameters"]
    assert plain["bytes"] > 2 * 4 * plain["parameters"]  # weights and momentum
    assert search["bytes"] > plain["bytes"] and min(plain["save"], plain["load"]) > 0


def test_gradients_are_checked_once_for_both_updates() -> None:
    """Weights and gates are updated from one backward pass: one look at the gradients is enough, and the next step has its own."""
    model = nn.Sequential(MixedConv2d(2, 2, 1, w_bits=(2, 4), a_bits=(2, 4)))
    optimizers, checks = Optimizers(model), []
    optimizers.check = lambda: checks.append(len(checks))
    for step in (1, 2):
        optimizers.zero_grad()
        model(torch.rand(1, 2, 3, 3)).sum().backward()
        optimizers.step_weights()
        optimizers.step_arch()
        assert len(checks) == step
    optimizers.zero_grad()
    optimizers.step_arch()
    assert len(checks) == 3

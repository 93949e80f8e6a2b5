"""The benchmark of ANNC's projections: what it compares, and what it says when the comparison fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qprune.benchmarks import annc
from qprune.benchmarks.measure import Timings
from qprune.search.sparsity import Kept, keep_weights


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two small layers, and every implementation called once with a made-up time."""
    random = torch.Generator().manual_seed(0)
    weights = {"a": torch.randn(8, 4, 3, 3, generator=random), "b": torch.randn(10, 20, generator=random)}

    def untimed(functions: Any, rounds: int, device: str) -> Timings:
        for function in functions.values():
            function()
        return Timings({name: [float(i + 1)] * rounds for i, name in enumerate(functions)})

    monkeypatch.setattr(annc, "alternate", untimed)
    monkeypatch.setattr(annc, "layers", lambda setup: weights)


def test_rows_errors_and_file(tmp_path: Path) -> None:
    shown: list[Any] = []
    assert annc.main(["--rounds", "1", "--device", "cpu", "--json", str(tmp_path / "rows.json")], shown.append) == 0
    data = json.loads((tmp_path / "rows.json").read_text())
    assert [row["case"] for row in data["rows"]] == ["keep", "codebooks", "plan"] and len(shown) == 2
    assert data["rows"][0]["seconds"] == {"qprune": 1.0, "sort": 2.0}
    assert [row["bits"] for row in data["errors"]] == list(range(1, 9))
    assert all(row["excess"] == 0 for row in data["errors"]) and data["errors"][5]["linspace"] > 1.2


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: Any, **options: Any) -> Kept:
        kept = keep_weights(*arguments, **options)
        return Kept({name: ~mask for name, mask in kept.masks.items()}, kept.nnz, kept.bits)

    monkeypatch.setattr(annc, "keep_weights", wrong)
    said: list[Any] = []
    assert annc.main(["--device", "cpu"], said.append) == 1 and "layer a: the kept weights differ" in said[0]


def test_layers_of_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    weights = annc.layers(annc.Setup(network="resnet18", device="cpu"))
    assert len(weights) == 21 and sum(weight.numel() for weight in weights.values()) == 11_678_912

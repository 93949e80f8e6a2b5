"""The benchmark of data: what it measures, and what it leaves out."""

from __future__ import annotations

import math
from typing import Any

import pytest
from rich.table import Table

from qprune.benchmarks import data
from tests import vision_standin

ARGUMENTS = ["--images", "12", "--workers", "0,1", "--batch", "4", "--size", "16"]


def test_rates_of_both_data_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    vision_standin.install(monkeypatch)
    shown: list[Any] = []
    assert data.main(ARGUMENTS, shown.append) == 0
    assert [table.title for table in shown] == ["cifar10, augmented", "imagefolder, 500 x 375 to 16 x 16, augmented"]
    for table in shown:
        assert isinstance(table, Table)
        workers, rates = (list(column.cells) for column in table.columns[:2])
        assert workers == ["0", "1"] and all(math.isfinite(float(rate.replace(",", ""))) for rate in rates)


def test_without_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    vision_standin.remove(monkeypatch)
    shown: list[Any] = []
    assert data.main(ARGUMENTS, shown.append) == 0
    assert shown[0].title == "cifar10, not augmented" and "imagefolder is left out" in shown[1]

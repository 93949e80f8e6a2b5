"""The benchmark of data: what it measures, and what it leaves out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qprune.benchmarks import data
from tests import vision_standin

ARGUMENTS = ["--images", "12", "--workers", "0,1", "--batch", "4", "--size", "16"]
DECODE = "decode, 500 x 375 to 16 x 16"


def rows(path: Path) -> dict[tuple[str, int | None], Any]:
    assert data.main([*ARGUMENTS, "--out", str(path)], lambda table: None) == 0
    return {(row["data"], row["workers"]): row for row in json.loads(path.read_text())["rows"]}


def test_rates_of_all_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vision_standin.install(monkeypatch)
    found = rows(tmp_path / "rows.json")
    folder = "imagefolder, 500 x 375 to 16 x 16, augmented"
    names = [("digits, in memory", 0), ("cifar10, augmented", 0), ("cifar10, augmented", 1), (folder, 0), (folder, 1), (DECODE, None)]
    assert list(found) == names
    assert all(row["rate"] > 0 for row in found.values())


def test_without_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vision_standin.remove(monkeypatch)
    found = rows(tmp_path / "rows.json")
    assert found["cifar10, not augmented", 1]["rate"] > 0 and found[DECODE, None]["rate"] > 0
    left_out = found["imagefolder, 500 x 375 to 16 x 16", None]
    assert left_out["rate"] is None and "torchvision" in left_out["why"]


def test_table_says_what_was_not_measured() -> None:
    table = data.table([data.Row("a", 2, 10, 1000.0), data.Row("b", None, 10, None, "no files")])
    assert [list(column.cells) for column in table.columns] == [["a", "b"], ["2", ""], ["1,000", "not measured"], ["10.0", "no files"]]

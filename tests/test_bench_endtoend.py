"""`qprune bench --end-to-end` on a small network: it runs, predicts, and writes what it measured."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from qprune import cli
from qprune.benchmarks import endtoend, parts
from qprune.benchmarks.endtoend import Line, Request
from qprune.benchmarks.parts import Memory
from qprune.errors import InputError
from qprune.ranks import ALONE
from qprune.scale import Size

ARGUMENTS = ["bench", "--end-to-end", "--quick", "--model", "resnet8", "--image-size", "8", "--steps", "2", "--batch-size", "4"]
TIMED = ["float epochs", "search", "fine-tuning", "uniform baseline", "all else", "total"]


@pytest.fixture
def _one_thread() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_one_thread")
def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "freed_at_once", nullcontext)  # of the whole process
    result = CliRunner().invoke(cli.app, [*ARGUMENTS, "--threads", "1", "--out", str(tmp_path / "new.json")])
    assert result.exit_code == 0, result.output
    assert "predicted from the parts and measured" in result.output and "loader alone" in result.output
    found = json.loads((tmp_path / "new.json").read_text())
    lines = {row["name"]: row for row in found["rows"]}
    assert list(lines)[: len(TIMED)] == TIMED
    assert [lines[name]["steps"] for name in TIMED] == [2, 2, 2, 4, 0, 0]
    total = sum(lines[name]["predicted"] for name in TIMED[:-1])
    assert lines["total"]["predicted"] == pytest.approx(total)
    measured = sum(lines[name]["measured"] for name in TIMED[:-1])
    assert lines["total"]["measured"] == pytest.approx(measured)
    assert all(row["predicted"] > 0 and row["measured"] > 0 for row in lines.values())
    assert found["request"]["batch"] == 4 and found["parts"]["sizes"]["search"]["adam"] > 0
    assert found["parts"]["gradients"]["search"] > found["parts"]["gradients"]["float"]


@pytest.mark.parametrize("name", ["batch", "steps", "image_size", "epochs", "accumulate"])
def test_numbers_must_be_positive(name: str) -> None:
    with pytest.raises(InputError, match=f"--{name.replace('_', '-')}: expected at least 1, got 0"):
        Request(**{name: 0}).options()


def test_errors_are_relative_to_what_was_measured() -> None:
    assert Line("a", "s", 3.0, 4.0).error == -0.25 and Line("a", "s", 1.0, 0.0).error == 0.0
    slowed = Line("a", "s", 3.0, 4.0, share=0.75)  # by other programs: it computed for 3 s
    assert slowed.error == -0.25 and slowed.error_of_processor_time == 0.0


def test_a_batch_must_have_equal_parts() -> None:
    with pytest.raises(InputError, match="--batch: expected a multiple of 1 ranks x 3 parts, got 4"):
        endtoend.run(Request(batch=4, accumulate=3), None, lambda text: None)


def test_an_evaluation_can_take_more_memory_than_a_step() -> None:
    options = Request(batch=4).options()
    size = Size(weights=100, kept=1000.0)
    small = Memory({"float": size}, {"float": 1.0})
    assert endtoend.added(small, options, ALONE, "float") == pytest.approx(400 + 400 + 4000)
    large = Memory({"float": size}, {"float": 1000.0})
    assert endtoend.added(large, options, ALONE, "float") == pytest.approx(400 + 400 + 256_000)

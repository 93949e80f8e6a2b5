"""Several watchers, loggers with .log(values, step), and TensorBoard."""

from __future__ import annotations

import logging
import math
import sys
import types
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from resume_cases import options, patch
from rich.console import Console

from qprune.console import Bars
from qprune.seeds import run
from qprune.watch import Logged, Several, TensorBoard, has_tensorboard


class Logger:
    def __init__(self, fails: bool = False) -> None:
        self.seen: list[tuple[dict[str, float], int]] = []
        self.fails = fails

    def log(self, values: dict[str, float], step: int) -> None:
        self.seen.append((values, step))
        if self.fails:
            raise OSError("no network")


def feed(watcher: Any, seeds: int = 1, done: int = 0) -> None:
    for seed in range(seeds):
        watcher.phase("search", seed, 40, done)
        for i in range(done, 40):
            watcher.step({"loss": 0.5 + i, "cost": math.nan})
        watcher.epoch({"phase": "search", "seed": seed, "epoch": 1, "loss": 0.25, "val_accuracy": 0.9, "entropy": None, "ok": True})


def test_a_run_tells_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patch(monkeypatch)
    first, second = Logger(), Logger()
    run(options(float_epochs=1, search_epochs=1), tmp_path / "run", Several([Logged(first), Logged(second)]))
    assert first.seen == second.seen
    names = {name for values, _ in first.seen for name in values}
    assert {"float/loss", "search/loss", "search/val_accuracy", "finetune/loss", "uniform/loss"} <= names
    steps = [step for _, step in first.seen]
    assert steps == sorted(steps) and steps[0] > 0


def test_steps_and_names() -> None:
    logger = Logger()
    feed(Logged(logger), seeds=2)
    end = {"search/epoch": 1.0, "search/loss": 0.25, "search/val_accuracy": 0.9}
    assert logger.seen[:3] == [({"search/loss-step": 19.5}, 20), ({"search/loss-step": 39.5}, 40), (end, 40)]
    assert logger.seen[3:] == [({f"seed-1/{name}": v for name, v in values.items()}, step + 40) for values, step in logger.seen[:3]]


def test_a_logger_that_fails_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    logger = Logger(fails=True)
    with caplog.at_level(logging.WARNING, "qprune"):
        feed(Logged(logger))
    assert len(logger.seen) == 1
    assert [record.getMessage() for record in caplog.records] == ["qprune: Logger failed and gets no more numbers (OSError: no network)"]


def test_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for its writer: steps are those of the phase, and nothing is made before there is a number."""
    written: list[Any] = []

    class Writer:
        def __init__(self, folder: str) -> None:
            written.append(folder)

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        def flush(self) -> None:
            pass

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    assert has_tensorboard()
    watcher = TensorBoard(tmp_path / "events")
    watcher.phase("float", 0, 10)
    assert written == []
    feed(watcher, done=20)
    assert written[:2] == [str(tmp_path / "events"), ("search/loss-step", 39.5, 40)]
    assert ("search/val_accuracy", 0.9, 40) in written


def test_without_tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert not has_tensorboard()


def test_bars_show_images_per_second() -> None:
    out = StringIO()
    with Bars(Console(file=out, width=160, force_terminal=True), 1, 16) as bars:
        feed(bars)
    assert "img/s" in out.getvalue() and "acc 0.90" in out.getvalue()

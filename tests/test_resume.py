"""Runs that are cut short, and go on as if they had not been."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from resume_cases import METHODS, options, outcome, patch

from qprune.resume.checkpoints import Checkpoints
from qprune.seeds import run


class Killed(BaseException):
    """The process is gone: nothing may handle this."""


class Watcher:
    """Kills at step `at` of this process; 0: never."""

    def __init__(self, at: int = 0) -> None:
        self.at, self.steps = at, 0
        self.phases: list[tuple[str, int]] = []

    def phase(self, name: str, seed: int, steps: int, done: int = 0) -> None:
        self.phases.append((name, done))

    def step(self, values: Any) -> None:
        self.steps += 1
        if self.steps == self.at:
            raise Killed

    def epoch(self, values: Any) -> None:
        pass


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    patch(monkeypatch)


@pytest.mark.parametrize("case", METHODS)
def test_every_method_goes_on_from_any_step(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watcher, chosen, dice = Watcher(), options(case), random.Random(case)
    run(chosen, tmp_path / "whole", watcher)
    monkeypatch.setattr(Checkpoints, "due", property(lambda self: dice.random() < 0.4))
    kills = 0
    while True:
        last = Watcher(dice.randint(1, max(2, watcher.steps // 3)))
        try:
            run(chosen, tmp_path / "parts", last, resume=True)
            break
        except Killed:
            kills += 1
    assert kills >= 3
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")

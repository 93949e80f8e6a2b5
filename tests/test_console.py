"""Progress bars on consoles of every width."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.cells import cell_len
from rich.console import Console

from qprune.console import Bars


class Clock:
    """A second passes with every look."""

    def __init__(self, start: float = 0.0) -> None:
        self.now = start

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def lines(width: int, seeds: int = 5, steps: int = 450450, loss: float = 123456.789, cost: float = 123.456) -> list[str]:
    """What stays on the console after two phases."""
    console = Console(file=StringIO(), width=width, soft_wrap=True)
    with Bars(console, seeds, 1024) as bars:
        bars.progress.get_time = Clock()
        for phase in ("uniform", "search"):
            bars.phase(phase, 100, steps, steps - 3)
            bars.epoch({"val_accuracy": 1.0, "entropy": 12.3456 if phase == "search" else None})
            for _ in range(2):
                bars.step({"loss": loss, "cost": cost} if phase == "search" else {"loss": loss})
    assert isinstance(console.file, StringIO)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 200])
def test_one_line_a_phase_whatever_the_numbers(width: int) -> None:
    shown = lines(width)
    assert len(shown) == 2, shown
    assert max(map(cell_len, shown)) <= width
    assert shown[0].startswith("train uniform")
    if width >= 60:
        assert "(seed 100) " in shown[0] and "450449/450450" in shown[0] and "loss 1.2e+05" in shown[1]


def test_what_is_left_out_first() -> None:
    everything = ("━━━", "loss 1.2e+05", "cost 123.46", "acc 1.00", "entropy 12.35", "img/s")
    found = {width: [text for text in everything if text in lines(width)[1]] for width in (80, 100, 200)}
    assert found[200] == list(everything)
    assert found[80] == ["loss 1.2e+05", "cost 123.46", "acc 1.00"]
    assert set(found[80]) < set(found[100]) < set(found[200])


def test_a_usual_run_keeps_its_bar_at_80_columns() -> None:
    shown = lines(80, seeds=1, steps=920, loss=0.46, cost=0.97)
    assert "━━━" in shown[1] and "img/s" in shown[1] and "entropy" not in shown[1]


def test_what_was_left_out_stays_away_until_the_console_is_wider() -> None:
    console = Console(file=StringIO(), width=85, soft_wrap=True)
    with Bars(console, 1) as bars:
        bars.phase("search", 0, 100)
        bars.epoch({"val_accuracy": 1.0, "entropy": 1.0})
        shown = []
        for loss in (1.0, 1e200, 1.0):
            bars.step({"loss": loss, "cost": loss})
            bars.progress.refresh()
            shown.append(bars.progress.columns)
        assert len(shown[0]) > len(shown[1]) and shown[1] == shown[2]
        console.width = 200
        bars.progress.refresh()
        assert len(bars.progress.columns) == len(bars.progress.all)

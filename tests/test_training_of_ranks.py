"""qprune train in two processes over gloo: rank 0 has the folder, and what one is told stops both."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

from ranks import be_one_of_two, two_ranks
from resume_cases import patch, trained

from qprune.ranks import current
from qprune.resume.signals import Stop, Stopped
from qprune.training import TrainOptions, run
from qprune.watch import Several


class Patch:
    setattr = staticmethod(setattr)


class Asking(Several):
    """Asks to stop at the seventh step."""

    def __init__(self, stop: Stop) -> None:
        super().__init__([])
        self.stop, self.steps = stop, 0

    def step(self, values: Any) -> None:
        self.steps += 1
        if self.steps == 7:
            self.stop.asked = signal.SIGTERM


def work(rank: int) -> dict[str, Any]:
    patch(Patch)
    folder, ranks, options = Path(sys.argv[1]).parent, current(), TrainOptions(epochs=3, batch_size=16)
    whole = run(options, folder / "whole", Several([]), ranks=ranks)
    stop, told = Stop(), ""
    try:
        run(options, folder / "parts", Asking(stop) if rank == 1 else Several([]), stop=stop, ranks=ranks)
    except Stopped as stopped:
        told = str(stopped)
    parts = run(options, folder / "parts", Several([]), resume=True, ranks=ranks)
    again = run(options, folder / "parts", Several([]), resume=True, ranks=ranks)
    return {"whole": whole, "told": told, "parts": parts, "again": again}


def test_two_processes_go_on_as_two(tmp_path: Path) -> None:
    first, second = two_ranks(__file__, tmp_path / "store")
    assert first["told"] == second["told"]
    assert "stopped at phase float, epoch 2, step 2; go on with: qprune train --resume --out" in first["told"]
    assert trained(tmp_path / "parts") == trained(tmp_path / "whole")
    for found in (first, second):
        assert found["again"] == first["parts"]
        assert {**found["parts"], "seconds": 0} == {**first["whole"], "seconds": 0}
    assert first["whole"]["environment"]["processes"] == "2"


if __name__ == "__main__":
    be_one_of_two(work)

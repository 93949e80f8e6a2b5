"""Everything that the table shows: what is measured, against what, and what would be good enough."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qprune.kernels import cpu
from qprune.kernels.cpu import build

from . import mixing, training
from .machine import ROOT
from .measure import Timings, alternate, kept_bytes

COMPILED = ["compile-eager", "compile-reference"]


@dataclass(frozen=True)
class Row:
    """One line of the table.

    value   of qprune, in `unit`
    ratios  value / baseline's value, per baseline: below 1 qprune is the smaller one
    target  the largest ratio that is good enough, per baseline ("value": of the value itself)
    values, fastest  median and minimum over the rounds, per implementation
    spread  the interquartile range of qprune's time over its median
    """

    case: str
    value: float
    unit: str
    ratios: dict[str, float] = field(default_factory=dict)
    target: dict[str, float] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)
    fastest: dict[str, float] = field(default_factory=dict)
    rounds: int = 1
    spread: float = 0.0

    @property
    def met(self) -> bool | None:
        """None where there is no target."""
        reached = [(self.value if name == "value" else self.ratios[name]) <= bound for name, bound in self.target.items()]
        return all(reached) if reached else None

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "met": self.met}


def _timed(case: str, timings: Timings, target: dict[str, float], drop: str = "") -> Row:
    names = [name for name in timings.rounds if name not in ("qprune", drop)]
    ours = timings.rounds["qprune"]
    low, _, high = statistics.quantiles(ours, n=4) if len(ours) > 1 else (0.0, 0.0, 0.0)
    return Row(
        case,
        timings.median("qprune") * 1e3,
        "ms",
        {name.partition("-")[0]: timings.ratio("qprune", name) for name in names},
        target,
        {name: timings.median(name) * 1e3 for name in timings.rounds},
        {name: min(seconds) * 1e3 for name, seconds in timings.rounds.items()},
        len(ours),
        (high - low) / timings.median("qprune"),
    )


def _training_rows(rounds: int, device: str) -> Iterator[Row]:
    for case in training.CASES:
        steps = {name: training.step(case, name, device=device) for name in ("float", "eager", "branches", "qprune")}
        for name in ("eager", "branches"):
            training.check(case, steps["qprune"], steps[name])
        target = {"float": 3.8} if case.joint else {"float": 1.35, "branches": 1 / 3}
        yield _timed(case.name, alternate(steps, rounds, device), target)
        if not case.joint:
            kept = {name: kept_bytes(step.loss, step.model.parameters()) / 2**20 for name, step in steps.items()}
            yield _bytes_row(f"{case.name}, kept for backward", kept, "MiB")


def _bytes_row(case: str, kept: dict[str, float], unit: str, target: dict[str, float] | None = None) -> Row:
    ratios = {name: kept["qprune"] / value for name, value in kept.items() if name != "qprune"}
    return Row(case, kept["qprune"], unit, ratios, target or {}, kept, kept)


def _mixing_rows(rounds: int, device: str) -> Iterator[Row]:
    for case in mixing.CASES:
        for backward in (False, True):
            calls = {name: mixing.call(case, name, backward, device) for name in mixing.IMPLEMENTATIONS}
            for name, call in calls.items():
                mixing.check(case, name, call, device)
            timings = alternate(calls, rounds, device)
            slower = next(name for name in COMPILED if name != timings.fastest(COMPILED))
            what = "forward + backward" if backward else "forward"
            yield _timed(f"{case.name}, {what}", timings, {"compile": 1.0}, drop=slower)
    case = mixing.CASES[0]
    kept = {name: mixing.kept(case, name, device) for name in ("eager", "compile-eager", "qprune")}
    yield _bytes_row(f"{case.name}, kept for backward", {n.partition("-")[0]: v for n, v in kept.items()}, "x", {"value": 1.01})


_LOAD = "import json, time; from qprune.kernels import cpu; t = time.perf_counter(); cpu.load(); print(json.dumps(time.perf_counter() - t))"


def _load_seconds(cache: str) -> float:
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": cache, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", _LOAD], env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    seconds: float = json.loads(result.stdout)
    return seconds


def _compile_rows() -> Iterator[Row]:
    if (Path(cpu.__file__).parent / build.library_name()).is_file():
        return  # compiled when the package was installed
    with tempfile.TemporaryDirectory() as cache:
        first, second = _load_seconds(cache), _load_seconds(cache)
    yield Row("C++ kernels, first use", first, "s", target={"value": 60.0})
    yield Row("C++ kernels, later processes", second, "s", target={"value": 0.1})


def measure(quick: bool = False, device: str = "cpu") -> Iterator[Row]:
    """The rows of the table, each checked for correctness before it is timed (WrongResultError). `quick`: three rounds."""
    many = 50 if device == "cuda" else 15
    yield from _training_rows(3 if quick else 9, device)
    yield from _mixing_rows(3 if quick else many, device)
    if device == "cpu":
        yield from _compile_rows()

"""Everything that the table shows: what was measured, against what, and what would be good enough."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qprune.kernels import cpu
from qprune.kernels.cpu import build

from . import cases, training
from .cases import DIRECTIONS, Call, Case, Work
from .convolution import Convolution
from .machine import ROOT
from .measure import Timings, alternate, kept_bytes, peak_bytes


@dataclass(frozen=True)
class Row:
    """One line of the table.

    value   of qprune, in `unit`
    ratios  value / baseline's value, per baseline: below 1 qprune is the smaller one
    target  the largest ratio that is good enough, per baseline ("value": of the value itself)
    values, fastest  median and minimum over the rounds, per implementation
    band    the 20 and the 80 % quantile of qprune's rounds
    variant which of qprune's or the compiler's variants are shown, where there are several
    bytes, flops     logical work of a call
    shape, quantizers  of a convolution, and how many activation widths it has
    memory  bytes: on a GPU the peak that a call adds, on a CPU what autograd keeps for the backward pass; per implementation
    skipped why there is no value; failed: and that it should have one
    """

    case: str
    value: float
    unit: str
    ratios: dict[str, float] = field(default_factory=dict)
    target: dict[str, float] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)
    fastest: dict[str, float] = field(default_factory=dict)
    rounds: int = 1
    band: tuple[float, float] | None = None
    kernel: str = ""
    direction: str = ""
    dtype: str = ""
    variant: dict[str, str] = field(default_factory=dict)
    bytes: int = 0
    flops: int = 0
    x_bytes: int = 0
    candidates: int = 0
    shape: str = ""
    quantizers: int = 0
    memory: dict[str, int] = field(default_factory=dict)
    skipped: str = ""
    failed: bool = False

    @property
    def met(self) -> bool | None:
        """None where there is no target, or nothing to hold it against."""
        if self.skipped or not self.target:
            return None
        reached = [self.value if name == "value" else self.ratios.get(name) for name in self.target]
        known = [(value, bound) for value, bound in zip(reached, self.target.values(), strict=True) if value is not None]
        return all(value <= bound for value, bound in known) if known else None

    def rate(self, work: int) -> float:
        """Bytes or flops per second."""
        return work / (self.value * 1e-3) if self.unit == "ms" and self.value else 0.0

    def as_dict(self, rates: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """For JSON, with the shares of the machine's rates."""
        derived: dict[str, Any] = {"met": self.met}
        if self.bytes and not self.skipped:
            derived["bytes_per_second"] = self.rate(self.bytes)
            if rates:
                derived["of_copy"] = self.rate(self.bytes) / rates["copy"]
        if self.flops and not self.skipped:
            derived["flops_per_second"] = self.rate(self.flops)
            if rates:
                derived["of_matmul"] = self.rate(self.flops) / rates["matmul"]
        return {**asdict(self), **derived}


def quantiles(seconds: list[float]) -> tuple[float, float] | None:
    """20 and 80 %."""
    if len(seconds) < 2:
        return None
    cuts = statistics.quantiles(seconds, n=5, method="inclusive")
    return cuts[0], cuts[3]


def timed(case: str, timings: Timings, target: dict[str, float] | None = None, memory: dict[str, int] | None = None, **facts: Any) -> Row:
    """A row of times. Of implementations with the same first part of the name the fastest is shown."""
    families: dict[str, list[str]] = {}
    for name in timings.rounds:
        families.setdefault(name.partition("-")[0], []).append(name)
    best = {family: timings.fastest(names) for family, names in families.items()}
    ours = best["qprune"]
    band = quantiles(timings.rounds[ours])
    ratios = {family: timings.ratio(ours, name) for family, name in best.items() if family != "qprune"}
    return Row(
        case,
        timings.median(ours) * 1e3,
        "ms",
        {**ratios, **{name: timings.ratio(ours, name) for names in families.values() for name in names if "-" in name and name != ours}},
        target or {},
        {name: timings.median(name) * 1e3 for name in timings.rounds},
        {name: min(seconds) * 1e3 for name, seconds in timings.rounds.items()},
        len(timings.rounds[ours]),
        None if band is None else (band[0] * 1e3, band[1] * 1e3),
        variant={family: best[family] for family, names in families.items() if len(names) > 1},
        memory=memory or {},
        **facts,
    )


def of_case(
    case: Case, direction: str, baselines: Collection[str], rounds: int, device: str, compiler: str = cases.INDUCTOR
) -> Iterator[Row]:
    """A row. Check every implementation that is asked for, then time them in turn. baselines: first parts of names."""
    facts: dict[str, Any] = {"kernel": case.kernel, "direction": direction, "dtype": str(case.dtype).removeprefix("torch.")}
    name = f"{case.name}, {DIRECTIONS[direction]}"
    if reason := case.missing():
        yield Row(name, 0.0, "", skipped=reason, **facts)
        return
    wanted = [n for n in case.implementations if n.partition("-")[0] in {"qprune", *baselines}]
    want = cases.reference(case, direction, device)
    calls: dict[str, Call] = {}
    for n in wanted:
        calls[n] = cases.call(case, n, direction, device, compiler)
        if n not in case.unchecked:
            cases.check(case, n, calls[n](), want)
    del want
    work: Work = case.work(direction)
    memory: dict[str, int] = {}
    if device == "cuda":
        memory = {n: peak_bytes(call) for n, call in calls.items()}
    elif direction != "forward":
        memory = {n: cases.kept(case, n, device) for n in wanted if not n.startswith("compile")}
    facts |= {"bytes": work.bytes, "flops": work.flops, "x_bytes": case.x_bytes, "candidates": len(getattr(case, "bits", ()))}
    if isinstance(case, Convolution):
        facts |= {"shape": str(case.shape), "quantizers": len(case.a_bits)}
    target = {"compile": 1.0} if case.kernel == "mix_quantize" and device == "cpu" else None
    yield timed(name, alternate(calls, rounds, device), target, memory, **facts)


def of_training(case: training.Case, baselines: Collection[str], rounds: int, device: str) -> Iterator[Row]:
    """The time of a training step, and what it keeps for its backward pass."""
    names = [name for name in ("float", "eager", "branches") if name in baselines]
    steps = {name: training.step(case, name, device=device) for name in (*names, "qprune")}
    for name in names:
        if name != "float":
            training.check(case.name, steps["qprune"], steps[name])
    target = {"float": 3.8} if case.joint else {"float": 1.35, "branches": 1 / 3}
    facts: dict[str, Any] = {"kernel": "training", "direction": "both", "dtype": "float32"}
    yield timed(case.name, alternate(steps, rounds, device), target if device == "cpu" else None, **facts)
    if not case.joint:
        kept = {name: kept_bytes(step.forward, step.model.parameters()) / 2**20 for name, step in steps.items()}
        yield bytes_row(f"{case.name}, kept for backward", kept, "MiB")


def bytes_row(case: str, kept: dict[str, float], unit: str, target: dict[str, float] | None = None) -> Row:
    ratios = {name: kept["qprune"] / value for name, value in kept.items() if name != "qprune"}
    return Row(case, kept["qprune"], unit, ratios, target or {}, kept, kept)


_LOAD = "import json, time; from qprune.kernels import cpu; t = time.perf_counter(); cpu.load(); print(json.dumps(time.perf_counter() - t))"


def _load_seconds(cache: str) -> float:
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": cache, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", _LOAD], env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    seconds: float = json.loads(result.stdout)
    return seconds


def of_first_use() -> Iterator[Row]:
    """Compiling and loading the C++ kernels; nothing where they were compiled when the package was installed."""
    if (Path(cpu.__file__).parent / build.library_name()).is_file():
        return
    with tempfile.TemporaryDirectory() as cache:
        first, second = _load_seconds(cache), _load_seconds(cache)
    yield Row("C++ kernels, first use", first, "s", target={"value": 60.0})
    yield Row("C++ kernels, later processes", second, "s", target={"value": 0.1})

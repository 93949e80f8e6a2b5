"""Filters that choose their own bits, resnet20 at 3x32x32: evaluated densely, filter by filter, and several configurations together.

    python -m benchmarks.filterwise                        # table
    python -m benchmarks.filterwise --json new.json --rounds 20
    python -m benchmarks.filterwise --batch 8 --rounds 3 --network resnet8      # anywhere, in seconds

Cases: "eval" (forward in eval mode without gradients), "step" (forward, backward and SGD with momentum), and "stack" (the logits of S
configurations of one batch, and of a quarter of it). Implementations: `float` (the network without quantizers), `qprune` (one dense
convolution per layer), `per-filter` (784 convolutions of one filter, as the original computes them), and for "stack" `together` (as many
configurations per pass as suit the batch) and `passes` (one after the other). Candidates 2/2, 2/4, 3/3 and 8/8 (weight/activation bits)
with NICE quantizers; each with parameters of its own, as in the original, and in rows "shared" with one weight for all. Before anything is
timed, the results are compared in float64.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from qprune import SearchSpace, prepare, set_gates
from qprune.nn.filterwise import FilterConv2d
from qprune.nn.stacked import stacked_logits
from qprune.prepare import calibrate
from qprune.tasks import models

from . import machine
from .measure import DEVICE, Function, Timings, WrongResultError, alternate
from .perfilter import per_filter

PAIRS = ((2, 2), (2, 4), (3, 3), (8, 8))
TARGET = 10.0
"""How many times faster than filter by filter the evaluation of a batch of 64 is to be."""


@dataclass(frozen=True)
class Setup:
    network: str = "resnet20"
    batch: int = 64
    configurations: int = 8
    rounds: int = 10
    device: str = DEVICE


@dataclass(frozen=True)
class Row:
    """seconds: median over the rounds, per implementation; ratio: of `baseline`'s time to qprune's, median over the rounds."""

    case: str
    seconds: dict[str, float]
    baseline: str
    ratio: float


@dataclass(frozen=True)
class Networks:
    floating: nn.Module
    dense: nn.Module
    each: nn.Module
    batch: tuple[Tensor, Tensor]
    choices: dict[str, Tensor]


def networks(setup: Setup, shared: bool) -> Networks:
    """The same network float, with units, and filter by filter; all with the same weights, clips and drawn choices."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(setup.batch, 3, 32, 32, generator=random).contiguous(memory_format=torch.channels_last)
    y = torch.randint(10, (setup.batch,), generator=random)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        floating = models.get(setup.network)()
    space = SearchSpace(
        pairs=PAIRS, granularity="filter", placement="output", weight_quantizer="nice", input_quantizer="nice", shared_weights=shared
    )
    dense = calibrate(prepare(floating, space, example_inputs=x[:2]), [x])
    set_gates(dense, "fixed")
    units = {name: unit for name, unit in dense.named_modules() if isinstance(unit, FilterConv2d)}
    sizes = {name: (setup.configurations, unit.out_channels) for name, unit in units.items()}
    choices = {name: torch.randint(len(unit.candidates), sizes[name], generator=random) for name, unit in units.items()}
    for name, unit in units.items():
        unit.gate.choice.copy_(choices[name][0])  # type: ignore[operator, union-attr]
    each = per_filter(dense)
    layout: Any = {"memory_format": torch.channels_last}
    floating, dense, each = (model.to(setup.device).to(**layout) for model in (floating, dense, each))
    return Networks(floating, dense, each, (x.to(setup.device), y.to(setup.device)), choices)


def check(nets: Networks) -> None:
    """Raise WrongResultError unless dense, per-filter and stacked evaluation agree, in float64, where no rounding flips a value."""
    dense, each, x = copy.deepcopy(nets.dense).double().eval(), copy.deepcopy(nets.each).double().eval(), nets.batch[0][:4].double()
    with torch.no_grad():
        expected, got = each(x), dense(x)
        stacked = stacked_logits(dense, nets.choices, x, "running")[0]
    for name, value in (("dense", got), ("stacked", stacked)):
        error = float((value - expected).abs().max())
        if not error < 1e-6:
            raise WrongResultError(f"{name} evaluation differs from the per-filter one by {error:.2g}")


def evaluation(model: nn.Module, x: Tensor) -> Function:
    model = copy.deepcopy(model).eval()

    def run() -> Tensor:
        with torch.no_grad():
            return model(x)  # type: ignore[no-any-return]

    return run


def step(model: nn.Module, x: Tensor, y: Tensor) -> Function:
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def run() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return run


def stacks(nets: Networks, x: Tensor) -> dict[str, Function]:
    return {
        "together": lambda: stacked_logits(nets.dense, nets.choices, x),
        "passes": lambda: stacked_logits(nets.dense, nets.choices, x, together=1),
    }


def rows(setup: Setup, shared: bool) -> list[Row]:
    nets = networks(setup, shared)
    check(nets)
    x, y = nets.batch
    models_of = {"float": nets.floating, "qprune": nets.dense, "per-filter": nets.each}
    s = setup.configurations
    label = "shared" if shared else "own"
    cases: list[tuple[str, dict[str, Function], str, str]] = [
        (f"eval, {label}", {name: evaluation(model, x) for name, model in models_of.items()}, "qprune", "per-filter"),
        (f"step, {label}", {name: step(model, x, y) for name, model in models_of.items()}, "qprune", "per-filter"),
        *((f"stack of {s}, batch {len(part)}, {label}", stacks(nets, part), "together", "passes") for part in (x, x[: len(x) // 4])),
    ]
    return [_row(name, alternate(functions, setup.rounds, setup.device), ours, baseline) for name, functions, ours, baseline in cases]


def _row(name: str, timings: Timings, ours: str, baseline: str) -> Row:
    return Row(name, {key: timings.median(key) for key in timings.rounds}, baseline, timings.ratio(baseline, ours))


def table(found: Sequence[Row]) -> Table:
    shown = Table("case", "ms", "times as fast as", title="filters that choose their own bits")
    for row in found:
        times = ", ".join(f"{name} {seconds * 1e3:.1f}" for name, seconds in row.seconds.items())
        shown.add_row(row.case, times, f"{row.ratio:.2f} x {row.baseline}")
    return shown


def main(arguments: Sequence[str] | None = None, tell: Callable[[Any], None] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.filterwise", description="Dense, per-filter and stacked evaluation.")
    defaults = Setup()
    for name, kind in (("network", str), ("batch", int), ("configurations", int), ("rounds", int), ("device", str)):
        parser.add_argument(f"--{name}", type=kind, default=getattr(defaults, name))
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", type=Path, default=None)
    options = vars(parser.parse_args(arguments))
    path, threads = options.pop("json"), options.pop("threads")
    if threads is not None:
        torch.set_num_threads(threads)
    setup = Setup(**options)
    try:
        found = [row for shared in (False, True) for row in rows(setup, shared)]
    except WrongResultError as error:
        (tell or Console().print)(str(error))
        return 1
    (tell or Console().print)(table(found))
    if path is not None:
        data = {"setup": asdict(setup), "machine": machine.describe(setup.device), "rows": [asdict(row) for row in found]}
        path.write_text(json.dumps(data, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""The projections of ANNC onto a budget of bits, on the weights of resnet50: which weights are kept, codebooks of all widths, widths.

    python -m benchmarks.annc                          # table
    python -m benchmarks.annc --json new.json --rounds 5
    python -m benchmarks.annc --network resnet18 --rounds 1

Cases: "keep" (`keep_weights` against a stable sort of all scores), "codebooks" (8 widths of every layer: k-means from optimal clusters of
1024 groups, against Lloyd's iterations from linspace(min, max), the original's start), "plan" (widths of all layers, exact against greedy).
Weights are normal with a standard deviation of their own per filter, as heavy-tailed as trained ones. The second table has squared errors:
of the start from linspace, relative to ours, summed over layers; and ours above the least possible, on 4000 values. Before "keep" is timed,
the kept weights are compared with the sort's.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from qprune.clustering import GROUPS, Array, Values, kmeans, lloyd
from qprune.codebooks import WIDTHS, ZERO, codebooks
from qprune.search.bitplan import plan_bits
from qprune.search.sparsity import keep_weights

from . import machine, networks
from .measure import DEVICE, Timings, WrongResultError, alternate

SAMPLE = 4000


@dataclass(frozen=True)
class Setup:
    network: str = "resnet50"
    rounds: int = 3
    share: float = 0.1
    device: str = DEVICE


@dataclass(frozen=True)
class Row:
    """seconds: median over the rounds, per implementation."""

    case: str
    seconds: dict[str, float]


@dataclass(frozen=True)
class Errors:
    """Of one width: the squared error from linspace over ours, and ours over the least possible, less 1."""

    bits: int
    linspace: float
    excess: float


def layers(setup: Setup) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    found = {}
    with torch.device("meta"):
        model = getattr(networks, setup.network)()
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            weight = torch.randn(module.weight.shape, generator=random)
            scale = 0.02 * torch.randn(len(weight), generator=random).mul(0.7).exp()
            found[name] = (weight * scale.view(-1, *[1] * (weight.dim() - 1))).to(setup.device)
    return found


def keep_by_sorting(weights: dict[str, Tensor], bits: dict[str, int], budget: int) -> dict[str, Tensor]:
    scores = torch.cat([weight.flatten().square() / bits[name] for name, weight in weights.items()])
    costs = torch.cat([torch.full((weight.numel(),), bits[name], device=weight.device) for name, weight in weights.items()])
    order = scores.sort(descending=True, stable=True).indices
    mask = torch.zeros_like(costs, dtype=torch.bool)
    mask[order[costs[order].cumsum(0) <= budget]] = True
    parts = mask.split([weight.numel() for weight in weights.values()])
    return {name: part.view(weight.shape) for (name, weight), part in zip(weights.items(), parts, strict=True)}


def from_linspace(values: Values, bits: int) -> Array:
    ends = values.values[[0, -1]]
    return lloyd(values, np.linspace(ends[0], ends[1], 2**bits, dtype=np.float32), 100, 1e-3)


def sorted_values(weight: Tensor) -> Values:
    flat = weight.flatten()
    return Values.ascending(np.sort(flat[flat.abs() >= ZERO].cpu().numpy()))


def linspace_errors(weights: dict[str, Tensor]) -> dict[str, dict[int, float]]:
    found = {}
    for name, weight in weights.items():
        values = sorted_values(weight)
        found[name] = {bits: values.error(from_linspace(values, bits)) for bits in WIDTHS}
    return found


def errors(weights: dict[str, Tensor]) -> tuple[list[Errors], dict[str, dict[int, float]]]:
    """One row per width, and the errors of every layer."""
    ours = {name: {bits: book.error for bits, book in of.items()} for name, of in codebooks(weights).items()}
    theirs = linspace_errors(weights)
    every = torch.cat([weight.flatten() for weight in weights.values()])
    values, sizes = sorted_values(every[:: max(1, len(every) // SAMPLE)][:SAMPLE]), [2**bits for bits in WIDTHS]
    least, found = kmeans(values, sizes, groups=SAMPLE), kmeans(values, sizes, groups=GROUPS)
    total = {bits: sum(of[bits] for of in theirs.values()) / sum(of[bits] for of in ours.values()) for bits in WIDTHS}
    return [Errors(bits, total[bits], values.error(found[2**bits]) / values.error(least[2**bits]) - 1) for bits in WIDTHS], ours


def rows(setup: Setup, weights: dict[str, Tensor], table: dict[str, dict[int, float]]) -> list[Row]:
    bits = {name: 3 + i % 4 for i, name in enumerate(weights)}
    budget = int(setup.share * 4 * sum(weight.numel() for weight in weights.values()))
    kept = keep_weights(weights, bits, budget, at_least=0)
    for name, mask in keep_by_sorting(weights, bits, budget).items():
        if not torch.equal(mask, kept.masks[name]):
            raise WrongResultError(f"layer {name}: the kept weights differ from those of the sorted order")
    cases: dict[str, dict[str, Callable[[], Any]]] = {
        "keep": {
            "qprune": lambda: keep_weights(weights, bits, budget, at_least=0),
            "sort": lambda: keep_by_sorting(weights, bits, budget),
        },
        "codebooks": {"qprune": lambda: codebooks(weights), "linspace": lambda: linspace_errors(weights)},
        "plan": {
            "greedy": lambda: plan_bits(table, kept.nnz, budget),
            "exact": lambda: plan_bits(table, kept.nnz, budget, method="exact"),
        },
    }
    return [_row(case, alternate(functions, setup.rounds, setup.device)) for case, functions in cases.items()]


def _row(case: str, timings: Timings) -> Row:
    return Row(case, {name: timings.median(name) for name in timings.rounds})


def main(arguments: Sequence[str] | None = None, tell: Callable[[Any], None] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.annc", description="Projections onto a budget of bits.")
    defaults = Setup()
    for name, kind in (("network", str), ("rounds", int), ("share", float), ("device", str)):
        parser.add_argument(f"--{name}", type=kind, default=getattr(defaults, name))
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", type=Path, default=None)
    options = vars(parser.parse_args(arguments))
    path, threads = options.pop("json"), options.pop("threads")
    if threads is not None:
        torch.set_num_threads(threads)
    setup = Setup(**options)
    weights = layers(setup)
    found, table = errors(weights)
    try:
        timed = rows(setup, weights, table)
    except WrongResultError as error:
        (tell or Console().print)(str(error))
        return 1
    times = Table("case", "seconds", title=f"{setup.network}, {sum(w.numel() for w in weights.values()) / 1e6:.1f} million weights")
    for row in timed:
        times.add_row(row.case, ", ".join(f"{name} {seconds:.3g}" for name, seconds in row.seconds.items()))
    widths = Table("bits", "from linspace / ours", "ours above the least", title="squared error of the codebooks")
    for of in found:
        widths.add_row(str(of.bits), f"{of.linspace:.2f}", f"{of.excess:.2%}")
    for shown in (times, widths):
        (tell or Console().print)(shown)
    if path is not None:
        data = {"setup": asdict(setup), "machine": machine.describe(setup.device), "rows": [asdict(row) for row in timed]}
        path.write_text(json.dumps({**data, "errors": [asdict(of) for of in found]}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

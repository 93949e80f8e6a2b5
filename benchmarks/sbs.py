"""A training step of single-path bit sharing against the same search written as usual, and against multi-path search.

    python -m benchmarks.sbs                        # table
    python -m benchmarks.sbs --json new.json --rounds 20
    python -m benchmarks.sbs --batch 8 --rounds 3 --network resnet8      # anywhere, in seconds

A step is forward, backward and SGD with momentum, task loss only. Implementations: `float` (the network without quantizers), `qprune`
(one pass that mixes, one pass per threshold that measures a residual, one convolution), `recompute` (the same, with inputs mixed again in
the backward pass), `residuals` (gated residuals in PyTorch operations, as 2101.04935 writes them, one convolution), and `paths` (a
quantizer per candidate and a convolution per pair of candidates, summed with the gates' coefficients: multi-path search). Candidates 2, 4
and 8 bits for weights and inputs of every layer but the first and the last, some gates closed. Before anything is timed, the results are
compared in float64. Kept: bytes that autograd keeps for the backward pass.
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

from qprune import SearchSpace, prepare
from qprune.cost import geometry_of
from qprune.nn.bitgates import nested_mixture, opened
from qprune.nn.nested import NestedConv2d, nest
from qprune.tasks import models

from . import machine
from .baselines import add_up
from .measure import DEVICE, Function, WrongResultError, alternate, kept_bytes

BITS = (2, 4, 8)


@dataclass(frozen=True)
class Setup:
    network: str = "resnet20"
    batch: int = 64
    rounds: int = 10
    device: str = DEVICE


@dataclass(frozen=True)
class Row:
    """seconds: median over the rounds; ratio: of it to that of qprune, median over the rounds; kept: bytes."""

    implementation: str
    seconds: float
    ratio: float
    kept: int


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def grid(z: Tensor, bits: int) -> Tensor:
    n = 2**bits - 1
    rounded: Tensor = _Round.apply(z * n)
    return rounded / n


class EagerNestedConv2d(nn.Module):
    """The candidates, weights and thresholds of a NestedConv2d, evaluated as "residuals" or as "paths"."""

    def __init__(self, nested: NestedConv2d, style: str) -> None:
        super().__init__()
        self.style = style
        self.window: Any = (nested.stride, nested.padding, nested.dilation, nested.groups)
        self.weight = nn.Parameter(nested.weight.detach().clone())
        clips = nested.weight_quantizer.log_clip, nested.input_quantizer.get_parameter("log_clip")
        self.weight_clip, self.input_clip = (nn.Parameter(clip.detach().exp().view(())) for clip in clips)
        thresholds = nested.weight_gate.bits.thresholds, nested.input_gate.thresholds
        self.weight_thresholds, self.input_thresholds = (nn.Parameter(t.detach().clone()) for t in thresholds)

    def forward(self, x: Tensor) -> Tensor:
        deviation, mean = torch.std_mean(self.weight.detach())
        z_w = (((self.weight - mean) / deviation / self.weight_clip).clamp(-1, 1) + 1) / 2
        z_x = (x / self.input_clip).clamp(0, 1)
        scale = deviation * self.weight_clip
        if self.style == "residuals":
            weight, inputs = residuals(z_w, self.weight_thresholds), residuals(z_x, self.input_thresholds)
            return F.conv2d(self.input_clip * inputs, scale * (2 * weight - 1), None, *self.window)
        p, q = (coefficients(z, t) for z, t in ((z_w, self.weight_thresholds), (z_x, self.input_thresholds)))
        weights = [scale * (2 * grid(z_w, b) - 1) for b in BITS]
        inputs_of = [self.input_clip * grid(z_x, b) for b in BITS]
        return add_up([p[i] * q[j] * F.conv2d(a, w, None, *self.window) for i, w in enumerate(weights) for j, a in enumerate(inputs_of)])


def residuals(z: Tensor, thresholds: Tensor) -> Tensor:
    """The nested sum of gated residuals."""
    total, gate = grid(z, BITS[0]), torch.ones((), dtype=z.dtype, device=z.device)
    for bits, threshold in zip(BITS[1:], thresholds.unbind(), strict=True):
        gate = gate * opened((z - total).abs().mean(), threshold)
        total = total + gate * grid(z - total, bits)
    return total


def coefficients(z: Tensor, thresholds: Tensor) -> Tensor:
    """p of the same gates."""
    gates: list[Tensor] = []
    current = grid(z, BITS[0])
    for k, threshold in enumerate(thresholds.unbind()):
        gates.append(opened((z - current).abs().mean(), threshold))
        reached = torch.stack(gates).prod().detach()
        current = current + reached * (grid(z, BITS[k + 1]) - current)
    return nested_mixture(torch.stack(gates))


def eager_network(nested: nn.Module, style: str) -> nn.Module:
    """A copy in which every NestedConv2d is eager."""
    model = copy.deepcopy(nested)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, NestedConv2d):
                setattr(parent, name, EagerNestedConv2d(child, style))
    return model


def networks(setup: Setup) -> tuple[dict[str, nn.Module], tuple[Tensor, Tensor]]:
    """The implementations, with the same weights, clips and thresholds, and a batch."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(setup.batch, 3, 32, 32, generator=random).contiguous(memory_format=torch.channels_last)
    y = torch.randint(10, (setup.batch,), generator=random)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        floating = models.get(setup.network)()
    edge = SearchSpace.fixed(8, 8)
    ours = prepare(floating, SearchSpace(BITS, BITS), {"conv1": edge, "fc": edge}, x[:2])
    nest(ours, geometry_of(ours))
    for number, layer in enumerate(module for module in ours.modules() if isinstance(module, NestedConv2d)):
        with torch.no_grad():  # a third of the gates closed, one after the other
            layer.weight_gate.bits.thresholds[number % 2] = float(number % 3 == 0)
            layer.input_gate.thresholds[number % 2] = float(number % 3 == 1)
    again = copy.deepcopy(ours)
    for module in again.modules():
        if isinstance(module, NestedConv2d):
            module.recompute = True
    found = {
        "float": floating,
        "qprune": ours,
        "recompute": again,
        **{style: eager_network(ours, style) for style in ("residuals", "paths")},
    }
    layout: Any = {"memory_format": torch.channels_last}
    return {name: model.to(setup.device).to(**layout) for name, model in found.items()}, (x.to(setup.device), y.to(setup.device))


def check(models_of: dict[str, nn.Module], x: Tensor) -> None:
    """Raise WrongResultError unless the implementations agree in float64."""
    found = {}
    for name in ("qprune", "recompute", "residuals", "paths"):
        with torch.no_grad():
            found[name] = copy.deepcopy(models_of[name]).double().train()(x[:4].double())
    for name in ("recompute", "residuals", "paths"):
        error = float((found[name] - found["qprune"]).abs().max())
        if not error < 1e-5:
            raise WrongResultError(f"{name} differ from qprune by {error:.2g}")


def step(model: nn.Module, x: Tensor, y: Tensor) -> Function:
    optimizer = torch.optim.SGD(model.train().parameters(), lr=1e-5, momentum=0.9)

    def run() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return run


def rows(setup: Setup) -> list[Row]:
    models_of, (x, y) = networks(setup)
    check(models_of, x)
    kept = {name: kept_bytes(lambda m=model: m(x), list(model.parameters())) for name, model in models_of.items()}  # type: ignore[misc]
    timings = alternate({name: step(model, x, y) for name, model in models_of.items()}, setup.rounds, setup.device)
    return [Row(name, timings.median(name), timings.ratio(name, "qprune"), kept[name]) for name in models_of]


def table(found: Sequence[Row]) -> Table:
    shown = Table("implementation", "ms", "x qprune", "MB kept", title="a training step with nested candidates")
    for row in found:
        shown.add_row(row.implementation, f"{row.seconds * 1e3:.1f}", f"{row.ratio:.2f}", f"{row.kept / 1e6:.1f}")
    return shown


def main(arguments: Sequence[str] | None = None, tell: Callable[[Any], None] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sbs", description="Single-path bit sharing and multi-path search.")
    defaults = Setup()
    for name, kind in (("network", str), ("batch", int), ("rounds", int), ("device", str)):
        parser.add_argument(f"--{name}", type=kind, default=getattr(defaults, name))
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", type=Path, default=None)
    options = vars(parser.parse_args(arguments))
    path, threads = options.pop("json"), options.pop("threads")
    if threads is not None:
        torch.set_num_threads(threads)
    setup = Setup(**options)
    try:
        found = rows(setup)
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

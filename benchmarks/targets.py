"""What the kernels must reach on an H200, each a ratio within one run: bounds, predictions, and what a file of results says."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import predict, shapes, steps
from .predict import Gpu

LARGE = 64 << 20
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Target:
    """bound: at least, or at most, this; `predicted` from the model, `measured` from the rows of a file (None where they lack it)."""

    what: str
    bound: float
    at_least: bool
    percent: bool
    predicted: Callable[[Gpu], float]
    measured: Callable[[Rows], float | None]

    def show(self, value: float | None) -> str:
        if value is None:
            return "not measured"
        return f"{value:.0%}" if self.percent else f"{value:.2f}x"

    def met(self, value: float | None) -> str:
        if value is None:
            return "not measured"
        return "met" if (value >= self.bound if self.at_least else value <= self.bound) else "missed"

    @property
    def goal(self) -> str:
        return ("at least " if self.at_least else "at most ") + (f"{self.bound:.0%}" if self.percent else f"{self.bound:g}x")


def _bandwidth(direction: str) -> Callable[[Rows], float | None]:
    """The lowest share of the copy bandwidth among large activations."""

    def find(rows: Rows) -> float | None:
        shares = [
            row["of_copy"]
            for row in rows
            if row.get("kernel") == "mix_quantize" and row.get("direction") == direction and row.get("of_copy") and row["x_bytes"] >= LARGE
        ]
        return min(shares, default=None)

    return find


def _speedup(
    kernel: str, direction: str, baselines: Sequence[str], where: Callable[[Mapping[str, Any]], bool]
) -> Callable[[Rows], float | None]:
    """Median over cases of the best baseline's time over qprune's."""

    def find(rows: Rows) -> float | None:
        found = []
        for row in rows:
            ratios = [row.get("ratios", {}).get(name) for name in baselines]
            known = [1 / ratio for ratio in ratios if ratio]
            if row.get("kernel") == kernel and row.get("direction") == direction and known and where(row):
                found.append(min(known))
        return statistics.median(found) if found else None

    return find


def _step(
    form: str, quantity: str, baselines: Sequence[str], inverse: bool = False, names: Sequence[str] = ("search", "graph", "qprune")
) -> Callable[[Rows], float | None]:
    """A whole search step of a form, or if that was not measured our training step, over the smallest baseline (form/implementation)."""

    def find(rows: Rows) -> float | None:
        values = {f"{row['form']}/{row['implementation']}": row.get(quantity) for row in rows if row.get("kernel") == "imagenet_step"}
        ours = next((value for name in names if (value := values.get(f"{form}/{name}"))), None)
        base = min((value for name in baselines if (value := values.get(name))), default=None)
        if ours is None or base is None:
            return None
        return base / ours if inverse else ours / base

    return find


def _share(direction: str) -> Callable[[Gpu], float]:
    def share(gpu: Gpu) -> float:
        elements = 256 * 64 * 56 * 56
        moved = elements * {"forward": 4, "backward": 6}[direction]
        return moved / gpu.copy / predict.seconds(predict.mix(elements, 5, passes=direction), gpu)

    return share


def _compiled(gpu: Gpu) -> float:
    elements = 256 * 64 * 56 * 56
    return steps.compiled_backward(elements, 5, gpu) / predict.seconds(predict.mix(elements, 5, passes="backward"), gpu)


def _weights(gpu: Gpu) -> float:
    all_weights = shapes.weights("resnet50")
    one, each = (predict.seconds(predict.weights(all_weights, 4, together=together), gpu) for together in (True, False))
    return each / one


def _joint(gpu: Gpu) -> float:
    ratios = []
    for shape in (s for name in ("resnet18", "resnet50") for s in shapes.convolutions(name, 256)[1:]):
        ours = min(predict.joint_library(shape, 3, gpu).both, predict.joint_fused(shape, 3, gpu).both)
        ratios.append(min(steps.collapsed(shape, 3, gpu), steps.collapsed(shape, 3, gpu, compiled=True)) / ours)
    return statistics.median(ratios)


_PLAIN = ("float/eager", "float/graph")
TARGETS = (
    Target("mix_quantize forward, 64 MB and more, share of the copy bandwidth", 0.9, True, True, _share("forward"), _bandwidth("forward")),
    Target("mix_quantize backward, the same", 0.85, True, True, _share("backward"), _bandwidth("backward")),
    Target(
        "activation backward, K = 5, against torch.compile of the reference", 2.0, True, False,
        _compiled,
        _speedup("mix_quantize", "backward", ("compile-reference",), lambda row: row.get("candidates") == 5 and row["x_bytes"] >= LARGE),
    ),
    Target(
        "weight mixing of ResNet-50, forward + backward, against torch.compile per layer", 5.0, True, False,
        _weights, _speedup("multi", "both", ("compile",), lambda row: "resnet50" in row["case"]),
    ),
    Target(
        "joint convolution, M = 3, against the best of eager and torch.compile, median of ResNet-18/50 shapes", 1.5, True, False,
        _joint, _speedup("mixed_conv2d", "both", ("eager", "compile"), lambda row: True),
    ),
    Target(
        "search step of ResNet-18, shared form, against the plain bf16 step", 1.15, False, False,
        lambda gpu: steps.search("shared", gpu=gpu) / steps.plain(gpu=gpu), _step("shared", "ms", _PLAIN),
    ),
    Target(
        "sampled form, choices drawn outside", 1.25, False, False,
        lambda gpu: steps.search("chosen", gpu=gpu) / steps.plain(gpu=gpu), _step("chosen", "ms", _PLAIN),
    ),
    Target(
        "sampled form, straight-through gates", 1.25, False, False,
        lambda gpu: steps.search("sampled", gpu=gpu) / steps.plain(gpu=gpu), _step("sampled", "ms", _PLAIN),
    ),
    Target(
        "joint form, M = 3", 3.0, False, False,
        lambda gpu: steps.search("joint", gpu=gpu) / steps.plain(gpu=gpu), _step("joint", "ms", _PLAIN),
    ),
    Target(
        "shared form against the eager sum over branches, 12 pairs", 8.0, True, False,
        lambda gpu: steps.search("branches", gpu=gpu) / steps.search("shared", gpu=gpu),
        _step("shared", "ms", ("shared/branches",), inverse=True),
    ),
    Target(
        "peak memory of the shared search step against the plain step, inputs mixed again in the backward pass", 1.05, False, False,
        lambda gpu: steps.kept(mixed=False) / steps.kept(), _step("shared", "peak_bytes", ("float/eager",), names=("lean",)),
    ),
    Target(
        "time of that step against the plain step", 1.15, False, False,
        lambda gpu: steps.search("shared", gpu=gpu, recompute=True) / steps.plain(gpu=gpu), _step("shared", "ms", _PLAIN, names=("lean",)),
    ),
)  # fmt: skip

"""Which route a mixed convolution takes: decided by shape, unless it is forced.

    "library"   quantized inputs are written side by side, one library convolution consumes them
    "fused"     one kernel quantizes while it convolves

Where a shape was measured the faster route is taken. Elsewhere a bound on taps x output channels decides: the library route moves about ten
bytes more for each quantized number, the fused one spends about 0.4 of 6 · taps · outputs flops more on it, at a lower rate of the matrix
units. The bound agrees with the full model (`python -m benchmarks.roofline --routes`) on 122 of 135 shapes and numbers of quantizers of
ResNet-18, ResNet-50 and MobileNetV2; `python -m benchmarks.report --routes` prints what was measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType

from torch import Tensor

from . import dispatch
from .errors import InputError

ROUTES = ("library", "fused")
BOUND = 448
"""Largest taps x output channels for which the fused route is expected to win: a prediction for an H200, not a measurement."""
MEASURED: dict[tuple[int, int, int, int], str] = {}
"""(taps, input and output channels per group, quantizers) → the faster route on a GPU. None has been measured yet."""

_forced: str | None = None


@dataclass(frozen=True)
class Shape:
    """What the choice depends on: taps of the kernel, input and output channels per group, activation quantizers, and whether every filter
    uses only one of these."""

    taps: int
    inputs: int
    outputs: int
    quantizers: int
    sampled: bool = False


def check(route: str | None) -> None:
    """Raise InputError unless route is one of ROUTES or None."""
    if route is not None and route not in ROUTES:
        raise InputError(f"route: expected one of {', '.join(ROUTES)}, got {route!r}")


class forced:
    """Send every joint or depthwise convolution one way: `with forced("library"): …`; None gives the choice back to the table."""

    def __init__(self, route: str | None) -> None:
        global _forced
        check(route)
        self.previous = _forced
        _forced = route

    def __enter__(self) -> forced:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        global _forced
        _forced = self.previous


def by_table(shape: Shape) -> str:
    """The faster route on a GPU, as far as is known."""
    if shape.quantizers == 1:
        return "library"
    if shape.sampled:
        return "fused"
    key = (shape.taps, shape.inputs, shape.outputs, shape.quantizers)
    return MEASURED.get(key) or ("fused" if shape.taps * shape.outputs <= BOUND else "library")


def joint(shape: Shape, x: Tensor) -> str:
    """The route for a joint convolution of x. Without a fused kernel for x's device it is "library"."""
    if _forced is not None:
        return _forced
    return by_table(shape) if x.is_cuda and dispatch.select(x, "conv") is not None else "library"


def depthwise(x: Tensor) -> bool:
    """Whether a depthwise convolution of x runs as one kernel with its mixtures, instead of mixtures and a library convolution."""
    if _forced is not None:
        return _forced == "fused"
    return x.is_cuda and dispatch.select(x, "depthwise") is not None

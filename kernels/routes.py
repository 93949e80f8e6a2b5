"""Which route a mixed convolution takes: decided by shape, from a table, unless it is forced.

    "library"   quantized inputs are written side by side, one library convolution consumes them
    "fused"     one kernel quantizes while it convolves

The table is a prediction from bytes, flops and issue slots (`python -m benchmarks.roofline --routes`), not yet a measurement.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType

from torch import Tensor

from . import dispatch
from .errors import InputError

ROUTES = ("library", "fused")
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
    """Send every joint or depthwise convolution one way, whatever its shape: `with forced("library"): …`; None gives the choice back to the table."""

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
    if shape.sampled:
        return "fused" if shape.quantizers > 1 else "library"
    return "fused" if shape.taps == 1 and shape.quantizers > 1 else "library"


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

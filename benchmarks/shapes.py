"""The shapes that are measured: every convolution of a named network, found by running it, or a shape that a user wrote down."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from qprune.errors import InputError
from qprune.geometry import run_observed
from qprune.tasks.models import resnet8, resnet20

from . import networks

NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet18": (networks.resnet18, 224),
    "resnet50": (networks.resnet50, 224),
    "mobilenetv2": (networks.mobilenetv2, 224),
    "resnet20": (resnet20, 32),
    "resnet8": (resnet8, 32),
}
"""Name → network and the height and width of its images."""


@dataclass(frozen=True)
class ConvShape:
    """A convolution: x [batch, channels, height, width], weight [filters, channels / groups, *kernel], zero padding.

    name, count  the layer it was first seen in, and how many layers of the network have this shape
    """

    batch: int
    channels: int
    height: int
    width: int
    filters: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    name: str = ""
    count: int = 1

    @property
    def out(self) -> tuple[int, int]:
        sizes = zip((self.height, self.width), self.kernel, self.stride, self.padding, self.dilation, strict=True)
        h, w = ((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in sizes)
        return h, w

    @property
    def taps(self) -> int:
        return math.prod(self.kernel)

    @property
    def rows(self) -> int:
        """Output positions: rows of the implicit matrix product."""
        return self.batch * math.prod(self.out)

    @property
    def x_elements(self) -> int:
        return self.batch * self.channels * self.height * self.width

    @property
    def y_elements(self) -> int:
        return self.rows * self.filters

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.filters, self.channels // self.groups, *self.kernel)

    @property
    def flops(self) -> int:
        """Of one pass: two for each multiplication."""
        return 2 * self.rows * math.prod(self.weight_shape)

    @property
    def depthwise(self) -> bool:
        return self.groups == self.channels == self.filters and self.groups > 1

    def __str__(self) -> str:
        text = f"{self.batch}x{self.channels}x{self.height}x{self.width}:{self.filters}x{self.kernel[0]}x{self.kernel[1]}/{self.stride[0]}"
        return text + (f"g{self.groups}" if self.groups > 1 else "")


@functools.cache
def _traced(name: str) -> tuple[tuple[ConvShape, ...], tuple[tuple[int, ...], ...]]:
    """The convolutions of a network for one image, in order of use, and the shapes of all its weights. Runs on no device."""
    factory, side = NETWORKS[name]
    with torch.device("meta"):
        net = factory()
    found: list[ConvShape] = []
    weights: list[tuple[int, ...]] = []

    def record(layer_name: str, layer: nn.Module, x: Tensor, y: Tensor) -> None:
        weight = layer.get_parameter("weight")
        weights.append(tuple(weight.shape))
        if isinstance(layer, nn.Conv2d):
            k, s, d = (tuple(value) for value in (layer.kernel_size, layer.stride, layer.dilation))
            p = tuple(int(value) for value in layer.padding)
            _, c, h, w = x.shape
            found.append(ConvShape(1, c, h, w, weight.size(0), k, s, p, d, layer.groups, layer_name))  # type: ignore[arg-type]

    run_observed(net, [torch.empty(1, 3, side, side, device="meta")], record)
    return tuple(found), tuple(weights)


def check_network(name: str) -> str:
    if name not in NETWORKS:
        raise InputError(f"--shapes: expected one of {', '.join(NETWORKS)}, or a shape like 256x64x56x56:64x3x3/1, got {name!r}")
    return name


def convolutions(name: str, batch: int, distinct: bool = True) -> list[ConvShape]:
    """Every convolution of a network, or every distinct shape once, with how often it occurs."""
    layers = [replace(layer, batch=batch) for layer in _traced(check_network(name))[0]]
    if not distinct:
        return layers
    first: dict[ConvShape, ConvShape] = {}
    for layer in layers:
        key = replace(layer, name="", count=1)
        first[key] = replace(first[key], count=first[key].count + 1) if key in first else layer
    return list(first.values())


def weights(name: str) -> tuple[tuple[int, ...], ...]:
    """The shapes of a network's weights, convolutions and linear layers, in order of use."""
    return _traced(check_network(name))[1]


_TENSOR = re.compile(r"\d+(x\d+)+")
_CONV = re.compile(r"(?P<x>\d+x\d+x\d+x\d+):(?P<filters>\d+)x(?P<kh>\d+)x(?P<kw>\d+)(/(?P<stride>\d+))?(g(?P<groups>\d+))?")


def tensor(text: str) -> tuple[int, ...]:
    """256x64x56x56, or 512x4608."""
    shape = tuple(int(n) for n in text.split("x")) if _TENSOR.fullmatch(text) else ()
    if len(shape) not in (2, 4) or 0 in shape:
        raise InputError(f"--shapes: expected a network ({', '.join(NETWORKS)}), NxCxHxW or FxR, got {text!r}")
    return shape


def convolution(text: str) -> ConvShape:
    """256x64x56x56:64x3x3/1 is a 3x3 convolution to 64 filters with stride 1; g64 at the end makes 64 groups. Padding keeps the size."""
    match = _CONV.fullmatch(text)
    if match is None:
        expected = f"a network ({', '.join(NETWORKS)}) or NxCxHxW:FxKHxKW/STRIDE[gGROUPS]"
        raise InputError(f"--shapes: expected {expected} for a convolution, got {text!r}")
    n, c, h, w = (int(v) for v in match["x"].split("x"))
    filters, kernel = int(match["filters"]), (int(match["kh"]), int(match["kw"]))
    stride, groups = int(match["stride"] or 1), int(match["groups"] or 1)
    if 0 in (n, c, h, w, filters, *kernel, stride, groups) or c % groups or filters % groups:
        raise InputError(f"--shapes: expected positive numbers, and channels and filters that the groups divide, got {text!r}")
    shape = ConvShape(n, c, h, w, filters, kernel, (stride, stride), (kernel[0] // 2, kernel[1] // 2), (1, 1), groups)
    if min(shape.out) < 1:
        raise InputError(f"--shapes: expected an input that the kernel fits into, got {text!r}")
    return shape

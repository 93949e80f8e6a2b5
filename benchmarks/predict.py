"""How long an operation should take on a GPU, from its bytes, its flops and its instructions: a model, nothing here is measured.

A kernel takes as long as the slowest of three things that overlap: moving its bytes at the bandwidth of a copy, its dot products at the
rate of a matrix product, and its other arithmetic at the rate of instructions. Each launch adds a constant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .shapes import ConvShape

FORWARD_SLOTS, BACKWARD_SLOTS = 5.5, 12.5
"""Instructions per element and candidate of mix_quantize, as compiled (`python -m qprune.kernels.aot`)."""
CODE_SLOTS = 3.5
"""Instructions that turn one element into one candidate's code inside a convolution."""
BLOCK_FILTERS = 128
"""Filters of one program of the fused convolution: x is quantized again for every such block, and for every tap of the kernel."""


@dataclass(frozen=True)
class Gpu:
    """What a prediction depends on; the first three are those of an H200, to be replaced by measured ones.

    copy     bytes per second, read and written, of a large copy
    matmul   flops per second of a large bf16 matrix product
    slots    fp32 instructions per second: processors x 128 x clock
    launch   seconds that a launch costs when kernels follow one another
    library  share of `matmul` that a library convolution reaches
    fused    share of the library's rate that a Triton convolution reaches
    """

    name: str = "H200"
    copy: float = 4.3e12
    matmul: float = 780e12
    slots: float = 33.4e12
    launch: float = 3e-6
    library: float = 0.65
    fused: float = 0.7


H200 = Gpu()


@dataclass(frozen=True)
class Pass:
    """One kernel, or several with the work added up."""

    bytes: float = 0.0
    flops: float = 0.0
    slots: float = 0.0
    launches: int = 1

    def seconds(self, gpu: Gpu, efficiency: float = 1.0) -> float:
        return self.launches * gpu.launch + max(self.bytes / gpu.copy, self.flops / (gpu.matmul * efficiency), self.slots / gpu.slots)


def mix(elements: int, candidates: int, outputs: int = 1, read: int = 2, write: int = 2, passes: str = "both") -> list[Pass]:
    """mix_quantize of `elements` numbers of `read` bytes into `outputs` tensors of `write` bytes; backward is a kernel and its small second
    stage."""
    forward = Pass(elements * (read + outputs * write), slots=FORWARD_SLOTS * candidates * elements)
    backward = Pass(elements * (2 * read + outputs * write), slots=BACKWARD_SLOTS * candidates * elements, launches=2)
    return {"forward": [forward], "backward": [backward], "both": [forward, backward]}[passes]


def weights(shapes: Sequence[Sequence[int]], candidates: int, outputs: int = 1, write: int = 2, together: bool = True) -> list[Pass]:
    """Mixing all weights of a network, float32 in: one launch in each pass, or one for every layer."""
    elements, launches = sum(math.prod(shape) for shape in shapes), 1 if together else len(shapes)
    forward = Pass(elements * (4 + outputs * write), slots=FORWARD_SLOTS * candidates * elements, launches=launches)
    backward = Pass(elements * (8 + outputs * write), slots=BACKWARD_SLOTS * candidates * elements, launches=launches)
    return [forward, backward]


def seconds(passes: Sequence[Pass], gpu: Gpu = H200) -> float:
    """Of kernels that run one after the other."""
    return sum(p.seconds(gpu) for p in passes)


def _weight_bytes(shape: ConvShape, m: int, item: int) -> int:
    return math.prod(shape.weight_shape) * m * item


def library(shape: ConvShape, gpu: Gpu = H200, m: int = 1, item: int = 2, first: bool = False) -> tuple[float, float]:
    """Seconds of the forward and backward pass of a library convolution over m times the input channels. first: no gradient for x."""
    x, y, w = shape.x_elements * item * m, shape.y_elements * item, _weight_bytes(shape, m, item)
    one = Pass(x + y + w, shape.flops * m).seconds(gpu, gpu.library)
    return one, one if first else 2 * one


@dataclass(frozen=True)
class Route:
    """Seconds of the forward and of the backward pass."""

    forward: float
    backward: float

    @property
    def both(self) -> float:
        return self.forward + self.backward


def joint_library(shape: ConvShape, m: int, gpu: Gpu = H200, item: int = 2) -> Route:
    """One pass writes the m quantized inputs side by side and one library convolution consumes them."""
    quantize = mix(shape.x_elements, m, m, item, item)
    forward, backward = library(shape, gpu, m, item)
    return Route(quantize[0].seconds(gpu) + forward, backward + quantize[1].seconds(gpu))


def joint_fused(
    shape: ConvShape, m: int, gpu: Gpu = H200, item: int = 2, used: int | None = None, weight_groups: int | None = None
) -> Route:
    """The convolution quantizes x while it reads it, in all three passes; no quantized input is written.

    used           quantizers that a filter multiplies with: m, or 1 where each filter has chosen (blocks hold filters that chose alike)
    weight_groups  for how many the weight's gradient is computed: as many as used, or all m for straight-through gates
    """
    used = m if used is None else used
    groups = used if weight_groups is None else weight_groups
    x, y = shape.x_elements * item, shape.y_elements * item
    rate = gpu.library * gpu.fused
    blocks = math.ceil(shape.filters / shape.groups / BLOCK_FILTERS)
    quantized = shape.rows * shape.channels * shape.taps * max(blocks, m if used < m else 1)
    w = _weight_bytes(shape, m, item)
    forward = Pass(x + y + w, shape.flops * used, CODE_SLOTS * quantized * used)
    to_input = Pass(2 * x + y + w, shape.flops * used, BACKWARD_SLOTS * m * shape.x_elements, launches=2)
    to_weight = Pass(x + y + w, shape.flops * groups, CODE_SLOTS * quantized * groups, launches=2)
    return Route(forward.seconds(gpu, rate), to_input.seconds(gpu, rate) + to_weight.seconds(gpu, rate))


def joint_route(shape: ConvShape, m: int, gpu: Gpu = H200, item: int = 2) -> str:
    """ "library" or "fused": which is predicted to be faster over a forward and a backward pass."""
    return "fused" if joint_fused(shape, m, gpu, item).both < joint_library(shape, m, gpu, item).both else "library"


def sampled(shape: ConvShape, m: int, gpu: Gpu = H200, item: int = 2, all_groups: bool = False) -> Route:
    """Every filter has chosen one quantizer, and is computed once."""
    return joint_fused(shape, m, gpu, item, used=1, weight_groups=m if all_groups else 1)


def shared(shape: ConvShape, candidates: int, gpu: Gpu = H200, item: int = 2) -> Route:
    """The input mixed in one pass, then an ordinary convolution."""
    quantize = mix(shape.x_elements, candidates, 1, item, item)
    forward, backward = library(shape, gpu, 1, item)
    return Route(quantize[0].seconds(gpu) + forward, backward + quantize[1].seconds(gpu))


def depthwise(shape: ConvShape, candidates: int, gpu: Gpu = H200, item: int = 2) -> Route:
    """The fused depthwise convolution: no dot products, each element is quantized for every tap it is read by."""
    x, y = shape.x_elements * item, shape.y_elements * item
    taps = shape.y_elements * shape.taps
    forward = Pass(x + y, slots=taps * (1 + FORWARD_SLOTS * candidates))
    to_input = Pass(2 * x + y, slots=taps + BACKWARD_SLOTS * candidates * shape.x_elements, launches=2)
    to_weight = Pass(x + y, slots=taps * (1 + FORWARD_SLOTS * candidates), launches=2)
    return Route(forward.seconds(gpu), to_input.seconds(gpu) + to_weight.seconds(gpu))


def int8(shape: ConvShape, gpu: Gpu = H200, item: int = 2) -> float:
    """The convolution on integer codes: 1x1 in one kernel, others after a pass that writes the codes; int8 dots have twice bf16's rate."""
    x, y, w = shape.x_elements, shape.y_elements * item, _weight_bytes(shape, 1, 1)
    rate = 2 * gpu.library * gpu.fused
    blocks = math.ceil(shape.filters / shape.groups / BLOCK_FILTERS)
    if shape.taps == 1:
        return Pass(x * item + y + w, shape.flops, CODE_SLOTS * shape.rows * shape.channels * blocks).seconds(gpu, rate)
    return Pass(x * (item + 1), slots=CODE_SLOTS * x).seconds(gpu) + Pass(x + y + w, shape.flops).seconds(gpu, rate)

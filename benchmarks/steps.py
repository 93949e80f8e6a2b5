"""Predicted training steps: a plain one, and searches in their three forms, with bf16 activations and float32 weights. A model of bytes,
flops and instructions (see predict.py); nothing here is measured."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import networks, predict, shapes
from .predict import H200, Gpu, Pass, Route
from .shapes import ConvShape

ITEM = 2
W_BITS, A_BITS = 4, 3
"""Candidates of the search that the targets are about: 4 weight widths, 3 activation widths."""


@dataclass(frozen=True)
class Elementwise:
    """What a network does besides its convolutions, per image: elements of outputs, by kind, and the number of such layers."""

    norm: int
    relu: int
    residual: int
    layers: int


@functools.cache
def elementwise(name: str) -> Elementwise:
    factory, side = shapes.NETWORKS[name]
    with torch.device("meta"):
        net = factory().eval()
    kinds: dict[str, type | tuple[type, ...]] = {
        "norm": nn.BatchNorm2d,
        "relu": (nn.ReLU, nn.ReLU6),
        "residual": (networks.Residual, networks.InvertedResidual),
    }
    totals, layers = dict.fromkeys(kinds, 0), 0

    def hook(kind: str) -> object:
        def add(module: nn.Module, inputs: object, output: Tensor) -> None:
            nonlocal layers
            if kind != "residual" or getattr(module, "residual", True):
                totals[kind] += output.numel()
                layers += 1

        return add

    for module in net.modules():
        for kind, classes in kinds.items():
            if isinstance(module, classes):
                module.register_forward_hook(hook(kind))  # type: ignore[arg-type]
    with torch.no_grad():
        net(torch.empty(1, 3, side, side, device="meta"))
    return Elementwise(**totals, layers=layers)


def _around(name: str, batch: int) -> list[Pass]:
    """Normalisation, ReLU, residual additions, optimizer.

    Batch norm reads its input twice and writes once; backward it reads input and gradient twice and writes once. ReLU moves 2 and 3
    tensors, an addition 3, and 3 more where gradients meet. SGD with momentum moves 20 bytes a weight.
    """
    e = elementwise(name)
    moved = ITEM * batch * ((3 + 5) * e.norm + (2 + 3) * e.relu + (3 + 3) * e.residual)
    parameters = sum(map(math.prod, shapes.weights(name)))
    return [Pass(moved, launches=3 * e.layers), Pass(20 * parameters)]


def _cast_weights(name: str) -> Pass:
    """autocast: float32 weights to bf16 and gradients back, layer by layer."""
    all_weights = shapes.weights(name)
    return Pass(12 * sum(map(math.prod, all_weights)), launches=2 * len(all_weights))


def _layers(name: str, batch: int) -> tuple[ConvShape, list[ConvShape]]:
    """The first convolution, which stays as it is, and the others."""
    first, *others = shapes.convolutions(name, batch, distinct=False)
    return first, others


def plain(name: str = "resnet18", batch: int = 256, gpu: Gpu = H200) -> float:
    """Seconds of a step without quantizers."""
    first, others = _layers(name, batch)
    convolutions = sum(predict.library(first, gpu, first=True)) + sum(sum(predict.library(s, gpu)) for s in others)
    return convolutions + predict.seconds([*_around(name, batch), _cast_weights(name)], gpu)


def search(form: str, name: str = "resnet18", batch: int = 256, gpu: Gpu = H200, recompute: bool = False) -> float:
    """Seconds of a search step: "shared", "sampled", "chosen" or "joint", each convolution by its faster route; "branches" is the eager sum
    of a convolution for every pair. "sampled" gates are straight-through: they need the weight's gradient for every activation quantizer,
    not only for the one that was drawn, as "chosen" has it. recompute: mix the shared form's inputs once more in the backward pass."""
    first, others = _layers(name, batch)
    total = sum(predict.library(first, gpu, first=True)) + predict.seconds(_around(name, batch), gpu)
    if form == "branches":
        return total + sum(branches(shape, W_BITS, A_BITS, gpu) for shape in others)
    outputs = 1 if form == "shared" else A_BITS
    candidates = W_BITS if form == "shared" else W_BITS * A_BITS
    total += predict.seconds(predict.weights(shapes.weights(name), candidates, outputs), gpu)
    if recompute:
        total += sum(predict.seconds(predict.mix(shape.x_elements, A_BITS, passes="forward"), gpu) for shape in others)
    return total + sum(_mixed(form, shape, gpu).both for shape in others)


def _mixed(form: str, shape: ConvShape, gpu: Gpu) -> Route:
    if form == "shared":
        return predict.shared(shape, A_BITS, gpu)
    routes = [predict.joint_library(shape, A_BITS, gpu), predict.joint_fused(shape, A_BITS, gpu)]
    if form in ("sampled", "chosen"):
        routes[1] = predict.sampled(shape, A_BITS, gpu, all_groups=form == "sampled")
    return min(routes, key=lambda route: route.both)


def _eager_inputs(shape: ConvShape, m: int) -> Pass:
    """m quantizers as separate operations: divide, clamp, round, multiply and their gradients."""
    return Pass(m * shape.x_elements * ITEM * 20, launches=12 * m)


def branches(shape: ConvShape, w: int, a: int, gpu: Gpu = H200) -> float:
    """Forward and backward of Σ_{w,a} p · conv(A_a(x), Q_w(W)), one operation after the other. The products with p and their sum are
    float32: 18 bytes an element forward, 16 backward."""
    pairs = w * a
    convolutions = pairs * sum(predict.library(shape, gpu))
    return convolutions + predict.seconds([_eager_inputs(shape, a), Pass(34 * pairs * shape.y_elements, launches=6 * pairs)], gpu)


def collapsed(shape: ConvShape, m: int, gpu: Gpu = H200, compiled: bool = False) -> float:
    """Forward and backward of Σ_m conv(A_m(x), V_m): m convolutions.

    The quantizers are separate operations, or, compiled, one kernel forward; backward masks go through memory, and each of the m sums reads
    what it needs again.
    """
    convolutions = m * sum(predict.library(shape, gpu))
    sums = Pass((m - 1) * 3 * shape.y_elements * ITEM, launches=m - 1)
    quantizers = Pass(m * shape.x_elements * (4 + 10), launches=1 + 2 * m) if compiled else _eager_inputs(shape, m)
    return convolutions + predict.seconds([sums, quantizers], gpu)


def kept(name: str = "resnet18", batch: int = 256, mixed: bool = False) -> float:
    """Bytes of activations kept for the backward pass: inputs of normalisations and outputs of ReLUs, which are the inputs of convolutions.
    mixed: and the mixed inputs of the convolutions, as in a search that writes them."""
    e, (_, others) = elementwise(name), _layers(name, batch)
    return ITEM * (batch * (e.norm + e.relu) + (sum(shape.x_elements for shape in others) if mixed else 0))


def compiled_backward(elements: int, candidates: int, gpu: Gpu = H200) -> float:
    """The backward pass of an activation's mixture as torch.compile writes it: one mask for each candidate goes to memory and comes back, x
    and the gradient are read twice, and every sum has a kernel to finish it."""
    return Pass(elements * (2 * 3 * ITEM + candidates * 1.6), launches=2 + 2 * candidates).seconds(gpu)

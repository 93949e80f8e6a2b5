"""The weights of a whole network mixed in one operation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qprune import kernels

from . import baselines, shapes
from .cases import Case, Function, Work, channels_last, compiled, random, weight_grids


@dataclass(frozen=True)
class Many(Case):
    """All weights of a network in float32, mixed with p and range per filter, results in `dtype`."""

    network: str
    bits: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    kernel = "multi"
    implementations = ("eager", "layers", "compile", "reference", "qprune")
    labels = ("weights", "range", "p")

    @property
    def name(self) -> str:
        return f"{len(self.weights)} weights of {self.network}, K={len(self.bits)}"

    @property
    def weights(self) -> tuple[tuple[int, ...], ...]:
        return shapes.weights(self.network)

    @property
    def rows(self) -> list[int]:
        return [shape[0] for shape in self.weights]

    def tensors(self, device: str) -> tuple[Tensor, ...]:
        xs = [channels_last(random(shape, device, i)) for i, shape in enumerate(self.weights)]
        size = (sum(self.rows), len(self.bits))
        return *xs, 1.0 + 2.0 * random(size, device, 1).sigmoid(), random(size, device, 2).softmax(-1)

    def implementation(self, name: str, compiler: str) -> Function:
        steps, zero_point = weight_grids(self.bits)
        k, rows = len(self.bits), self.rows

        def one(x: Tensor, range: Tensor, p: Tensor) -> Tensor:
            return baselines.mix_quantize(x, range, p, steps, zero_point, 0).to(self.dtype)

        def each(functions: Sequence[Function]) -> Function:
            def run(*leaves: Tensor) -> list[Tensor]:
                *xs, range, p = leaves
                parts = zip(functions, xs, range.split(rows), p.split(rows), strict=True)
                return [function(x, r, q) for function, x, r, q in parts]

            return run

        def layer(x: Tensor, range: Tensor, p: Tensor) -> Tensor:
            return kernels.mix_quantize(x, torch.zeros_like(range), range, p, steps, zero_point, 0, [0] * k, [0] * k, None)

        def together(*leaves: Tensor) -> list[Tensor]:
            *xs, range, p = leaves
            return kernels.mix_quantize_many(xs, torch.zeros_like(range), range, p, steps, zero_point, [0] * k, [0] * k)

        if name == "compile":
            by_shape = {shape: compiled(one, compiler) for shape in set(self.weights)}
            return each([by_shape[shape] for shape in self.weights])
        return {"eager": each([one] * len(rows)), "layers": each([layer] * len(rows)), "reference": together, "qprune": together}[name]

    def work(self, direction: str) -> Work:
        elements = sum(map(math.prod, self.weights))
        forward, backward = 4 + self.item, 4 + self.item + 4
        return Work(elements * {"forward": forward, "backward": backward, "both": forward + backward}[direction])

    def smaller(self) -> Many:
        return Many("resnet8", self.bits, self.dtype)

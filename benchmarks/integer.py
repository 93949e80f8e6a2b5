"""The convolution on integer codes, for layers whose bits are settled: forward only."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import baselines
from .cases import Function, Work, compiled, input_grids, weight_grids
from .convolution import Convolution


@dataclass(frozen=True)
class Integer(Convolution):
    """y = conv(A(x), Q(W)) with the first activation width, and the weight widths dealt to the filters in turn. The weight is quantized
    beforehand, for every implementation."""

    kernel = "int8"
    implementations = ("eager", "compile", "cudnn", "reference", "qprune")
    labels = ("x", "weight", "a_range", "w_range")
    directions = ("forward",)

    @property
    def name(self) -> str:
        return f"int8 {self.shape}, {self.a_bits[0]}-bit input"

    def tensors(self, device: str) -> tuple[Tensor, ...]:
        return self.operands(device)

    def missing(self) -> str:
        return "" if importlib.util.find_spec("qprune.kernels.int8_ops") else "quant_conv2d_int8 is missing"

    def implementation(self, name: str, compiler: str) -> Function:
        from qprune.kernels.int8_ops import quant_conv2d_int8
        from qprune.kernels.reference_int8 import weight_codes

        (n,), (z,) = input_grids(self.a_bits[:1])
        prepared: list[tuple[Tensor, ...]] = []

        def codes(weight: Tensor, w_range: Tensor) -> tuple[Tensor, ...]:
            if not prepared:
                filters = torch.arange(self.shape.filters, device=weight.device) % len(self.w_bits)
                steps, zero = (torch.tensor(values, device=weight.device)[filters] for values in weight_grids(self.w_bits))
                r = w_range.gather(1, filters.unsqueeze(1)).squeeze(1)
                found = weight_codes(weight, r, steps, zero)
                prepared.append((*found, (found[0] * found[2].view(-1, 1, 1, 1)).to(self.dtype)))
            return prepared[0]

        def convolve(x: Tensor, a_range: Tensor, weight: Tensor) -> Tensor:
            return self.plain(baselines.quantize(x, a_range[:1].view(1, 1, 1, 1) / n, n, z).to(x.dtype), weight)

        quantized: Function = compiled(convolve, compiler) if name == "compile" else convolve

        def floating(x: Tensor, weight: Tensor, a_range: Tensor, w_range: Tensor) -> Tensor:
            out: Tensor = quantized(x, a_range, codes(weight, w_range)[3])
            return out

        def ours(x: Tensor, weight: Tensor, a_range: Tensor, w_range: Tensor) -> Tensor:
            integers = codes(weight, w_range)[:3]
            r = a_range[:1]
            return quant_conv2d_int8(x, *integers, None, torch.zeros_like(r), r, n, *self.window, self.shape.groups)

        if name == "cudnn":
            return lambda x, weight, *_: self.plain(x, weight.to(x.dtype))
        return {"eager": floating, "compile": floating, "reference": ours, "qprune": ours}[name]

    def work(self, direction: str) -> Work:
        work = super().work("forward")
        return Work(work.bytes - 3 * work.flops // (2 * self.shape.rows), work.flops)

    def smaller(self) -> Integer:
        return replace(
            self, shape=replace(self.shape, batch=2, height=8, width=8, channels=8 * self.shape.groups, filters=8 * self.shape.groups)
        )

"""The mixed convolutions: joint candidates, and the depthwise one."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from qprune import kernels

from . import baselines
from .cases import Case, Function, Work, channels_last, compiled, input_grids, random, weight_grids
from .shapes import ConvShape


@dataclass(frozen=True)
class Convolution(Case):
    """What the three kinds of convolution share: a shape, candidate bits, and float operands."""

    shape: ConvShape
    w_bits: tuple[int, ...] = (2, 3, 4, 8)
    a_bits: tuple[int, ...] = (2, 4, 8)
    dtype: torch.dtype = torch.float32

    @property
    def window(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        return self.shape.stride, self.shape.padding, self.shape.dilation

    def plain(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, None, *self.window, self.shape.groups)

    def operands(self, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x, weight, ranges of the activation [M], and of the weight [F, K]."""
        s = self.shape
        x = channels_last(random((s.batch, s.channels, s.height, s.width), device).relu().to(self.dtype))
        weight = channels_last(random(s.weight_shape, device, 1) * (2 / (s.weight_shape[1] * s.taps)) ** 0.5)
        wide = weight.detach().abs().amax((1, 2, 3)).unsqueeze(1)
        ranges = wide * (1.0 + random((s.filters, len(self.w_bits)), device, 2).sigmoid())
        return x, weight, 1.0 + 2.0 * random((len(self.a_bits),), device, 3).sigmoid(), ranges

    def work(self, direction: str) -> Work:
        s = self.shape
        size = (s.x_elements + s.y_elements) * self.item
        weight = s.flops // (2 * s.rows) * 4
        forward = Work(size + weight, s.flops * self.convolutions)
        backward = Work(size + s.x_elements * self.item + 2 * weight, 2 * s.flops * self.convolutions)
        return {"forward": forward, "backward": backward, "both": forward + backward}[direction]

    @property
    def convolutions(self) -> int:
        return 1


@dataclass(frozen=True)
class Joint(Convolution):
    """y = Σ_{w,a} p[f, w, a] · conv(A_a(x), Q_w(W[f])), from x, the float weight and p.

    qprune-library writes the quantized inputs side by side for one library convolution, qprune-fused quantizes inside the convolution.
    """

    kernel = "mixed_conv2d"
    implementations = ("eager", "branches", "compile", "cudnn", "reference", "qprune-library", "qprune-fused")
    labels = ("x", "weight", "a_range", "w_range", "p")

    @property
    def name(self) -> str:
        return f"conv {self.shape}, {len(self.w_bits)}x{len(self.a_bits)} joint"

    @property
    def convolutions(self) -> int:
        return len(self.a_bits)

    def tensors(self, device: str) -> tuple[Tensor, ...]:
        pairs = len(self.w_bits) * len(self.a_bits)
        return *self.operands(device), random((self.shape.filters, pairs), device, 4).softmax(-1)

    def implementation(self, name: str, compiler: str) -> Function:
        if name == "compile":
            return compiled(self._eager, compiler)
        plain: Function = lambda x, weight, *_: self.plain(x, weight)  # noqa: E731
        return {"eager": self._eager, "branches": self._branches, "cudnn": plain, "qprune-library": self._library}.get(name, self._fused)

    def _columns(self, p: Tensor) -> Tensor:
        return p.unflatten(-1, (len(self.w_bits), len(self.a_bits)))

    def _inputs(self, x: Tensor, a_range: Tensor) -> list[Tensor]:
        return [baselines.quantize(x, r / n, n, z).to(x.dtype) for r, n, z in zip(a_range.unbind(), *input_grids(self.a_bits), strict=True)]

    def _eager(self, x: Tensor, weight: Tensor, a_range: Tensor, w_range: Tensor, p: Tensor) -> Tensor:
        grid = weight_grids(self.w_bits)
        mixed = [baselines.mix_quantize(weight, w_range, column, *grid, 0) for column in self._columns(p).unbind(-1)]
        return baselines.add_up([self.plain(a, w) for a, w in zip(self._inputs(x, a_range), mixed, strict=True)])

    def _branches(self, x: Tensor, weight: Tensor, a_range: Tensor, w_range: Tensor, p: Tensor) -> Tensor:
        n, z = weight_grids(self.w_bits)
        steps = [(r / steps).view(-1, 1, 1, 1) for r, steps in zip(w_range.unbind(-1), n, strict=True)]
        weights = [baselines.quantize(weight, *grid) for grid in zip(steps, n, z, strict=True)]
        p = self._columns(p).to(self.dtype)
        inputs = self._inputs(x, a_range)
        return baselines.add_up(
            [p[:, i, j].view(1, -1, 1, 1) * self.plain(a, w) for j, a in enumerate(inputs) for i, w in enumerate(weights)]
        )

    def _weight(self, weight: Tensor, w_range: Tensor, p: Tensor) -> Tensor:
        """V_1 … V_M side by side along dimension 1."""
        m, k = len(self.a_bits), len(self.w_bits)
        ranges = w_range.repeat_interleave(m, dim=1)
        steps, zero_point = ([v for v in values for _ in range(m)] for values in weight_grids(self.w_bits))
        groups = list(range(m)) * k
        return kernels.mix_quantize(weight, torch.zeros_like(ranges), ranges, p, steps, zero_point, 0, groups, [0] * k * m, None)

    def _library(self, x: Tensor, weight: Tensor, a_range: Tensor, w_range: Tensor, p: Tensor) -> Tensor:
        m, groups, row = len(self.a_bits), self.shape.groups, a_range.unsqueeze(0)
        grid = input_grids(self.a_bits)
        inputs = kernels.mix_quantize(x, torch.zeros_like(row), row, torch.ones_like(row), *grid, 1, list(range(m)), [0] * m, None)
        if groups > 1:
            inputs = inputs.unflatten(1, (m, groups, -1)).transpose(1, 2).flatten(1, 3)
        return self.plain(inputs, self._weight(weight, w_range, p))

    def _fused(self, x: Tensor, weight: Tensor, a_range: Tensor, w_range: Tensor, p: Tensor) -> Tensor:
        mixed, grid = self._weight(weight, w_range, p), input_grids(self.a_bits)
        return kernels.mixed_conv2d(x, mixed, torch.zeros_like(a_range), a_range, *grid, None, True, *self.window, self.shape.groups)

    def smaller(self) -> Joint:
        s = self.shape
        return replace(self, shape=replace(s, batch=2, height=8, width=8, channels=8 * s.groups, filters=8 * s.groups))


@dataclass(frozen=True)
class Depthwise(Convolution):
    """y[:, c] = conv(Σ_a r_a A_a(x), Σ_w p[c, w] Q_w(W[c]))."""

    kernel = "depthwise"
    implementations = ("eager", "compile", "cudnn", "reference", "qprune")
    labels = ("x", "weight", "a_range", "w_range", "a_p", "w_p")

    @property
    def name(self) -> str:
        return f"depthwise {self.shape}, {len(self.w_bits)}x{len(self.a_bits)}"

    def tensors(self, device: str) -> tuple[Tensor, ...]:
        a_p, w_p = random((len(self.a_bits),), device, 4), random((self.shape.filters, len(self.w_bits)), device, 5)
        return *self.operands(device), a_p.softmax(-1), w_p.softmax(-1)

    def missing(self) -> str:
        return "" if importlib.util.find_spec("qprune.kernels.depthwise_ops") else "mixed_depthwise is missing"

    def implementation(self, name: str, compiler: str) -> Function:
        a_grid, w_grid = input_grids(self.a_bits), weight_grids(self.w_bits)

        def eager(x: Tensor, weight: Tensor, a_range: Tensor, w_range: Tensor, a_p: Tensor, w_p: Tensor) -> Tensor:
            mixed = baselines.mix_quantize(x, a_range, a_p, *a_grid, 1).to(x.dtype)
            return self.plain(mixed, baselines.mix_quantize(weight, w_range, w_p, *w_grid, 0))

        def ours(x: Tensor, weight: Tensor, a_range: Tensor, w_range: Tensor, a_p: Tensor, w_p: Tensor) -> Tensor:
            from qprune.kernels.depthwise_ops import mixed_depthwise

            activation: Sequence[object] = (torch.zeros_like(a_range), a_range, a_p, *a_grid, [0] * len(self.a_bits))
            k = len(self.w_bits)
            mixing: Sequence[object] = (torch.zeros_like(w_range), w_range, w_p, *w_grid, [0] * k, [0] * k)
            return mixed_depthwise(x, weight, *activation, *mixing, *self.window)  # type: ignore[arg-type]

        if name == "cudnn":
            return lambda x, weight, *_: self.plain(x, weight)
        if name == "compile":
            return compiled(eager, compiler)
        return {"eager": eager, "reference": ours, "qprune": ours}[name]

    def smaller(self) -> Depthwise:
        return replace(self, shape=replace(self.shape, batch=2, height=8, width=8, channels=8, filters=8, groups=8))

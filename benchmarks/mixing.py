"""mix_quantize alone, on an activation or on one weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qprune import functional
from qprune.kernels import reference

from . import baselines
from .cases import Case, Function, Work, channels_last, compiled, input_grids, random, weight_grids


@dataclass(frozen=True)
class Mixing(Case):
    """x [N, C, H, W] with one row of parameters (an activation), or [F, R] with a row for each of F filters (a weight)."""

    shape: tuple[int, ...]
    bits: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    kernel = "mix_quantize"
    implementations = ("eager", "reference", "compile-eager", "compile-reference", "qprune")
    labels = ("x", "range", "p")

    @property
    def weight(self) -> bool:
        return len(self.shape) == 2

    @property
    def axis(self) -> int:
        return 0 if self.weight else 1

    @property
    def name(self) -> str:
        return f"{'weight' if self.weight else 'input'} {'x'.join(map(str, self.shape))}, K={len(self.bits)}"

    @property
    def grids(self) -> tuple[list[float], list[float]]:
        return weight_grids(self.bits) if self.weight else input_grids(self.bits)

    def tensors(self, device: str) -> tuple[Tensor, ...]:
        x = random(self.shape, device)
        x = channels_last(x if self.weight else x.relu()).to(self.dtype)
        rows = (self.shape[0], len(self.bits)) if self.weight else (len(self.bits),)
        range = 1.0 + 2.0 * random(rows, device, 1).sigmoid()
        return x, range, random(rows, device, 2).softmax(-1)

    def implementation(self, name: str, compiler: str) -> Function:
        steps, zero_point = self.grids

        def eager(x: Tensor, range: Tensor, p: Tensor) -> Tensor:
            return baselines.mix_quantize(x, range, p, steps, zero_point, self.axis).to(self.dtype)

        def fused(x: Tensor, range: Tensor, p: Tensor) -> Tensor:
            return functional.mix_quantize(x, torch.zeros_like(range), range, p, steps, zero_point, axis=self.axis)

        if name == "compile-reference":
            return _compiled_reference(self, compiler)
        if name == "compile-eager":
            return compiled(eager, compiler)
        return {"eager": eager, "reference": fused, "qprune": fused}[name]

    def work(self, direction: str) -> Work:
        return Work(self.x_bytes * {"forward": 2, "backward": 3, "both": 5}[direction])

    @property
    def x_bytes(self) -> int:
        return math.prod(self.shape) * self.item

    def smaller(self) -> Mixing:
        return replace(self, shape=(4, *self.shape[1:]))

    def compare(self, what: str, got: Tensor, want: Tensor) -> str:
        """One element in a thousand may land on the neighbouring code."""
        close = {torch.float32: 1e-4, torch.float16: 5e-3}.get(self.dtype, 3e-2)
        error = (got - want).abs() / want.square().mean().sqrt()
        dense = what in ("result", "dx")
        agrees = float((error > close).double().mean()) <= 1e-3 if dense else float(error.max()) <= max(1e-2, close)
        return "" if agrees else f"{what} differs by up to {float(error.max()):.2g} of its root mean square"


CASES = (
    Mixing((512, 4608), (2, 3, 4, 6, 8)),
    Mixing((64, 16, 32, 32), (2, 4, 8)),
    Mixing((64, 64, 8, 8), (2, 4, 8)),
)


def _compiled_reference(case: Mixing, compiler: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The definition with its explicit backward, both compiled; only x and the parameters are kept in between."""
    k = len(case.bits)
    static: tuple[Any, ...] = (*case.grids, case.axis, [0] * k)

    def forward(x: Tensor, range: Tensor, p: Tensor) -> Tensor:
        return reference.mix_quantize(x, torch.zeros_like(range), range, p, *static, None)[0].to(x.dtype)

    def backward(grad: Tensor, x: Tensor, range: Tensor, p: Tensor) -> Sequence[Tensor]:
        dx, _, d_range, d_p = reference.mix_quantize_backward([grad], x, torch.zeros_like(range), range, p, *static, [0] * k, None)
        return dx.to(x.dtype), d_range, d_p

    compiled_forward, compiled_backward = compiled(forward, compiler), compiled(backward, compiler)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, range: Tensor, p: Tensor) -> Tensor:
            ctx.save_for_backward(x, range, p)
            out: Tensor = compiled_forward(x, range, p)
            return out

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            return compiled_backward(grad, *ctx.saved_tensors)

    def apply(x: Tensor, range: Tensor, p: Tensor) -> Tensor:
        out: Tensor = Function.apply(x, range.view(-1, k), p.view(-1, k))
        return out

    return apply

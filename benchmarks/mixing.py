"""mix_quantize alone: its cases, and one call of each implementation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qprune import functional
from qprune.kernels import backend, reference

from . import baselines
from .measure import WrongResultError, kept_bytes

IMPLEMENTATIONS = ("eager", "reference", "compile-eager", "compile-reference", "qprune")
INDUCTOR = "inductor"
Call = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """shape and memory format of x; steps and zero points of the K candidates; parameters per channel of dimension `axis`, or one row."""

    name: str
    shape: tuple[int, ...]
    steps: tuple[float, ...]
    zero_point: tuple[float, ...]
    axis: int
    per_channel: bool

    def tensors(self, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x, range, p, and the gradient of the result; float32, the same numbers every time."""
        g = torch.Generator().manual_seed(0)
        x = torch.randn(self.shape, generator=g)
        x = x.relu() if self.axis == 1 else x
        rows = (self.shape[self.axis], len(self.steps)) if self.per_channel else (len(self.steps),)
        range = 1.0 + 2.0 * torch.rand(rows, generator=g)
        p = torch.randn(rows, generator=g).softmax(-1)
        grad = torch.randn(self.shape, generator=g)
        if x.dim() == 4:
            x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
        return x.to(device), range.to(device), p.to(device), grad.to(device)


CASES = (
    Case("weight 512x4608, K=5", (512, 4608), (3, 7, 15, 63, 255), (2, 4, 8, 32, 128), 0, True),
    Case("input 64x16x32x32, K=3", (64, 16, 32, 32), (3, 15, 255), (0, 0, 0), 1, False),
    Case("input 64x64x8x8, K=3", (64, 64, 8, 8), (3, 15, 255), (0, 0, 0), 1, False),
)


def _compiled_reference(case: Case, compiler: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The definition with its explicit backward, both compiled; only x and the parameters are kept in between."""
    k = len(case.steps)
    static: tuple[Any, ...] = (case.steps, case.zero_point, case.axis, [0] * k)

    def forward(x: Tensor, range: Tensor, p: Tensor) -> Tensor:
        return reference.mix_quantize(x, torch.zeros_like(range), range, p, *static, None)[0]

    def backward(grad: Tensor, x: Tensor, range: Tensor, p: Tensor) -> Sequence[Tensor]:
        dx, _, d_range, d_p = reference.mix_quantize_backward([grad], x, torch.zeros_like(range), range, p, *static, [0] * k, None)
        return dx, d_range, d_p

    compiled_forward = torch.compile(forward, dynamic=False, backend=compiler)
    compiled_backward = torch.compile(backward, dynamic=False, backend=compiler)

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


def implementation(case: Case, name: str, compiler: str = INDUCTOR) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """(x, range, p) → Σ_k p_k Q_k(x)."""

    def eager(x: Tensor, range: Tensor, p: Tensor) -> Tensor:
        return baselines.mix_quantize(x, range, p, case.steps, case.zero_point, case.axis)

    def fused(x: Tensor, range: Tensor, p: Tensor) -> Tensor:
        offset = torch.zeros_like(range)
        return functional.mix_quantize(x, offset, range, p, case.steps, case.zero_point, axis=case.axis)

    def plain(x: Tensor, range: Tensor, p: Tensor) -> Tensor:
        with backend("reference"):
            return fused(x, range, p)

    if name == "compile-reference":
        return _compiled_reference(case, compiler)
    if name == "compile-eager":
        compiled: Callable[[Tensor, Tensor, Tensor], Tensor] = torch.compile(eager, dynamic=False, backend=compiler)
        return compiled
    return {"eager": eager, "reference": plain, "qprune": fused}[name]


def call(case: Case, name: str, backward: bool, device: str = "cpu", compiler: str = INDUCTOR) -> Call:
    """A function that runs the implementation once: the result without autograd, or result and gradients of x, range and p."""
    function, (x, range, p, grad) = implementation(case, name, compiler), case.tensors(device)
    leaves = tuple(t.requires_grad_(backward) for t in (x, range, p))

    def forward_only() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (function(*leaves),)

    def both() -> tuple[Tensor, ...]:
        with backend("reference" if name == "reference" else None):
            out = function(*leaves)
            return out, *torch.autograd.grad(out, leaves, grad)

    return both if backward else forward_only


def check(case: Case, name: str, run: Call, device: str = "cpu") -> None:
    """Raise WrongResultError unless `run` agrees with the definition. One element in a thousand may land on the neighbouring code."""
    got = run()
    want = call(case, "reference", backward=len(got) > 1, device=device)()
    for what, a, b in zip(("result", "dx", "drange", "dp"), got, want):
        a, b = a.detach().double().reshape(b.shape), b.detach().double()
        error = (a - b).abs() / b.square().mean().sqrt()
        dense = what in ("result", "dx")
        agrees = float((error > 1e-4).double().mean()) <= 1e-3 if dense else float(error.max()) <= 1e-2
        if not agrees:
            raise WrongResultError(f"{case.name}, {name}: {what} differs by up to {float(error.max()):.2g} of its root mean square")


def kept(case: Case, name: str, device: str = "cpu") -> float:
    """Bytes that the implementation keeps for its backward pass, without the parameters, as a multiple of x's."""
    function, (x, range, p, _) = implementation(case, name), case.tensors(device)
    leaves = [t.requires_grad_() for t in (x, range, p)]
    return kept_bytes(lambda: function(*leaves), [range, p]) / x.nbytes

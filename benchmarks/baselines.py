"""The mixed layer as it is usually written: PyTorch operations, rounding passed straight through, autograd for everything else.

Independent of qprune.kernels on purpose: same mathematics, other code. EdMIPS (CVPR 2020) and PLiNIO mix the weights and the inputs and
convolve once (`mixing`); DNAS (1812.00090) sums the outputs of one convolution per pair of candidates (`branches`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qprune.gates import Constant, Gate
from qprune.nn import MixedConv2d


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def quantize(x: Tensor, step: Tensor, n: float, z: float) -> Tensor:
    """LSQ (1902.08153) or, for z = 0, PACT (1805.06085): step · round(clamp(x / step, −z, n − z))."""
    rounded: Tensor = _Round.apply(torch.clamp(x / step, -z, n - z))
    return rounded * step


def mix_quantize(x: Tensor, range: Tensor, p: Tensor, steps: Sequence[float], zero_point: Sequence[float], axis: int) -> Tensor:
    """Σ_k p_k Q_k(x), one candidate after the other. range, p [K] or [C, K], C along dimension `axis` of x."""
    shape = [-1 if i == axis else 1 for i, _ in enumerate(x.shape)]
    out: Tensor | None = None
    for r_k, p_k, n, z in zip(range.unbind(-1), p.unbind(-1), steps, zero_point, strict=True):
        term = p_k.view(shape) * quantize(x, (r_k / n).view(shape), n, z)
        out = term if out is None else out + term
    assert out is not None
    return out


class EagerGate(nn.Module):
    """The coefficients of a gate, with the noise or the choice that it holds; 1 for a layer with one candidate."""

    noise: Tensor
    choice: Tensor

    def __init__(self, gate: Gate | Constant) -> None:
        super().__init__()
        logits, noise = (gate.logits, gate.noise) if isinstance(gate, Gate) else (torch.zeros_like(gate.one),) * 2
        self.logits = nn.Parameter(logits.detach().clone())
        self.register_buffer("noise", noise.clone())
        self.register_buffer("choice", gate.choice.clone() if isinstance(gate, Gate) else logits.argmax(-1))
        self.mode = gate.mode

    def forward(self) -> Tensor:
        if self.mode == "fixed":
            return torch.nn.functional.one_hot(self.choice, self.logits.size(-1)).to(self.logits.dtype)
        soft = (self.logits + self.noise).softmax(-1)
        if self.mode == "relaxed":
            return soft
        hard = torch.nn.functional.one_hot(soft.argmax(-1), soft.size(-1)).to(soft.dtype)
        return hard + (soft - soft.detach())


class EagerMixedConv2d(nn.Module):
    """The candidates, weights and coefficients of a MixedConv2d, evaluated in one of two ways:

    mixing    Σ_a r_a A_a(x) and Σ_w p_w Q_w(W), then one convolution; with joint candidates one convolution per input quantizer
    branches  Σ_{w,a} p_{w,a} · conv(A_a(x), Q_w(W)), a convolution per pair

    The coefficients are the softmax, in mode "sampled" its one-hot argmax with the softmax's gradient, in mode "fixed" the choice.
    """

    def __init__(self, mixed: MixedConv2d, style: str) -> None:
        super().__init__()
        self.style, self.joint = style, mixed.space.joint
        self.stride, self.padding, self.dilation, self.groups = mixed.stride, mixed.padding, mixed.dilation, mixed.groups
        self.weight = nn.Parameter(mixed.weight.detach().clone())
        self.w_range = nn.Parameter(mixed.weight_quantizer.log_range.detach().exp())
        self.a_range = nn.Parameter(mixed.input_quantizer.log_range.detach().exp().reshape(-1))
        self.w_grid = (mixed.weight_quantizer.steps, mixed.weight_quantizer.zero_point)
        self.a_grid = (mixed.input_quantizer.steps, mixed.input_quantizer.zero_point)
        self.w_gate = EagerGate(mixed.weight_gate)
        if not self.joint:
            assert mixed.input_gate is not None
            self.a_gate = EagerGate(mixed.input_gate)

    def forward(self, x: Tensor) -> Tensor:
        if self.style == "branches":
            return self._branches(x)
        p = self.w_gate()
        if not self.joint:
            weight = mix_quantize(self.weight, self.w_range, p, *self.w_grid, axis=0)
            return self._conv(mix_quantize(x, self.a_range, self.a_gate(), *self.a_grid, axis=1), weight)
        p = p.unflatten(-1, (len(self.w_grid[0]), -1))
        weights = [mix_quantize(self.weight, self.w_range, column, *self.w_grid, axis=0) for column in p.unbind(-1)]
        return add_up([self._conv(a, w) for a, w in zip(self._inputs(x), weights, strict=True)])

    def _branches(self, x: Tensor) -> Tensor:
        filters = self.weight.size(0)
        p = self.w_gate()
        p = p.unflatten(-1, (len(self.w_grid[0]), -1)) if self.joint else p.unsqueeze(-1) * self.a_gate()
        p = p.expand(filters, -1, -1)
        steps = [(r / n).view(-1, 1, 1, 1) for r, n in zip(self.w_range.unbind(-1), self.w_grid[0], strict=True)]
        weights = [quantize(self.weight, step, n, z) for step, n, z in zip(steps, *self.w_grid, strict=True)]
        terms = []
        for a, quantized in enumerate(self._inputs(x)):
            terms += [p[:, w, a].view(1, -1, 1, 1) * self._conv(quantized, weight) for w, weight in enumerate(weights)]
        return add_up(terms)

    def _inputs(self, x: Tensor) -> list[Tensor]:
        return [quantize(x, r / n, n, z) for r, n, z in zip(self.a_range.unbind(), *self.a_grid, strict=True)]

    def _conv(self, x: Tensor, weight: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(x, weight, None, self.stride, self.padding, self.dilation, self.groups)


def add_up(terms: Sequence[Tensor]) -> Tensor:
    """Their sum, one addition after the other."""
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def eager_network(mixed: nn.Module, style: str) -> nn.Module:
    """Replace every MixedConv2d of `mixed`, in place, by its eager form."""
    for parent in list(mixed.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, MixedConv2d):
                setattr(parent, name, EagerMixedConv2d(child, style))
    return mixed

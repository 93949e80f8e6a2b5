"""DARTS relaxation for bit widths: Liu, Simonyan and Yang, "DARTS: Differentiable Architecture Search" (ICLR 2019, 1806.09055).

From the paper: softmax over candidates, weights trained on one half of the data and logits on the other, one step each in turn; first
order, or
second order through one unrolled weight step with a finite-difference Hessian-vector product (its equations 7 and 8, ε = 0.01/‖∇w'‖).

Ours: the candidates are bit widths of one shared weight, the budget enters the logits' loss through an augmented Lagrangian, and the bits
are read off by an allocation under the exact budget instead of an arg-max.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qprune.prepare import arch_parameters, weight_parameters
from qprune.search.method import Closure, Method, StepResult


class Darts(Method):
    """second_order  unroll one weight step in the logits' gradient: three more passes per step."""

    name = "darts"
    two_streams = True

    def __init__(self, *args: Any, second_order: bool = False) -> None:
        super().__init__(*args)
        self.second_order = second_order

    def step(self, closure: Closure, arch_closure: Closure | None = None) -> StepResult:
        """Logits learn from arch_closure, then weights from closure. With one closure, calls alternate: weights, logits, weights, …"""
        self.optimizers.schedule(self.steps)
        arch_turn = arch_closure is not None or self.steps % 2 == 1
        slack = self._arch_step(closure, arch_closure or closure) if arch_turn else self.constraint.slack(self.expected_cost())
        if arch_closure is None and arch_turn:
            return self.result(self.last_loss, slack)
        self.optimizers.zero_grad()
        loss = self.finite_loss(closure)
        loss.backward()
        self.optimizers.step_weights()
        return self.result(loss, slack)

    def _arch_step(self, closure: Closure, arch_closure: Closure) -> dict[str, Tensor]:
        self.optimizers.zero_grad()
        slack = self.constraint.slack(self.expected_cost())
        penalty = self.constraint.penalty(slack)
        if self.second_order:
            gradient = self._unrolled(closure, arch_closure)
            penalty.backward()
            for p, g in zip(arch_parameters(self.model), gradient, strict=True):
                p.grad = g if p.grad is None else p.grad + g
        else:
            self.last_loss = self.finite_loss(arch_closure)
            (self.last_loss + penalty).backward()
        self.optimizers.step_arch()
        self.constraint.update(slack)
        return slack

    def _unrolled(self, closure: Closure, arch_closure: Closure) -> list[Tensor]:
        """∇α L_val(w − ξ∇w L_train(w, α), α), the second derivative by finite differences."""
        weights, arch = weight_parameters(self.model), arch_parameters(self.model)
        rate = self.optimizers.weights.param_groups[0]["lr"]
        start = [p.detach().clone() for p in weights]
        first = _gradients(self.finite_loss(closure), weights)
        _shift(weights, start, first, -rate)
        self.last_loss = self.finite_loss(arch_closure)
        together = _gradients(self.last_loss, [*weights, *arch])
        by_weight, by_arch = together[: len(weights)], together[len(weights) :]
        norm = torch.stack([g.square().sum() for g in by_weight]).sum().sqrt().clamp_min(1e-12)
        epsilon = float(0.01 / norm)
        sides = []
        for sign in (1.0, -1.0):
            _shift(weights, start, by_weight, sign * epsilon)
            sides.append(_gradients(self.finite_loss(closure), arch))
        _shift(weights, start, by_weight, 0.0)
        return [g - rate * (up - down) / (2 * epsilon) for g, up, down in zip(by_arch, *sides, strict=True)]


def _gradients(loss: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, parameters, materialize_grads=True))


@torch.no_grad()
def _shift(parameters: list[nn.Parameter], start: list[Tensor], direction: list[Tensor], amount: float) -> None:
    """parameters = start + amount · direction."""
    for p, s, d in zip(parameters, start, direction, strict=True):
        p.copy_(s if amount == 0 else s + amount * d)

"""DARTS relaxation for bit widths: Liu, Simonyan and Yang, "DARTS: Differentiable Architecture Search" (ICLR 2019, 1806.09055).

From the paper: softmax over candidates, weights trained on one half of the data and logits on the other, one step each in turn; first
order, or
second order through one unrolled weight step with a finite-difference Hessian-vector product (its equations 7 and 8, ε = 0.01/‖∇w'‖).

Ours: the candidates are bit widths of one shared weight, the budget enters the logits' loss through an augmented Lagrangian, and the bits
are read off by an allocation under the exact budget instead of an arg-max.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qprune.errors import InputError
from qprune.prepare import arch_parameters, weight_parameters
from qprune.search.method import Closure, Method, StepResult
from qprune.wrappers import unwrap

Data = tuple[Closure, Sequence[Tensor]]


class Darts(Method):
    """second_order  unroll one weight step in the logits' gradient: three more passes per step."""

    name = "darts"
    two_streams = True

    def __init__(self, *args: Any, second_order: bool = False) -> None:
        super().__init__(*args)
        if second_order and self.recorder is not None:
            raise InputError("darts: second_order=True reads numbers back in every step and cannot be recorded; leave out cuda_graph=True")
        self.second_order = second_order
        self.passes = 4 if second_order else 1

    def step(
        self, closure: Closure, arch_closure: Closure | None = None, batch: Sequence[Tensor] = (), arch_batch: Sequence[Tensor] = ()
    ) -> StepResult:
        """Logits learn from arch_closure, then weights from closure. With one closure, calls alternate: weights, logits, weights, …"""
        self.optimizers.schedule(self.steps)
        if arch_closure is None and self.steps % 2 == 1:
            return self.result(self._arch(closure, batch, closure, batch))
        if arch_closure is not None:
            self._arch(arch_closure, arch_batch, closure, batch)
        return self.result(self.run(self.weight_update, closure, batch))

    def weight_update(self, closure: Closure, batch: Sequence[Tensor]) -> Tensor:
        self.optimizers.zero_grad()
        loss = self.task_loss(closure, batch)
        self.backward(loss)
        self.optimizers.step_weights()
        with torch.no_grad():
            return self.values(loss, self.constraint.slack(self.expected_cost()))

    def arch_update(self, closure: Closure, batch: Sequence[Tensor]) -> Tensor:
        self.optimizers.zero_grad()
        slack = self.constraint.slack(self.expected_cost())
        loss = self.task_loss(closure, batch)
        self.backward(loss + self.constraint.penalty(slack))
        self.optimizers.step_arch()
        self.constraint.update(slack)
        return self.values(loss, slack)

    def _arch(self, closure: Closure, batch: Sequence[Tensor], train: Closure, train_batch: Sequence[Tensor]) -> Tensor:
        """An update of the logits on closure, with `train` as the step that the second order unrolls."""
        if not self.second_order:
            return self.run(self.arch_update, closure, batch)
        self.optimizers.zero_grad()
        slack = self.constraint.slack(self.expected_cost())
        # DistributedDataParallel waits for gradients of every loss; those of the unrolled step are averaged here
        loss, gradient = self._unrolled((_unwrapped(train), train_batch), (_unwrapped(closure), batch))
        self.constraint.penalty(slack).backward()
        for p, g in zip(arch_parameters(self.model), gradient, strict=True):
            p.grad = g if p.grad is None else p.grad + g
        self.optimizers.step_arch()
        self.constraint.update(slack)
        return self.values(loss, slack)

    def _unrolled(self, train: Data, val: Data) -> tuple[Tensor, list[Tensor]]:
        """L_val and ∇α L_val(w − ξ∇w L_train(w, α), α), the second derivative by finite differences."""
        weights, arch = weight_parameters(self.model), arch_parameters(self.model)
        rate = self.optimizers.weights.param_groups[0]["lr"]
        start = [p.detach().clone() for p in weights]
        _, first = self._gradients(train, weights)
        try:
            _shift(weights, start, first, -rate)
            loss, together = self._gradients(val, [*weights, *arch])
            by_weight, by_arch = together[: len(weights)], together[len(weights) :]
            norm = torch.stack([g.square().sum() for g in by_weight]).sum().sqrt().clamp_min(1e-12)
            epsilon = float(0.01 / norm)
            sides = []
            for sign in (1.0, -1.0):
                _shift(weights, start, by_weight, sign * epsilon)
                sides.append(self._gradients(train, arch)[1])
        finally:
            _shift(weights, start, start, 0.0)
        return loss, [g - rate * (up - down) / (2 * epsilon) for g, up, down in zip(by_arch, *sides, strict=True)]

    def _gradients(self, data: Data, parameters: list[nn.Parameter]) -> tuple[Tensor, list[Tensor]]:
        """(loss, its gradient), of all parts of the batch. The mean over the ranks."""
        total = [torch.zeros_like(p) for p in parameters]

        def add(loss: Tensor) -> None:
            torch._foreach_add_(total, list(torch.autograd.grad(loss, parameters, materialize_grads=True)))

        loss = self.task_loss(*data, add)
        add(loss)
        return loss.detach(), self.ranks.means(total)


def _unwrapped(closure: Closure) -> Closure:
    return lambda model, *batch: closure(unwrap(model), *batch)


@torch.no_grad()
def _shift(parameters: list[nn.Parameter], start: list[Tensor], direction: list[Tensor], amount: float) -> None:
    """parameters = start + amount · direction."""
    for p, s, d in zip(parameters, start, direction, strict=True):
        p.copy_(s if amount == 0 else s + amount * d)

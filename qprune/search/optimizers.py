"""The optimizers of a search: SGD for weights, Adam for quantizers, Adam for gates, on one learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qprune.precision import LossScale
from qprune.prepare import arch_parameters, quantizer_parameters, weight_parameters


class Optimizers:
    """weights: SGD with Nesterov momentum, decay on weights only; quantizers: Adam without decay; arch: Adam without decay.

    total       steps after which weights and quantizers have cooled down to 0 along a half cosine; None: constant rates
    recordable  updates work on the device alone, so that they can be part of a CUDA graph: fused kernels, rates as tensors
    check       attribute: called before the first update after `zero_grad`, to raise for gradients that must not be used; None: nothing is
                called
    resting     attribute: updates are left out until the gradients are made anew
    """

    def __init__(
        self,
        model: nn.Module,
        weight_lr: float = 0.02,
        arch_lr: float = 0.02,
        quantizer_lr: float = 2e-3,
        weight_decay: float = 5e-4,
        momentum: float = 0.9,
        total: int | None = None,
        recordable: bool = False,
    ) -> None:
        quantizers = quantizer_parameters(model)
        skip = {id(p) for p in quantizers}
        weights = [p for p in weight_parameters(model) if id(p) not in skip]
        groups = [
            {"params": [p for p in weights if p.dim() > 1], "weight_decay": weight_decay},
            {"params": [p for p in weights if p.dim() <= 1], "weight_decay": 0.0},
        ]
        self.model, self.total = model, total
        self.check: Callable[[], None] | None = None
        self.resting = self._checked = False
        device = weights[0].device if weights else None
        options: dict[str, Any] = {"fused": True} if recordable else {}
        adam: dict[str, Any] = {**options, "capturable": True} if recordable and device is not None and device.type == "cuda" else options

        def rate(value: float) -> Any:
            return torch.tensor(value, device=device) if recordable else value

        nesterov = momentum > 0
        self.weights = torch.optim.SGD([g for g in groups if g["params"]], rate(weight_lr), momentum, nesterov=nesterov, **options)
        arch = arch_parameters(model)
        self.arch = torch.optim.Adam(arch, rate(arch_lr), betas=(0.5, 0.999), **adam) if arch else None
        self.quantizers = torch.optim.Adam(quantizers, rate(quantizer_lr), **adam) if quantizers else None
        rates = ((self.weights, weight_lr), (self.quantizers, quantizer_lr))
        self.base = [(optimizer, lr) for optimizer, lr in rates if optimizer is not None]
        if recordable and momentum > 0:
            # the fused kernel would leave these uninitialised if the very first update were skipped
            for p in weights:
                self.weights.state[p]["momentum_buffer"] = torch.zeros_like(p)

    def zero_grad(self) -> None:
        self.model.zero_grad(set_to_none=True)
        self.resting = self._checked = False

    def schedule(self, step: int) -> None:
        """Set the rates of step 0, 1, …"""
        if self.total is None:
            return
        factor = 0.5 * (1 + math.cos(math.pi * min(step / self.total, 1.0)))
        for optimizer, lr in self.base:
            for group in optimizer.param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(lr * factor)
                else:
                    group["lr"] = lr * factor

    def skip_if(self, flag: Tensor) -> None:
        """Let the next updates change nothing if the flag, a bool on the device, is set. For recordable optimizers."""
        for optimizer in self._all().values():
            optimizer.found_inf = flag.to(torch.float32)  # type: ignore[attr-defined]

    def unscale(self, scale: LossScale, nonfinite: Callable[[], str | None]) -> str | None:
        """See LossScale.unscale. Gradients that overflow become 0, and updates rest."""
        found = scale.unscale(self._all().values(), nonfinite)
        if found is not None:
            torch._foreach_zero_([p.grad for p in self.model.parameters() if p.grad is not None])
            self.resting = True
        return found

    def step_weights(self) -> None:
        if self.resting:
            return
        self._check_once()
        self.weights.step()
        if self.quantizers is not None:
            self.quantizers.step()

    def step_arch(self) -> None:
        if self.resting:
            return
        self._check_once()
        if self.arch is not None:
            self.arch.step()

    def _check_once(self) -> None:
        """The check looks at all gradients: gates that are updated after weights, from the same backward pass, need no other."""
        if self.check is not None and not self._checked:
            self.check()
            self._checked = True

    def _all(self) -> dict[str, torch.optim.Optimizer]:
        named = {"weights": self.weights, "arch": self.arch, "quantizers": self.quantizers}
        return {name: optimizer for name, optimizer in named.items() if optimizer is not None}

    def state_dict(self) -> dict[str, Any]:
        return {name: optimizer.state_dict() for name, optimizer in self._all().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, optimizer in self._all().items():
            optimizer.load_state_dict(state[name])

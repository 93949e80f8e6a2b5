"""A training step of resnet20 at 3x32x32: forward, backward and SGD, with every convolution but the first one mixed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qprune import SearchSpace, prepare
from qprune.kernels import backend
from qprune.nn.premix import Premix
from qprune.prepare import calibrate
from qprune.tasks.models import resnet20

from .baselines import eager_network
from .measure import WrongResultError

IMPLEMENTATIONS = ("float", "eager", "branches", "reference", "qprune")
W_BITS, A_BITS = (2, 3, 4, 8), (2, 4, 8)


@dataclass(frozen=True)
class Case:
    name: str
    joint: bool


CASES = (Case("resnet20 step, 4 x 3 bits", joint=False), Case("resnet20 step, 12 joint pairs", joint=True))


@dataclass
class Step:
    """One training step as a call: forward, backward and SGD on all parameters. dtype: of activations, by autocast; None: as they are."""

    model: nn.Module
    batch: tuple[Tensor, Tensor]
    backend: str | None = None
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4, momentum=0.9)
        self.premix = Premix(self.model)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        # without its cache of cast weights, which a CUDA graph must not find: each weight is used once
        return (
            contextlib.nullcontext() if self.dtype is None else torch.autocast(self.batch[0].device.type, self.dtype, cache_enabled=False)
        )

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with self.autocast():
            return F.cross_entropy(model(x), y)

    def forward(self) -> Tensor:
        """The loss, with the weights of all mixed layers mixed together, as in a search."""
        with self.premix:
            return self.loss(self.model, *self.batch)

    def __call__(self) -> None:
        with backend(self.backend):
            self.optimizer.zero_grad()
            self.forward().backward()
            self.optimizer.step()


def step(case: Case, name: str, device: str = "cpu", batch_size: int = 64, network: Callable[[], nn.Module] = resnet20) -> Step:
    """The step of one implementation; all start from the same weights, ranges and batch."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(batch_size, 3, 32, 32, generator=g).to(device, memory_format=torch.channels_last)
    y = torch.randint(10, (batch_size,), generator=g).to(device)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = network()
    if name != "float":
        space = SearchSpace(W_BITS, A_BITS, granularity="filter", joint=case.joint)
        model = prepare(model, space, rules={"conv1": None, "fc": None})
        calibrate(model, [x.cpu()])
    if name in ("eager", "branches"):
        model = eager_network(model, name)
    model = model.to(device).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    return Step(model, (x, y), "reference" if name == "reference" else None)


def _layer_results(layer: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    out = layer(x)
    weight = layer.get_parameter("weight")
    dx, d_weight = torch.autograd.grad(out, (x, weight), grad)
    return {"result": out.detach(), "dx": dx, "dweight": d_weight}


def check(name: str, step: Step, other: Step, limit: float = 5e-3) -> None:
    """Raise WrongResultError unless every layer of two steps gives the same output and gradients on the same input, up to a few codes that
    fall on the other side of a rounding boundary. (Whole networks are not compared: one such code sets off others further down.)"""
    layers = {key: layer for key, layer in step.model.named_modules() if hasattr(layer, "weight_gate")}
    others = dict(other.model.named_modules())
    inputs: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_hook(lambda _, args, out, key=key: inputs.update({key: args[0].detach(), key + ".out": out.detach()}))
        for key, layer in layers.items()
    ]
    with torch.no_grad():
        step.loss(step.model, *step.batch)
    for hook in hooks:
        hook.remove()
    for key, layer in layers.items():
        x, grad = inputs[key], torch.randn_like(inputs[key + ".out"])
        with backend(step.backend), step.autocast():
            got = _layer_results(layer, x, grad)
        with backend(other.backend), step.autocast():
            want = _layer_results(others[key], x, grad)
        for what, value in want.items():
            error = float((got[what] - value).norm() / value.norm())
            if not error < limit:
                raise WrongResultError(f"{name}, layer {key}: {what} differs by {error:.2g} of its norm")

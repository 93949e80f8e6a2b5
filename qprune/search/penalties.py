"""How the cost enters the loss of a configuration: L = task loss + λ f(r), with r the cost over that of a homogeneous network, B / B0.

The shapes that Zur et al. (1904.09872) used in the course of their work; "square" is the final one. None of them is a budget: "square" and
"linear" still pull below B0, the others level off. Take them to compare with the paper, and a Constraint to meet a budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qprune.errors import InputError

Penalty = Callable[[Tensor], Tensor]
"""r, any shape → f(r), the same shape, differentiable."""


def square(r: Tensor) -> Tensor:
    return r.square()


def linear(r: Tensor) -> Tensor:
    return r


def hinge(r: Tensor) -> Tensor:
    """r up to 1 and 5 r above: with a jump from 1 to 5."""
    return torch.where(r > 1, 5 * r, r)


def leaky(r: Tensor) -> Tensor:
    """LeakyReLU(r − 1): negative below B0. Reconstruction: the slope below, 0.1, is that of the relative loss of the paper's pruning
    search."""
    return torch.nn.functional.leaky_relu(r - 1, 0.1)


def tanh_2_5(r: Tensor) -> Tensor:
    """2.5 (tanh(20 (r − 1) − 1.1) + 1): from 0 to 5."""
    return 2.5 * ((20 * (r - 1) - 1.1).tanh() + 1)


@dataclass(frozen=True)
class Tanh:
    """f(r) = (tanh((r − v) T) + 1) y_max / 2 with v such that f(1) = y1: from 0 to y_max.

    y1, y_max  0 < y1 < y_max
    steepness  T > 0
    """

    y1: float = 0.2
    y_max: float = 5.0
    steepness: float = 20.0

    def __post_init__(self) -> None:
        if not (0 < self.y1 < self.y_max and self.steepness > 0):
            raise InputError(f"Tanh: expected 0 < y1 < y_max and steepness > 0, got {self.y1}, {self.y_max} and {self.steepness}")

    def __call__(self, r: Tensor) -> Tensor:
        v = 1 - math.atanh(2 * self.y1 / self.y_max - 1) / self.steepness
        return (((r - v) * self.steepness).tanh() + 1) * (self.y_max / 2)


PENALTIES: dict[str, Penalty] = {
    "square": square,
    "linear": linear,
    "hinge": hinge,
    "tanh-2.5": tanh_2_5,
    "tanh": Tanh(),
    "tanh-0.5": Tanh(0.02, 0.5, 8.0),
    "leaky": leaky,
}


def penalty(name: str) -> Penalty:
    """The shape of a name."""
    if name not in PENALTIES:
        raise InputError(f"unknown penalty {name!r}; expected one of {', '.join(PENALTIES)}")
    return PENALTIES[name]

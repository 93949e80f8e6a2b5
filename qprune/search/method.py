"""What a search method is: how the gates' probabilities arise, how they learn, and how the budget enters."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qprune.errors import NonFiniteError
from qprune.health import first_nonfinite_layer
from qprune.nn.premix import Premix
from qprune.search.constraint import Constraint
from qprune.search.expected import ExpectedCost
from qprune.search.optimizers import Optimizers

Closure = Callable[[nn.Module], Tensor]


@dataclass(frozen=True)
class StepResult:
    """loss: of the task; cost_ratio: expected cost over budget, the largest of several; multiplier: the budget's weight in the loss."""

    loss: float
    cost_ratio: float
    multiplier: float


class Method:
    """Base of the search methods. One `step` is one update of the weights, of the gates, or of both."""

    name: ClassVar[str]
    two_streams: ClassVar[bool] = False
    """True if gates learn on other data than weights: `step` then takes a second closure, `fit` a second loader."""

    def __init__(self, model: nn.Module, constraint: Constraint, optimizers: Optimizers, convention: str) -> None:
        self.model, self.constraint, self.optimizers, self.convention = model, constraint, optimizers, convention
        self.premix = Premix(model)
        self.steps = 0

    def step(self, closure: Closure, arch_closure: Closure | None = None) -> StepResult:
        raise NotImplementedError

    @functools.cached_property
    def expected_cost(self) -> ExpectedCost:
        return ExpectedCost(self.model, self.convention)

    def finite_loss(self, closure: Closure) -> Tensor:
        """The task loss. Raises NonFiniteError, before anything is updated, if it is NaN or infinite."""
        with self.premix:
            loss = closure(self.model)
        if not bool(torch.isfinite(loss)):
            layer = first_nonfinite_layer(self.model, lambda: closure(self.model))
            raise NonFiniteError(self.steps, layer, loss.item())
        return loss

    def result(self, loss: Tensor, slack: dict[str, Tensor]) -> StepResult:
        self.steps += 1
        values = {name: float(s.detach()) for name, s in slack.items()}
        worst = max(values, key=lambda name: values[name])
        return StepResult(loss.item(), math.exp(values[worst]), self.constraint.multipliers[worst])

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "multipliers": dict(self.constraint.multipliers), "optimizers": self.optimizers.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.constraint.multipliers = state["steps"], dict(state["multipliers"])
        self.optimizers.load_state_dict(state["optimizers"])

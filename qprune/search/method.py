"""What a search method is: how the gates' probabilities arise, how they learn, and how the budget enters."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn

from qprune.accumulation import in_parts
from qprune.budget import Budget
from qprune.cost import cost, geometry_of, model_choices
from qprune.errors import NonFiniteError
from qprune.gates import gates
from qprune.health import first_nonfinite_layer, nonfinite_gradient, refusal
from qprune.nn.premix import Premix
from qprune.policy import Policy
from qprune.precision import LossScale
from qprune.ranks import Ranks, ranks_of
from qprune.record import record_of
from qprune.search.allocate import allocate, check_feasible
from qprune.search.constraint import Constraint
from qprune.search.expected import ExpectedCost
from qprune.search.graph import Recorder, Update
from qprune.search.optimizers import Optimizers
from qprune.wrappers import unwrap

Closure = Callable[..., Tensor]
"""(model, *batch) → loss."""


class StepResult:
    """What one step saw, read back from the device when it is first asked for.

    loss        of the task
    cost_ratio  expected cost over budget, the largest of several
    multiplier  the budget's weight in the loss
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values

    @functools.cached_property
    def _numbers(self) -> list[float]:
        return self.values.tolist()  # type: ignore[no-any-return]

    @property
    def loss(self) -> float:
        return self._numbers[0]

    @property
    def cost_ratio(self) -> float:
        return self._numbers[1]

    @property
    def multiplier(self) -> float:
        return self._numbers[2]


class Method:
    """Base of the search methods. One `step` is one update of the weights, of the gates, or of both.

    recorder  replays updates as CUDA graphs. Nothing may then wait for the device within an update: one with a loss that is not finite
              changes no parameter, and `settle` raises afterwards
    loss_scale  attribute: for closures that compute in float16
    accumulate  attribute: parts of a batch, whose gradients add up (see qprune.accumulation)
    """

    name: ClassVar[str]
    two_streams: ClassVar[bool] = False
    """True if gates learn on other data than weights: `step` then takes a second closure, `fit` a second loader."""
    default_bits: ClassVar[tuple[int, ...]] = (2, 3, 4, 6)
    """Candidates where a run names none."""
    network_options: ClassVar[tuple[str, ...]] = ()
    """Of what makes a network searchable for this method, where that is not `prepare`."""
    passes: int = 1
    """Calls of the closure in one step of the weights."""

    def __init__(
        self, model: nn.Module, constraint: Constraint, optimizers: Optimizers, convention: str, recorder: Recorder | None = None
    ) -> None:
        self.model, self.constraint, self.optimizers, self.convention = model, constraint, optimizers, convention
        self.recorder = recorder
        self.premix = Premix(model)
        self.steps = 0
        self._unsettled: tuple[StepResult, Closure, Sequence[Tensor]] | None = None
        self._loss: Tensor | None = None
        self.loss_scale: LossScale | None = None
        self.ranks = ranks_of(model)
        self.accumulate = 1
        if recorder is None:
            optimizers.check = self._check_gradients

    @classmethod
    def options(cls) -> tuple[str, ...]:
        """The names of the method's own arguments."""
        parameters = inspect.signature(cls.__init__).parameters.values()
        return tuple(p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY)

    @classmethod
    def limits(cls, model: nn.Module, budget: Budget, convention: str) -> dict[str, float]:
        """The budget as numbers (see Budget.limits)."""
        record = record_of(model)
        return budget.limits(geometry_of(model), {} if record is None else record.fixed, convention)

    @classmethod
    def check(cls, model: nn.Module, budget: Budget, convention: str) -> None:
        """Raise InfeasibleBudgetError if no policy is within the budget."""
        check_feasible(model, budget, convention)

    def policy(self, budget: Budget) -> Policy:
        """The likeliest policy within the budget, with what is left of the budget spent on more bits (see `allocate`)."""
        return allocate(self.model, budget, convention=self.convention, spend=True, fill=True)

    def share(self, ranks: Ranks) -> None:
        """From now on every step is one of all ranks."""
        self.model, self.ranks = ranks.wrapped(self.model), ranks

    @contextmanager
    def chosen(self) -> Iterator[None]:
        """Meanwhile the model computes what the method would choose now, where that is not what it always computes."""
        yield

    def end_epoch(self) -> None:
        """What is due after every pass of `Search.fit` over the data: nothing, for most."""

    def step(
        self, closure: Closure, arch_closure: Closure | None = None, batch: Sequence[Tensor] = (), arch_batch: Sequence[Tensor] = ()
    ) -> StepResult:
        """closure(model, *batch) → loss; arch_closure the same on the data for the gates."""
        raise NotImplementedError

    @functools.cached_property
    def expected_cost(self) -> ExpectedCost:
        return ExpectedCost(self.model, self.convention)

    def run(self, update: Update, closure: Closure, batch: Sequence[Tensor]) -> Tensor:
        """update(closure, batch), or its replay."""
        if self.recorder is None:
            return update(closure, batch)
        self.settle()
        values = self.recorder(update, closure, batch)
        self._unsettled = (StepResult(values), closure, batch)
        return values

    def task_loss(self, closure: Closure, batch: Sequence[Tensor] = (), backward: Callable[[Tensor], None] | None = None) -> Tensor:
        """closure(model, *batch). Before anything is updated, raises NonFiniteError if it is NaN or infinite; with a recorder the
        optimizers are told to change nothing instead.

        backward  for a batch in parts: called for the losses of all but the last, whose gradient the result has. None: their gradients,
                  scaled, are left in the parameters
        """

        def one(*part: Tensor) -> Tensor:
            return self._finite_loss(closure, part)

        def leave(loss: Tensor) -> None:
            self.scaled(loss).backward()  # type: ignore[no-untyped-call]

        loss = in_parts(self.model, one, batch, self.accumulate, leave if backward is None else backward)
        self._loss = loss.detach()
        return loss

    def _finite_loss(self, closure: Closure, batch: Sequence[Tensor]) -> Tensor:
        with self.premix:
            loss = closure(self.model, *batch)
        if self.recorder is not None:
            self.optimizers.skip_if(~torch.isfinite(loss.detach()))
        elif not self.ranks.all(torch.isfinite(loss)):
            self._refuse(loss.item(), closure, batch)
        return loss

    def backward(self, loss: Tensor) -> None:
        """Gradients of what is to be updated by, ready to use."""
        self.scaled(loss).backward()  # type: ignore[no-untyped-call]
        self.unscale()

    def scaled(self, loss: Tensor) -> Tensor:
        """For several backward passes that add up: each of its `scaled` loss, then `unscale`."""
        return loss if self.loss_scale is None else self.loss_scale.scaled(loss)

    def unscale(self) -> None:
        """With a loss scale: divide the gradients by it. If they overflow, no update is made with them; NonFiniteError at the scale's
        limit."""
        if self.loss_scale is None:
            return
        parameter = self.optimizers.unscale(self.loss_scale, lambda: nonfinite_gradient(self.model))
        if parameter is not None and self.loss_scale.hopeless:
            raise NonFiniteError(self.steps, None, math.nan if self._loss is None else float(self._loss), parameter)

    def _check_gradients(self) -> None:
        """Raise NonFiniteError if a gradient is NaN or infinite; the optimizers call it before they change anything."""
        parameter = nonfinite_gradient(self.model)
        if parameter is not None:
            raise NonFiniteError(self.steps, None, math.nan if self._loss is None else float(self._loss), parameter)

    def settle(self) -> None:
        """Wait for the last update; raises NonFiniteError if its loss was NaN or infinite."""
        if self._unsettled is not None:
            (result, closure, batch), self._unsettled = self._unsettled, None
            if not math.isfinite(result.loss):
                self._refuse(result.loss, closure, batch, self.steps - 1)

    def _refuse(self, loss: float, closure: Closure, batch: Sequence[Tensor], step: int | None = None) -> NoReturn:
        """All ranks raise the error of the first one whose loss is not finite."""
        layer = first_nonfinite_layer(self.model, lambda: closure(self.model, *batch))
        raise refusal(self.steps if step is None else step, loss, layer, self.ranks)

    def values(self, loss: Tensor, slack: Tensor) -> Tensor:
        """What a StepResult holds, on the device."""
        return torch.stack([loss.detach().double(), *self.constraint.worst(slack)])

    def result(self, values: Tensor) -> StepResult:
        self.steps += 1
        return StepResult(values)

    @torch.no_grad()
    def summary(self) -> dict[str, Any]:
        """entropy: mean over gates, 1 = undecided, 0 = decided; expected: mean bits of every layer's weight and input."""
        entropies = []
        for _, gate in gates(self.model):
            p = gate.distribution().clamp_min(1e-12)
            entropies.append(float(-(p * p.log()).sum(-1).mean() / math.log(p.size(-1))))
        known = model_choices(unwrap(self.model))
        rows = [row for row in cost(self.model, convention=self.convention).rows if row.name in known]
        expected = {row.name: {"w_bits": float(row.w_bits), "a_bits": float(row.a_bits)} for row in rows}
        return {"entropy": sum(entropies) / len(entropies) if entropies else 0.0, "expected": expected}

    def state_dict(self) -> dict[str, Any]:
        scale = {} if self.loss_scale is None else {"loss_scale": self.loss_scale.state_dict()}
        return {"steps": self.steps, "multipliers": self.constraint.multipliers, "optimizers": self.optimizers.state_dict(), **scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.constraint.multipliers = state["steps"], state["multipliers"]
        self.optimizers.load_state_dict(state["optimizers"])
        if self.loss_scale is not None and "loss_scale" in state:
            self.loss_scale.load_state_dict(state["loss_scale"])
        if self.recorder is not None:
            self.recorder.clear()

"""Every error that qprune raises on purpose. Each message is one line: what was got, what was expected, what to do."""

from __future__ import annotations

from typing import Any

from qprune.kernels import BackendError, InputError, QPruneError

__all__ = [
    "BackendError",
    "BudgetError",
    "CheckpointError",
    "ExportError",
    "InfeasibleBudgetError",
    "InputError",
    "NonFiniteError",
    "OutOfMemoryError",
    "PolicyMismatchError",
    "QPruneError",
    "RuleError",
    "SpaceError",
    "StudyError",
    "UnsupportedLayerError",
    "VerificationError",
]


class SpaceError(QPruneError, ValueError):
    """A search space, a bit width or a quantizer name that does not exist."""


class RuleError(QPruneError, ValueError):
    """A rule of `prepare` that matches no layer, or that cannot be applied."""


class UnsupportedLayerError(QPruneError, TypeError):
    """A layer was named in a rule, but qprune cannot replace it."""


class BudgetError(QPruneError, ValueError):
    """A budget that cannot be read, or that lacks what it needs to be resolved."""


class InfeasibleBudgetError(BudgetError):
    """No policy meets the budget; `cheapest` is the smallest cost that one can have, `limit` what was asked for."""

    def __init__(self, message: str, cheapest: float, limit: float) -> None:
        super().__init__(message)
        self.cheapest, self.limit = cheapest, limit


class PolicyMismatchError(QPruneError, ValueError):
    """A policy that was made for another network, or that names bits a layer cannot have."""


class CheckpointError(QPruneError, RuntimeError):
    """A file that cannot be written or read back: damaged, of another kind, of a newer format, or for another network."""


class ExportError(QPruneError, RuntimeError):
    """A model that cannot be written in a format: an operator or a layer that it has not, or a package that is missing."""


class NonFiniteError(QPruneError, ArithmeticError):
    """The loss, or a gradient, became NaN or infinite. Parameters are as they were before the step.

    step      counts from 0, over all passes
    layer     the first with a non-finite output, or that has the gradient; None if every layer's output was finite
    gradient  the parameter whose gradient it is; None if it is the loss
    index     of the batch in its pass, and batch = (x, y) itself, where the loop knows them; else None
    rank      of a distributed job, whose loss it is; None where all ranks have the gradient, or there are no others
    """

    def __init__(self, step: int, layer: str | None, loss: float, gradient: str | None = None, rank: int | None = None) -> None:
        if gradient is not None:
            layer = gradient.rpartition(".")[0]
        self.step, self.layer, self.loss, self.gradient, self.rank = step, layer, loss, gradient, rank
        self.index: int | None = None
        self.batch: tuple[Any, Any] | None = None
        where = f"first non-finite output in layer {layer!r}" if layer is not None else "every layer's output is finite, so it is the loss"
        what = f"loss is {loss} at step {step}{'' if rank is None else f' on rank {rank}'}: {where}"
        if gradient is not None:
            what = f"the gradient of {gradient} is NaN or infinite at step {step}, where the loss is {loss:.6g}"
        super().__init__(f"{what}; lower the learning rate or check the data")

    def on(self, index: int, x: Any, y: Any) -> NonFiniteError:
        """The same, with the batch where it happened."""
        self.index, self.batch = index, (x, y)
        return self


class OutOfMemoryError(QPruneError, MemoryError):
    """A training loop needs more memory than there is."""


class StudyError(QPruneError, RuntimeError):
    """A study that cannot go on: a missing package, a database that cannot be used or belongs to something else, other options, or
    workers that ended early."""


class VerificationError(QPruneError, ArithmeticError):
    """A network that its integer codes do not reproduce; `verification` is what `qprune.verify` found."""

    def __init__(self, message: str, verification: object) -> None:
        super().__init__(message)
        self.verification = verification

"""Every error that qprune raises on purpose. Each message is one line: what was got, what was expected, what to do."""

from qprune.kernels import BackendError, InputError, QPruneError

__all__ = [
    "BackendError",
    "BudgetError",
    "CheckpointError",
    "ExportError",
    "InfeasibleBudgetError",
    "InputError",
    "NonFiniteError",
    "PolicyMismatchError",
    "QPruneError",
    "RuleError",
    "SpaceError",
    "StudyError",
    "UnsupportedLayerError",
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
    """The loss became NaN or infinite. `step` counts from 0; `layer` is None if every layer's output was finite."""

    def __init__(self, step: int, layer: str | None, loss: float) -> None:
        self.step, self.layer, self.loss = step, layer, loss
        where = f"first non-finite output in layer {layer!r}" if layer is not None else "every layer's output is finite, so it is the loss"
        super().__init__(f"loss is {loss} at step {step}: {where}; lower the learning rate or check the data")


class StudyError(QPruneError, RuntimeError):
    """A study that cannot go on: a missing package, a database that cannot be used or belongs to something else, other options, or
    workers that ended early."""

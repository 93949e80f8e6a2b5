"""Statistics of normalisations, estimated again for a network whose weights they have not seen: converted, pruned, quantized."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from qprune.errors import InputError
from qprune.geometry import ExampleInputs, run
from qprune.modes import kept_modes
from qprune.ranks import current
from qprune.wrappers import unwrap

Model = TypeVar("Model", bound=nn.Module)
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def recalibrate(
    model: Model, loader: Iterable[ExampleInputs | tuple[ExampleInputs, Tensor]], batches: int | None = None, momentum: float | None = None
) -> Model:
    """Estimate the running mean and variance of every normalisation anew from real inputs. Returns the model, changed in place.

    loader    inputs as for `prepare`, or (x, y) pairs of which x is used
    batches   how many of them; None: all
    momentum  None: the plain average over the batches, from scratch; 0 … 1: a moving average that starts from the present statistics

    For after `convert`, whose networks have statistics of other weights (and for sampled architectures, 1903.05134). Only the
    normalisations are in training mode: quantizers compute as in eval mode, dropout is off, no weight and no range moves. What `calibrate`
    does is something else: it sets the ranges of quantized inputs, from the float network's activations. Call it before a search or on a
    float model that was converted, and `recalibrate` after it.

    The ranks of a distributed job end with the same statistics: the mean over all of their batches. Norms without running statistics, and
    those that are not called, stay as they are. Raises InputError if there is no batch (on any rank), and for a momentum outside of [0, 1];
    then, and if the model raises, the statistics are as they were.
    """
    if momentum is not None and not 0 <= momentum <= 1:
        raise InputError(f"recalibrate: momentum must be None or between 0 and 1, got {momentum}")
    inner = unwrap(model)
    norms = [m for m in inner.modules() if isinstance(m, _NormBase) and m.track_running_stats and m.running_mean is not None]
    if not norms:
        return model
    with torch.no_grad(), kept_modes(inner):
        inner.eval()
        with _estimating(norms, momentum) as estimates:
            seen = 0
            for batch in islice(loader, batches):
                run(inner, only_inputs(batch))
                seen += 1
            for estimate in estimates:
                estimate.keep_unmoved()
            _agree(norms, seen)
    return model


def only_inputs(batch: ExampleInputs | tuple[ExampleInputs, Tensor]) -> ExampleInputs:
    """x of an (x, y) pair whose y is a tensor of integers: labels; any other batch as it is."""
    if isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[1], Tensor) and not batch[1].is_floating_point():
        return batch[0]
    return batch


class _Estimate:
    """A norm in training mode from `begin` to `end`, alone: modules that it holds, a dropout of its own say, stay in eval mode."""

    def __init__(self, norm: _NormBase) -> None:
        self.norm, self.momentum, self.before, self.calls = norm, norm.momentum, self._statistics(norm), 0

    @staticmethod
    def _statistics(norm: _NormBase) -> dict[str, Tensor]:
        return {name: value.clone() for name in _STATISTICS if (value := getattr(norm, name)) is not None}

    def begin(self, momentum: float | None) -> None:
        # A moving average of momentum 1/n is the plain average; not every norm takes None for that. Ours do, and count by candidate.
        averages = momentum is None and not type(self.norm).__module__.startswith("qprune.")

        def called(norm: nn.Module, args: Any) -> None:
            self.calls += 1
            if averages:
                norm.momentum = 1.0 / self.calls  # type: ignore[assignment]

        self.norm.training, self.norm.momentum = True, momentum
        self.handle = self.norm.register_forward_pre_hook(called)
        if momentum is None:
            self.norm.reset_running_stats()
        self.start = self._statistics(self.norm)

    def keep_unmoved(self) -> None:
        """Take back the reset of a norm that nothing called, or that leaves its statistics to another (a slimmable network's)."""
        if all(torch.equal(value, getattr(self.norm, name)) for name, value in self.start.items()):
            self.restore()

    def restore(self) -> None:
        for name, value in self.before.items():
            getattr(self.norm, name).copy_(value)

    def end(self) -> None:
        self.handle.remove()
        self.norm.momentum = self.momentum


@contextmanager
def _estimating(norms: list[_NormBase], momentum: float | None) -> Iterator[list[_Estimate]]:
    """The norms follow what they see, and nothing else of them changes; an error takes back what they saw."""
    estimates = [_Estimate(norm) for norm in norms]
    try:
        for estimate in estimates:
            estimate.begin(momentum)
        yield estimates
    except BaseException:
        for estimate in estimates:
            estimate.restore()
        raise
    finally:
        for estimate in estimates:
            estimate.end()


def _agree(norms: list[_NormBase], seen: int) -> None:
    """The mean over the ranks, weighted by their numbers of batches."""
    ranks = current()
    counts = torch.tensor([seen, int(seen == 0)], dtype=torch.float64, device=norms[0].running_mean.device)  # type: ignore[union-attr]
    total, without = ranks.total(counts).tolist()
    if without:
        raise InputError("recalibrate: the loader gave no batch")
    if not ranks.alone:
        for norm in norms:
            for value in (norm.running_mean, norm.running_var):
                assert value is not None
                value.copy_(ranks.total(value * (seen / total)))

"""One training step on a batch in parts, whose gradients add up: the memory of a part, the update of the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from qprune.errors import InputError
from qprune.quantizers import OutputQuantizer
from qprune.quantizers.base import CalibratedQuantizer
from qprune.wrappers import distributed, unwrap

Loss = Callable[..., Tensor]
"""(*batch) → the mean loss of the batch."""
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked", "average")
Part = tuple[float, tuple[Tensor, ...]]
"""(share of the batch's samples, tensors)."""


def check_parts(accumulate: object, who: str) -> int:
    """Raises InputError unless it is a number of parts."""
    if not isinstance(accumulate, int) or isinstance(accumulate, bool) or accumulate < 1:
        raise InputError(f"{who}: accumulate is the number of parts of a batch, at least 1, got {accumulate!r}")
    return accumulate


def split(model: nn.Module, batch: Sequence[Tensor], parts: int) -> list[Part]:
    """The batch in `parts` parts along the first dimension, whose lengths differ by 1 at most. In fewer, where a part would have no sample,
    or only one to normalise by. Raises InputError unless the tensors have one length."""
    lengths = {tuple(t.shape[:1]) for t in batch}
    if len(lengths) != 1 or () in lengths:
        raise InputError(f"accumulate: the tensors of a batch must have one length, got shapes {[tuple(t.shape) for t in batch]}")
    ((length,),) = lengths
    least = 2 if any(map(_normalises, unwrap(model).modules())) else 1
    pieces = zip(*(t.tensor_split(max(min(parts, length // least), 1)) for t in batch), strict=True)
    return [(len(piece[0]) / max(length, 1), piece) for piece in pieces]


def no_sync(model: nn.Module) -> AbstractContextManager[None]:
    """Within, backward passes of a model in DistributedDataParallel leave gradients on their ranks; for other models nothing."""
    wrapper = distributed(model)
    return nullcontext() if wrapper is None else wrapper.no_sync()  # type: ignore[no-any-return, operator]


def in_parts(model: nn.Module, loss: Loss, batch: Sequence[Tensor], parts: int, backward: Callable[[Tensor], None]) -> Tensor:
    """loss(*batch), of which the caller has still to make the last part's backward pass.

    backward(share · loss) is called for every other part, behind its forward pass and before the next one's. The result has the value of
    the whole and the gradient of share · loss of the last part. Gradients of a model in DistributedDataParallel travel with that alone.

    Normalisations see a part at a time. Their running statistics, and the moving averages of quantizers, then take one step, to the mean
    over the parts. Where ranges are not calibrated yet, loss(*batch) is first called without gradients, so that they start as they would
    from the whole batch. On any error gradients are gone, and running statistics as they were.
    """
    pieces = split(model, batch, parts) if parts > 1 else []
    if len(pieces) < 2:
        return loss(*batch)
    calibrate_first(model, loss, batch)
    statistics = RunningStatistics(model)
    before: list[Tensor] = []
    try:
        for share, piece in pieces[:-1]:
            with no_sync(model):
                value = share * loss(*piece)
                statistics.take(share)
                backward(value)
            before.append(value.detach())
            del value  # with what its graph still holds
        share, piece = pieces[-1]
        value = share * loss(*piece)
        statistics.take(share)
    except BaseException:
        statistics.put_back()
        model.zero_grad(set_to_none=True)
        raise
    statistics.finish()
    return value + torch.stack(before).sum(0)


def calibrate_first(model: nn.Module, forward: Callable[..., object], batch: Sequence[Tensor]) -> None:
    """forward(*batch) without gradients if ranges are not calibrated yet, so that they start from the whole batch."""
    if _uncalibrated(model):
        with observing(model):
            forward(*batch)


def mean_of_parts(model: nn.Module, measure: Loss, batch: Sequence[Tensor], parts: int) -> Tensor:
    """measure(*batch) for a mean over samples that needs no gradient, from the parts of the batch; in one call without a batch."""
    if parts == 1 or not batch:
        return measure(*batch)
    return torch.stack([share * measure(*piece) for share, piece in split(model, batch, parts)]).sum(0)


@contextmanager
def observing(model: nn.Module) -> Iterator[None]:
    """Within, passes of the model leave no gradients, no running statistics, and no random numbers used; what they calibrate stays."""
    statistics = RunningStatistics(model)
    devices = {t.device for t in model.parameters() if t.is_cuda}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            yield
    finally:
        statistics.put_back()


def _uncalibrated(model: nn.Module) -> bool:
    return any(
        module.training and not module.calibrated and not _moving(module)
        for module in unwrap(model).modules()
        if isinstance(module, CalibratedQuantizer)
    )


def _moving(module: nn.Module) -> bool:
    """Whether every pass in training mode moves the quantizer's averages."""
    return isinstance(module, OutputQuantizer) and module.kind == "uniq"


def _normalises(module: nn.Module) -> bool:
    """Whether training is by the statistics of the batch."""
    return isinstance(module, _NormBase) or _moving(module)


class RunningStatistics:
    """The running statistics that passes in training mode move: every part begins with what was there before the step."""

    def __init__(self, model: nn.Module) -> None:
        # .data: autograd guards these tensors, although backward passes of a training step do not read them
        found = [
            value.data
            for module in unwrap(model).modules()
            if module.training and _normalises(module)
            for name, value in module.named_buffers(recurse=False)
            if name in _STATISTICS
        ]
        self.means = [t for t in found if t.is_floating_point()]
        self.counts = [t for t in found if not t.is_floating_point()]
        self.before, self.before_counts = [t.clone() for t in self.means], [t.clone() for t in self.counts]
        self.counted = self.before_counts
        self.moves = [torch.zeros_like(t) for t in self.means]

    @torch.no_grad()
    def take(self, share: float) -> None:
        """A part with this share of the samples is done."""
        self.counted = [t.clone() for t in self.counts]
        if self.means:
            torch._foreach_add_(self.moves, torch._foreach_sub(self.means, self.before), alpha=share)
        self.put_back()

    @torch.no_grad()
    def put_back(self) -> None:
        for target, source in zip((*self.means, *self.counts), (*self.before, *self.before_counts), strict=True):
            target.copy_(source)

    @torch.no_grad()
    def finish(self) -> None:
        """All parts are done."""
        if self.means:
            torch._foreach_add_(self.means, self.moves)
        for target, source in zip(self.counts, self.counted, strict=True):
            target.copy_(source)

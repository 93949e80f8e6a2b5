"""Plain supervised training: of the float network, of the network a search returns, and of the uniform baselines.

    history = fit(model, task.loader("train", 64, generator), epochs=40, val_loader=task.loader("val", 256))

Nothing prints; `progress` and `on_epoch` are told what happens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qprune.accumulation import check_parts, in_parts
from qprune.errors import InputError, NonFiniteError
from qprune.health import first_nonfinite_layer, nonfinite_gradient, refusal
from qprune.modes import kept_modes
from qprune.passes import Passes, following
from qprune.precision import laid_out, loss_scale
from qprune.prepare import quantizer_parameters
from qprune.ranks import ALONE, Ranks, ranks_of
from qprune.wrappers import unwrap

LossFunction = Callable[[Tensor, Tensor], Tensor]


class Batches(Protocol):
    """A loader: a known number of (x, y) batches, afresh on every pass."""

    def __iter__(self) -> Iterator[Any]: ...
    def __len__(self) -> int: ...


def parameter_groups(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """Trainable parameters as (decayed, not decayed, quantizer). Decayed are weights of two or more dimensions; not decayed are biases and
    normalisation parameters."""
    quantizers = {id(p) for p in quantizer_parameters(model)}
    groups: tuple[list[nn.Parameter], ...] = ([], [], [])
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups[2 if id(parameter) in quantizers else int(parameter.dim() < 2)].append(parameter)
    return groups[0], groups[1], groups[2]


def rate(step: int, total: int, warmup: float) -> float:
    """Factor on the learning rate in step 0..total-1: linear rise over the share `warmup` of the run, then half a cosine towards 0."""
    rise = warmup * total
    if step < rise:
        return (step + 1) / (rise + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1.0, total - rise)))


@dataclass
class Running:
    """What a pass has had so far."""

    batches: int = 0
    samples: int = 0
    loss_sum: float = 0.0
    correct: int = 0
    seconds: float = 0.0


class Trainer:
    """A run of `epochs` passes that can stop after any step and go on elsewhere: `state_dict` holds weights, optimizers, history, and how
    far the present pass is.

    Random numbers are not part of it: that of the loader's generator is to be what it was when the present pass began.

    autocast       bfloat16 or float16: the format of forward passes and losses in training; parameters stay as they are. With float16
                   the loss is scaled, and updates whose gradients overflow are left out, with their number in the records as "skipped";
                   NonFiniteError after more than LossScale.limit in a row
    channels_last  False: images in the plain layout
    accumulate     parts that every batch is split into, of the same size or nearly, which make their forward and backward passes one after
                   the other for one update: the memory of a part, the step of the batch up to rounding. `loss` must then be a mean over
                   the batch. Normalisations take the statistics of a part (see qprune.accumulation)
    """

    def __init__(
        self,
        model: nn.Module,
        epochs: int,
        *,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        quantizer_lr: float = 1e-3,
        warmup: float = 0.1,
        loss: LossFunction = F.cross_entropy,
        autocast: torch.dtype | None = None,
        channels_last: bool = True,
        accumulate: int = 1,
    ) -> None:
        if epochs < 0:
            raise InputError(f"epochs must not be negative, got {epochs}")
        self.accumulate = check_parts(accumulate, "Trainer")
        self.model, self.epochs, self.warmup, self.loss, self.autocast = model, epochs, warmup, loss, autocast
        self.ranks = ranks_of(model)
        self.channels_last, self.loss_scale = channels_last, loss_scale(autocast, device_of(model))
        self.history: list[dict[str, float]] = []
        self.step = 0
        self._running: Running | None = None
        self._left: Running | None = None
        decayed, plain, quantizer = parameter_groups(model)
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
        groups = [group for group in groups if group["params"]]
        self.optimizers: list[tuple[torch.optim.Optimizer, float]] = []
        if groups:
            self.optimizers.append((torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0), lr))
        if quantizer:
            self.optimizers.append((torch.optim.Adam(quantizer, lr=quantizer_lr), quantizer_lr))

    def share(self, ranks: Ranks) -> None:
        """Let the ranks of a distributed job make every step together, each on its share of a batch. To be called on all of them before the
        first step."""
        self.model, self.ranks = ranks.wrapped(self.model), ranks

    def run_epoch(
        self, loader: Batches, progress: Callable[[int, int, float], None] | None = None, passes: Passes | None = None
    ) -> dict[str, float]:
        """One pass over `loader`, which must be as long in every pass, or what is left of one after `load_state_dict`. Returns and records
        {epoch, step, lr, loss, accuracy, seconds}.

        progress(step, total steps of the run, loss) is called after every step. Raises NonFiniteError, leaving the parameters as they
        were, for a loss or a gradient that is NaN or infinite.
        """
        passes = passes or Passes()
        total = self.epochs * len(loader)
        device = device_of(self.model)
        self.model.train()
        (running, self._left) = (self._left or Running(), None)
        self._running, started = running, time.perf_counter() - running.seconds
        self._correct = torch.tensor(running.correct, dtype=torch.int64, device=device)
        passes.begin()
        for x, y in following(loader, running.batches):
            passes.ready()
            x, y = move(x, device, self.channels_last), y.to(device, non_blocking=True)
            value = self._update(x, y, rate(self.step, total, self.warmup), running.batches)
            running.batches += 1
            running.samples += len(y)
            running.loss_sum += value * len(y)
            running.seconds = time.perf_counter() - started
            self.step += 1
            if progress is not None:
                progress(self.step, total, value)
        passes.ready()
        if not running.samples:
            raise InputError("the loader gave no batch")
        seen = torch.tensor([running.loss_sum, running.samples, self._correct.item()], dtype=torch.float64, device=self.ranks.place)
        loss_sum, samples, correct = self.ranks.total(seen).tolist()
        record = {
            "epoch": len(self.history),
            "step": self.step,
            "lr": self.optimizers[0][0].param_groups[0]["lr"] if self.optimizers else 0.0,
            "loss": loss_sum / samples,
            "accuracy": correct / samples,
            "seconds": time.perf_counter() - started,
        }
        if self.loss_scale is not None:
            record["skipped"] = self.loss_scale.skipped
        self._running = None
        self.history.append(record)
        return record

    def _update(self, x: Tensor, y: Tensor, factor: float, index: int) -> float:
        """One step at `factor` times the learning rates; returns the loss."""
        for optimizer, lr in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * factor
            optimizer.zero_grad(set_to_none=True)
        scale, correct = self.loss_scale, []

        def part(x: Tensor, y: Tensor) -> Tensor:
            with torch.autocast(x.device.type, dtype=self.autocast, enabled=self.autocast is not None):
                logits = self.model(x)
                loss = self.loss(logits, y)
                if not self.ranks.all(math.isfinite(loss.item())):
                    raise self._refusal(loss.item(), x)
            if torch.is_grad_enabled():
                correct.append((logits.detach().argmax(1) == y).sum())
            return loss

        def backward(loss: Tensor) -> None:
            (loss if scale is None else scale.scaled(loss)).backward()  # type: ignore[no-untyped-call]

        try:
            loss = in_parts(self.model, part, (x, y), self.accumulate, backward)
        except NonFiniteError as error:
            error.on(index, x, y)
            raise
        backward(loss)
        value: float = loss.item()
        nonfinite = partial(nonfinite_gradient, self.model)
        parameter = nonfinite() if scale is None else scale.unscale([optimizer for optimizer, _ in self.optimizers], nonfinite)
        if parameter is not None and (scale is None or scale.hopeless):
            raise NonFiniteError(self.step, None, value, parameter).on(index, x, y)
        for optimizer, _ in self.optimizers if parameter is None else ():
            optimizer.step()
        self._correct += torch.stack(correct).sum()
        return value

    def _refusal(self, loss: float, x: Tensor) -> NonFiniteError:
        """The error of the first rank whose loss is not finite."""
        layer = None if math.isfinite(loss) else first_nonfinite_layer(self.model, partial(unwrap(self.model), x))
        return refusal(self.step, loss, layer, self.ranks)

    def fit(
        self,
        loader: Batches | Callable[[int], Batches],
        *,
        val_loader: Batches | None = None,
        on_epoch: Callable[[dict[str, float], Trainer], None] | None = None,
        progress: Callable[[int, int, float], None] | None = None,
        passes: Passes | None = None,
    ) -> list[dict[str, float]]:
        """The passes that are left; as `fit`, whose arguments these are. passes: is told where they begin."""
        for epoch in range(len(self.history), self.epochs):
            record = self.run_epoch(loader(epoch) if callable(loader) else loader, progress, passes)
            model = unwrap(self.model)
            self.ranks.synchronise(model)
            if val_loader is not None:
                record["val_loss"], record["val_accuracy"] = evaluate(model, val_loader, self.loss, self.channels_last, self.ranks)
            if on_epoch is not None:
                on_epoch(record, self)
        return self.history

    def state_dict(self) -> dict[str, Any]:
        running = self._running or self._left
        if running is not None and running is self._running:
            running.correct = int(self._correct)
        return {
            "model": unwrap(self.model).state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer, _ in self.optimizers],
            "step": self.step,
            "history": self.history,
            "running": None if running is None else asdict(running),
            **({} if self.loss_scale is None else {"loss_scale": self.loss_scale.state_dict()}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        unwrap(self.model).load_state_dict(state["model"])
        for (optimizer, _), saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step = state["step"]
        self.history = [dict(record) for record in state["history"]]
        if self.loss_scale is not None and "loss_scale" in state:
            self.loss_scale.load_state_dict(state["loss_scale"])
        running = state.get("running")
        self._running, self._left = None, None if running is None else Running(**running)


def fit(
    model: nn.Module,
    loader: Batches | Callable[[int], Batches],
    epochs: int,
    *,
    val_loader: Batches | None = None,
    on_epoch: Callable[[dict[str, float], Trainer], None] | None = None,
    progress: Callable[[int, int, float], None] | None = None,
    resume: dict[str, Any] | None = None,
    **options: Any,
) -> list[dict[str, float]]:
    """Train `model` in place for `epochs` passes and return one record per pass (`Trainer.run_epoch`, plus val_loss, val_accuracy).

    `loader` may be a function of the epoch (0-based) that returns the loader. SGD with Nesterov momentum trains the weights, Adam the
    quantizers' parameters at a rate of their own; both rates rise and then fall along a cosine. `options` are those of `Trainer`.
    on_epoch(record, trainer) follows every pass; saving trainer.state_dict() there and giving it back as `resume` continues the run.
    """
    trainer = Trainer(model, epochs, **options)
    if resume is not None:
        trainer.load_state_dict(resume)
    return trainer.fit(loader, val_loader=val_loader, on_epoch=on_epoch, progress=progress)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable[Any],
    loss: LossFunction = F.cross_entropy,
    channels_last: bool = True,
    ranks: Ranks = ALONE,
) -> tuple[float, float]:
    """(mean loss, share of correct answers in 0..1) in eval mode; `loss` must be a mean over the batch. Module modes are put back.

    channels_last  images are brought into this layout, False: into the plain one
    ranks          whose batches count together
    """
    device = device_of(model)
    samples, loss_sum, correct = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.int64)
    loss_sum, correct = loss_sum.to(device), correct.to(device)
    with kept_modes(model):
        model.eval()
        for x, y in loader:
            x, y = move(x, device, channels_last), y.to(device, non_blocking=True)
            logits = model(x)
            loss_sum += loss(logits, y) * len(y)
            correct += (logits.argmax(1) == y).sum()
            samples += len(y)
    found = torch.tensor([loss_sum.item(), correct.item(), samples], dtype=torch.float64, device=ranks.place)
    total, right, count = ranks.total(found).tolist()
    if not count:
        raise InputError("the loader gave no batch")
    return total / count, right / count


def device_of(model: nn.Module) -> torch.device:
    """Where the first parameter is; the CPU for a model without any."""
    parameter = next(model.parameters(), None)
    return parameter.device if parameter is not None else torch.device("cpu")


def move(x: Tensor, device: torch.device, channels_last: bool = True) -> Tensor:
    """x on `device`; images in channels_last, or in the plain layout."""
    return laid_out(x.to(device, non_blocking=True), channels_last)

"""The outer loop of Zur et al. (1904.09872): logits and weights in turns, the weights with gradual quantization.

    for every outer epoch e:
        logit steps over part e mod (number of parts) of the search data
        weight epochs with stages 0 … L, and one more with everything quantized; a new configuration for every batch

From the original: the loop, the parts, L + 2 weight epochs. Ours: what it logs is a mean over the search data only, never over the test
set; it does not train the configurations found on the way (`qprune study` compares networks). Per-step alternation is `Search.fit`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qprune.errors import InputError, NonFiniteError
from qprune.passes import Passes, following
from qprune.search.configurations import Configurations, mean_losses
from qprune.search.driver import Loss, Search
from qprune.search.method import StepResult
from qprune.search.zur import Zur

Batches = Iterable[tuple[Tensor, Tensor]]


def alternate(
    search: Search,
    weight_loader: Batches,
    arch_loaders: Sequence[Batches],
    epochs: int = 40,
    loss: Loss = F.cross_entropy,
    homogeneous: bool = False,
    on_step: Callable[[StepResult], None] | None = None,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
    passes: Passes | None = None,
) -> list[dict[str, Any]]:
    """Continue a search with method "zur" until it has `epochs` outer epochs; returns the history, to which each adds

        loss         mean of the weight epochs' batches
        arch_loss    mean of the logit steps' sampled configurations
        likely_loss  of the logits' own configuration (see extraction.extract), over all parts, before the epoch
        homogeneous  with homogeneous=True: {"w/a": loss} of every pair as the only candidate, in the same way
        cost_ratio   expected cost over budget, multiplier, entropy and expected bits, as Search.fit

    weight_loader  batches (x, y) that weights learn from
    arch_loaders   the parts of the other data (the original: 4)
    passes         is told where a pass begins; a search whose state was saved in one goes on there, as in Search.fit

    Raises InputError for another method, and for an empty loader.
    """
    method = search.method
    if not isinstance(method, Zur):
        raise InputError(f"alternate: needs a search with method='zur', got {method.name!r}")
    if not arch_loaders:
        raise InputError("alternate: pass at least one loader for the logits in arch_loaders")

    def task(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return loss(model(x), y)

    task = search.cast(task)

    def losses(choices: dict[str, Tensor]) -> list[float]:
        batches = [batch for loader in arch_loaders for batch in _batches(loader, search.model)]
        each = [mean_losses(search.model, choices, task, batch, method.statistics, method.accumulate) * len(batch[1]) for batch in batches]
        total = torch.stack(each).sum(0)
        return method.ranks.mean(total / sum(len(y) for _, y in batches)).tolist()  # type: ignore[no-any-return]

    for epoch in range(len(search.history), epochs):
        entry = _epoch(search, weight_loader, arch_loaders, epoch, task, losses, homogeneous, on_step, passes or Passes())
        search.history.append(entry)
        search.running = None
        if on_epoch is not None:
            on_epoch(entry)
    return search.history


def _epoch(
    search: Search,
    weight_loader: Batches,
    arch_loaders: Sequence[Batches],
    epoch: int,
    task: Callable[..., Tensor],
    losses: Callable[[dict[str, Tensor]], list[float]],
    homogeneous: bool,
    on_step: Callable[[StepResult], None] | None,
    passes: Passes,
) -> dict[str, Any]:
    """One outer epoch, or the rest of one. `search.running`: the entry so far, which pass is going on, and what it had."""
    method = search.method
    assert isinstance(method, Zur)
    running = search.take_up()
    if running is None:
        entry: dict[str, Any] = {"epoch": epoch, "likely_loss": losses(method.configurations.likely())[0]}
        if homogeneous:
            labels, choices = homogeneous_choices(method.configurations)
            entry["homogeneous"] = dict(zip(labels, losses(choices), strict=True))
        running = {"entry": entry, "pass": 0, "batches": 0, "samples": 0, "total": 0.0, "values": None}
    search.running, entry = running, running["entry"]

    def go(loader: Batches, step: Callable[..., StepResult]) -> None:
        """One pass."""
        passes.begin()
        for x, y in _batches(loader, search.model, running["batches"]):
            passes.ready()
            try:
                result = step(task, (x, y))
            except NonFiniteError as error:
                error.on(running["batches"], x, y)
                raise
            running["total"] = result.values[0] * len(y) + running["total"]
            running.update(values=result.values, batches=running["batches"] + 1, samples=running["samples"] + len(y))
            if on_step is not None:
                on_step(result)
        passes.ready()
        running["pass"] += 1
        running["batches"] = 0

    def mean() -> float:
        found = float(method.ranks.mean(running["total"] / running["samples"]))
        running.update(total=0.0, samples=0)
        return found

    if running["pass"] == 0:
        go(arch_loaders[epoch % len(arch_loaders)], method.logit_step)
        entry["arch_loss"] = mean()
    search.model.train()
    stages = method.stages.epochs if method.staged else [len(method.stages) - 1]
    for stage in stages[running["pass"] - 1 :]:
        method.stages.set(stage)
        go(weight_loader, method.weight_step)
    entry["loss"] = mean()
    worst = running["values"].tolist()
    return entry | {"cost_ratio": worst[1], "multiplier": worst[2], **search.skips(), **method.summary()}


def homogeneous_choices(configurations: Configurations) -> tuple[list[str], dict[str, Tensor]]:
    """(labels "w/a", choices [S, F] per searched unit) of the S networks that have one candidate pair everywhere. A unit without that pair
    takes the one with the closest weight bits, of those the closest activation bits."""
    pairs = list(dict.fromkeys(pair for unit in configurations.units.values() if unit.produces for pair in unit.candidates))
    pairs = pairs or list(dict.fromkeys(pair for unit in configurations.units.values() for pair in unit.candidates))
    choices = {}
    for (name, unit), gate in zip(configurations.units.items(), configurations.gates, strict=True):
        closest = [min(range(len(unit.candidates)), key=lambda k: _distance(unit.candidates[k], pair)) for pair in pairs]
        choices[name] = torch.tensor(closest, device=gate.logits.device).unsqueeze(1).expand(-1, gate.filters)
    return [f"{w}/{a}" for w, a in pairs], choices


def _distance(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    return abs(one[0] - other[0]), abs(one[1] - other[1])


def _batches(loader: Batches, model: nn.Module, done: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Those behind the first `done`, on the model's device."""
    device = next(model.parameters()).device
    empty = done == 0
    for x, y in following(loader, done):
        empty = False
        yield x.to(device, non_blocking=True), y.to(device, non_blocking=True)
    if empty:
        raise InputError("alternate: a loader gave no batch")

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

from qprune.errors import InputError
from qprune.nn.stacked import losses
from qprune.search.configurations import Configurations
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
) -> list[dict[str, Any]]:
    """Continue a search with method "zur" until it has `epochs` outer epochs; returns the history, to which each adds

        loss         mean of the weight epochs' batches
        arch_loss    mean of the logit steps' sampled configurations
        likely_loss  of the logits' own configuration (see extraction.extract), over all parts, before the epoch
        homogeneous  with homogeneous=True: {"w/a": loss} of every pair as the only candidate, in the same way
        cost_ratio   expected cost over budget, multiplier, entropy and expected bits, as Search.fit

    weight_loader  batches (x, y) that weights learn from
    arch_loaders   the parts of the other data (the original: 4)

    Raises InputError for another method, and for an empty loader.
    """
    method = search.method
    if not isinstance(method, Zur):
        raise InputError(f"alternate: needs a search with method='zur', got {method.name!r}")
    if not arch_loaders:
        raise InputError("alternate: pass at least one loader for the logits in arch_loaders")
    configurations = method.configurations

    def task(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return loss(model(x), y)

    def mean_losses(choices: dict[str, Tensor]) -> list[float]:
        batches = [batch for loader in arch_loaders for batch in _batches(loader, search.model)]
        total = torch.stack([losses(search.model, choices, task, batch, method.statistics) * len(batch[1]) for batch in batches]).sum(0)
        return (total / sum(len(y) for _, y in batches)).tolist()  # type: ignore[no-any-return]

    def told(result: StepResult) -> Tensor:
        if on_step is not None:
            on_step(result)
        return result.values

    for epoch in range(len(search.history), epochs):
        entry: dict[str, Any] = {"epoch": epoch, "likely_loss": mean_losses(configurations.likely())[0]}
        if homogeneous:
            labels, choices = homogeneous_choices(configurations)
            entry["homogeneous"] = dict(zip(labels, mean_losses(choices), strict=True))
        part = _batches(arch_loaders[epoch % len(arch_loaders)], search.model)
        entry["arch_loss"] = _mean([(told(method.logit_step(task, batch))[0], len(batch[1])) for batch in part])
        search.model.train()
        steps = []
        for stage in method.stages.epochs if method.staged else [len(method.stages) - 1]:
            method.stages.set(stage)
            steps += [(told(method.weight_step(task, batch)), len(batch[1])) for batch in _batches(weight_loader, search.model)]
        entry["loss"] = _mean([(values[0], size) for values, size in steps])
        entry |= {"cost_ratio": float(steps[-1][0][1]), "multiplier": float(steps[-1][0][2]), **method.summary()}
        search.history.append(entry)
        if on_epoch is not None:
            on_epoch(entry)
    return search.history


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


def _batches(loader: Batches, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    device = next(model.parameters()).device
    empty = True
    for x, y in loader:
        empty = False
        yield x.to(device, non_blocking=True), y.to(device, non_blocking=True)
    if empty:
        raise InputError("alternate: a loader gave no batch")


def _mean(values: Sequence[tuple[Tensor, int]]) -> float:
    return float(sum(value * size for value, size in values) / sum(size for _, size in values))

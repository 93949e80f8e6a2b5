"""Whether pruned channels really can be taken out of a network: tried on a copy, before anything is promised."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qprune.geometry import ChannelGroup, ExampleInputs, Geometry, channel_axis, describe, first_input, run, weighted_layers
from qprune.nn.narrow import NORMS, sliceable
from qprune.nn.surgery import copy_model
from qprune.removal import apply_removal
from qprune.removal_plan import plan_removal

_TOLERANCE = 2e-4
_CHANNELS, _FILTERS = 0.3, 0.1
"""Shares of channels that are pruned as a whole, and of other filters."""


def rehearsed(groups: tuple[ChannelGroup, ...], twin: nn.Module, example_inputs: ExampleInputs) -> tuple[ChannelGroup, ...]:
    """The groups, without consumers that do not read zero where all filters are pruned, and with `removable` and `why`.

    twin  a float copy of the network, in eval mode; it is not changed

    Random filters are pruned of a copy whose parameters and running statistics are random enough to hide nothing. The outputs of the
    network with zeros, and with the channels removed, have to agree on the example. Where they do not, each set of channels that are tied
    is tried alone.
    """
    with torch.no_grad():
        return _Rehearsal(groups, twin, example_inputs).result()


class _Rehearsal:
    def __init__(self, groups: tuple[ChannelGroup, ...], twin: nn.Module, example_inputs: ExampleInputs) -> None:
        self.groups, self.inputs = groups, example_inputs
        self.random = torch.Generator().manual_seed(0)
        self.twin = self._shaken(twin)
        self.layers = {name: describe(name, layer, 1) for name, layer in weighted_layers(self.twin)}
        self.axes = {name: channel_axis(layer) for name, layer in weighted_layers(self.twin)}
        self.streams = _streams(groups)
        self.pruned = self._pruned()

    def result(self) -> tuple[ChannelGroup, ...]:
        expected, broken = self._masked()
        self.groups = tuple(
            replace(group, consumers={name: pairs for name, pairs in group.consumers.items() if name not in broken})
            for group in self.groups
        )
        if broken:
            expected, _ = self._masked()
        selfish = {
            stream for group, stream in zip(self.groups, self.streams, strict=True) if group.producers.keys() & group.consumers.keys()
        }
        reasons = dict.fromkeys(selfish, "a layer reads what it made itself")
        every = set(self.streams) - selfish
        if self._problem(expected, every) is not None:
            for stream in sorted(every):
                problem = self._problem(expected, {stream})
                if problem is not None:
                    reasons[stream] = problem
            rest = every - reasons.keys()
            problem = self._problem(expected, rest) if rest else None
            reasons |= dict.fromkeys(rest, problem) if problem is not None else {}
        return self._marked(reasons)

    def _marked(self, reasons: Mapping[int, str]) -> tuple[ChannelGroup, ...]:
        read = {s for group, s in zip(self.groups, self.streams, strict=True) if group.consumers or group.carriers}
        reasons = {**dict.fromkeys(set(self.streams) - read, "no layer is known to read them"), **reasons}
        return tuple(
            replace(group, removable=stream not in reasons, why=reasons.get(stream, ""))
            for group, stream in zip(self.groups, self.streams, strict=True)
        )

    def _shaken(self, twin: nn.Module) -> nn.Module:
        """A copy with random statistics, and with random values where parameters are all alike, or vectors."""
        copied = copy_model(twin).requires_grad_(False)

        def uniform(like: Tensor, low: float, high: float) -> Tensor:
            return (torch.rand(like.shape, generator=self.random) * (high - low) + low).to(like)

        for value in copied.parameters():
            if value.is_floating_point() and value.numel() and (value.dim() < 2 or bool(value.min() == value.max())):
                value.copy_(uniform(value, 0.4, 1.2))
        for module in copied.modules():
            if isinstance(module, NORMS) and isinstance(module.running_mean, Tensor) and isinstance(module.running_var, Tensor):
                module.running_mean.add_(module.running_var.sqrt() * uniform(module.running_mean, -0.5, 0.5))
                module.running_var.mul_(uniform(module.running_var, 0.7, 1.4))
        return copied

    def _pruned(self) -> dict[str, list[int]]:
        """Filters of layers that can be pruned, never all of them; of channels as a whole, and on their own."""
        modules = dict(weighted_layers(self.twin))
        chosen: dict[str, np.ndarray] = {
            name: self._draw(layer.filters, _FILTERS) for name, layer in self.layers.items() if sliceable(modules[name])
        }
        for group in self.groups:
            gone = self._draw(group.size, _CHANNELS)
            for name in group.producers.keys() & chosen.keys():
                chosen[name][np.array(group.producers[name], int)[gone]] = True
        for rows in chosen.values():
            rows[0] = False
        return {name: np.flatnonzero(rows).tolist() for name, rows in chosen.items() if rows.any()}

    def _draw(self, size: int, share: float) -> np.ndarray:
        drawn = np.asarray(torch.rand(size, generator=self.random).numpy() < share)
        if size > 1 and share == _CHANNELS and not drawn[1:].any():
            drawn[1] = True
        return drawn

    def _masked(self) -> tuple[list[Tensor], set[str]]:
        """The outputs of the network with zeros, and the layers that read something else than zero where they should."""
        geometry = Geometry(self.layers, self.groups)
        gone = {name: left.gone for name, left in plan_removal(geometry, self.pruned, remove=False).layers.items() if left.gone.any()}
        twin, _ = apply_removal(copy_model(self.twin), geometry, self.pruned, remove=False)
        broken: set[str] = set()

        def check(name: str):  # type: ignore[no-untyped-def]
            def hook(layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
                x = first_input(args, kwargs)
                dead = x.movedim(self.axes[name], 0)[torch.from_numpy(gone[name]).to(x.device)]
                if not bool(dead.abs().max() <= 1e-6 * x.abs().max()):
                    broken.add(name)

            return hook

        modules = dict(twin.named_modules())
        handles = [modules[name].register_forward_pre_hook(check(name), with_kwargs=True) for name in gone]
        outputs = run(twin, self.inputs)
        for handle in handles:
            handle.remove()
        return [value for value in tree_leaves(outputs) if isinstance(value, Tensor)], broken

    def _problem(self, expected: Sequence[Tensor], streams: Collection[int]) -> str | None:
        """Why the channels of these streams cannot be removed together; None if they can."""
        groups = tuple(replace(group, removable=stream in streams) for group, stream in zip(self.groups, self.streams, strict=True))
        try:
            twin, _ = apply_removal(copy_model(self.twin), Geometry(self.layers, groups), self.pruned)
            outputs = run(twin, self.inputs)
        except Exception as error:  # whatever the network's own code says to a tensor of fewer channels
            return f"the network does not run without some of them ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
        found = [value for value in tree_leaves(outputs) if isinstance(value, Tensor)]
        if not found or [y.shape for y in found] != [y.shape for y in expected]:
            return "they are channels of the network's output"
        if all(_close(y, e) for y, e in zip(found, expected, strict=True)):
            return None
        return "the network computes something else without some of them"


def _close(y: Tensor, expected: Tensor) -> bool:
    if not y.is_floating_point():
        return bool((y == expected).all())
    return not y.numel() or bool((y - expected).abs().max() <= _TOLERANCE * expected.abs().max())


def _streams(groups: Sequence[ChannelGroup]) -> list[int]:
    """A number per group, the same for groups that have filters in common."""
    parent = list(range(len(groups)))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    owner: dict[tuple[str, int], int] = {}
    for i, group in enumerate(groups):
        if not (group.consumers or group.carriers):
            continue
        for name, filters in group.producers.items():
            for f in filters:
                other = owner.setdefault((name, f), i)
                a, b = sorted((root(i), root(other)))
                parent[b] = a
    # a group that nothing reads may join others: it shares the fate of the first that it touches
    for i, group in enumerate(groups):
        if not (group.consumers or group.carriers):
            touched = [owner[name, f] for name, filters in group.producers.items() for f in filters if (name, f) in owner]
            parent[i] = root(touched[0]) if touched else i
    return [root(i) for i in range(len(groups))]

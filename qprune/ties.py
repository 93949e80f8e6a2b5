"""Filters that can only be pruned together: which they are, and the gates that they share.

Filters whose outputs are added, or multiplied channel by channel, make one channel: it can be removed once all of them are gone. A
depthwise filter and the channel that it reads stand or fall together. A grouped convolution loses filters and input channels in equal
numbers per group, so what has the same place in every group is one choice.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from qprune.gates import Gate, TiedGate
from qprune.geometry import ChannelGroup, Geometry
from qprune.nn.mixing import Mixing
from qprune.space import PRUNED

_Edges = Iterator[tuple[np.ndarray, np.ndarray]]
_Members = Sequence[tuple[Mixing, tuple[int, ...]]]


@dataclass(frozen=True)
class Tie:
    """Layers whose filters share choices of 0 bits.

    size      number of choices
    channels  layer → the choice that each of its filters follows, 0 … size − 1; a filter may be the only one that follows its choice
    """

    size: int
    channels: dict[str, tuple[int, ...]]


class _Filters:
    """All filters of all layers under one numbering, with the classes of those that are pruned together."""

    def __init__(self, geometry: Geometry, prunable: Collection[str]) -> None:
        self.layers, self.prunable = geometry.layers, prunable
        sizes = [layer.filters for layer in self.layers.values()]
        self.starts = dict(zip(self.layers, np.concatenate([[0], np.cumsum(sizes)]).tolist(), strict=False))
        self.first_at: dict[tuple[str, int], int] = {}
        groups = [group for group in geometry.groups if group.producers and group.producers.keys() <= set(prunable)]
        edges = [*self._within_layers(), *(edge for group in groups for edge in self._across(group))]
        a, b = (np.concatenate([np.zeros(0, int), *side]) for side in zip(*edges, strict=True)) if edges else (np.zeros(0, int),) * 2
        graph = coo_array((np.ones(len(a)), (a, b)), shape=(sum(sizes), sum(sizes)))
        self.classes = np.asarray(connected_components(graph, directed=False)[1])

    def of(self, name: str) -> np.ndarray:
        return self.starts[name] + np.arange(self.layers[name].filters)

    def _within_layers(self) -> _Edges:
        for name, layer in self.layers.items():
            if layer.groups > 1 and not layer.depthwise:
                filters = self.of(name)
                yield filters, self.starts[name] + (filters - self.starts[name]) % (layer.filters // layer.groups)

    def _across(self, group: ChannelGroup) -> _Edges:
        """Between the filters that make a channel which somebody reads, and those of grouped and depthwise layers that read it."""
        made = [self.starts[name] + np.array(filters, int) for name, filters in group.producers.items()]
        for name, pairs in group.consumers.items():
            if name not in self.layers:
                continue
            layer, (inputs, channels) = self.layers[name], np.array(pairs, int).reshape(-1, 2).T
            for other in made[1:]:
                yield made[0][channels], other[channels]
            if layer.depthwise and name in self.prunable:
                each = layer.filters // layer.groups
                for offset in range(each):
                    yield made[0][channels], self.starts[name] + inputs * each + offset
            elif layer.groups > 1 and not layer.depthwise:
                nodes, places = made[0][channels], inputs % layer.inputs
                same = [self.first_at.setdefault((name, p), n) for n, p in zip(nodes.tolist(), places.tolist(), strict=True)]
                yield nodes, np.array(same, int)


def filterwise(layer: Mixing) -> bool:
    """True if filters of a layer may choose 0 bits, each for itself, by gates that can be tied."""
    space, kind = layer.space, type(layer.weight_gate)
    return space.granularity == "filter" and kind in (Gate, TiedGate) and {True, False} == {w == PRUNED for w, _ in space.candidates}


def tied_channels(geometry: Geometry, prunable: Collection[str]) -> tuple[Tie, ...]:
    """What is pruned together, in the order of the layers. Where a layer that is not `prunable` makes a channel too, or nobody is known to
    read it, it is never gone: its filters are pruned on their own.

    prunable  layers whose filters may choose 0 bits, each for itself
    """
    filters = _Filters(geometry, prunable)
    names = [name for name in geometry.layers if name in prunable]
    classes = {name: filters.classes[filters.of(name)] for name in names}
    everything = np.concatenate([np.zeros(0, int), *classes.values()])
    shared, counts = np.unique(everything, return_counts=True)
    several = set(shared[counts > 1].tolist())
    layers_of: dict[int, list[int]] = {}
    for number, name in enumerate(names):
        for label in several.intersection(classes[name].tolist()):
            layers_of.setdefault(label, []).append(number)
    a, b = (np.array(side, int) for side in zip(*((m[0], n) for m in layers_of.values() for n in m), strict=True)) if several else ((), ())
    together = connected_components(coo_array((np.ones(len(a)), (a, b)), shape=(len(names), len(names))), directed=False)[1]
    members: dict[int, list[str]] = {}
    for number in sorted({n for m in layers_of.values() for n in m}):
        members.setdefault(int(together[number]), []).append(names[number])
    return tuple(_tie({name: classes[name] for name in group}) for group in members.values())


def _tie(classes: dict[str, np.ndarray]) -> Tie:
    order = {label: number for number, label in enumerate(dict.fromkeys(np.concatenate(list(classes.values())).tolist()))}
    return Tie(len(order), {name: tuple(order[label] for label in labels.tolist()) for name, labels in classes.items()})


def not_removable(geometry: Geometry, prunable: Collection[str]) -> dict[str, str]:
    """Layer of `prunable` → why some of its channels remain for layers that read them, though its filters are pruned."""
    reasons = {}
    for name in (name for name in geometry.layers if name in prunable):
        groups = [group for group in geometry.groups if name in group.producers and group.consumers]
        others = dict.fromkeys(other for group in groups for other in group.producers if other not in prunable)
        read = {group.producers[name][r] for group in groups for pairs in group.consumers.values() for _, r in pairs}
        why = dict.fromkeys(group.why for group in groups if not group.removable and group.why)
        if others:
            reasons[name] = f"its channels are those of {', '.join(others)} too, which cannot be pruned per filter"
        elif len(read) < geometry.layers[name].filters:
            reasons[name] = "no layer is known to read its channels"
        elif why:
            reasons[name] = ", ".join(why)
    return reasons


def tie_gates(model: nn.Module, geometry: Geometry | None) -> None:
    """Let the filters of a prepared model that are pruned together share their gate of 0 bits, in place. Its logits start at the mean of
    what the layers had. Gates that are tied as they should be stay; those that no longer should be are their layer's own again.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Mixing)}
    ties = () if geometry is None else tied_channels(geometry, {name for name, layer in layers.items() if filterwise(layer)})
    members = [[(layers[name], channels) for name, channels in tie.channels.items()] for tie in ties]
    tied = {layer for group in members for layer, _ in group}
    for layer in layers.values():
        if isinstance(layer.weight_gate, TiedGate) and layer not in tied:
            layer.weight_gate = _own_gate(layer.weight_gate)
    for tie, group in zip(ties, members, strict=True):
        if not _tied_already(group):
            prune = _shared_gate(group, tie.size)
            for layer, channels in group:
                gate = TiedGate(_pruned_columns(layer), channels, prune)
                layer.weight_gate = _as_before(gate, _learned(layer))


def _pruned_columns(layer: Mixing) -> list[bool]:
    weights = [w for w, _ in layer.space.candidates] if layer.space.joint else layer.space.w_bits
    return [w == PRUNED for w in weights]


def _tied_already(group: _Members) -> bool:
    gates = [(layer.weight_gate, channels) for layer, channels in group]
    prunes = {gate.prune for gate, channels in gates if isinstance(gate, TiedGate) and gate.channels == channels}
    return len(prunes) == 1 and all(isinstance(gate, TiedGate) and gate.prune in prunes and gate.channels == c for gate, c in gates)


def _learned(layer: Mixing) -> Gate:
    assert isinstance(layer.weight_gate, Gate)
    return layer.weight_gate


@torch.no_grad()
def _log_odds(gate: Gate, columns: Sequence[bool]) -> Tensor:
    """log(p(0 bits) / p(others)) of every filter, at temperature 1."""
    if isinstance(gate, TiedGate):
        return gate.prune.logits[gate.index].diff(dim=1).neg().squeeze(1)
    pruned = torch.tensor(columns, device=gate.logits.device)
    return gate.logits[:, pruned].logsumexp(1) - gate.logits[:, ~pruned].logsumexp(1)


@torch.no_grad()
def _shared_gate(group: _Members, size: int) -> Gate:
    gates = [_learned(layer) for layer, _ in group]
    prune = Gate(2, size, gates[0].logits.device)
    odds = torch.cat([_log_odds(gate, _pruned_columns(layer)) for gate, (layer, _) in zip(gates, group, strict=True)])
    index = torch.tensor([channel for _, channels in group for channel in channels], device=odds.device)
    count = torch.bincount(index, minlength=size)
    prune.logits[:, 0] = torch.zeros(size, dtype=odds.dtype, device=odds.device).index_add(0, index, odds) / count
    prune.mode = gates[0].mode
    prune.temperature.copy_(gates[0].temperature)
    return prune


@torch.no_grad()
def _own_gate(tied: TiedGate) -> Gate:
    gate = _as_before(Gate(len(tied.columns), len(tied.channels), tied.logits.device), tied)
    missing = _log_odds(tied, tied.columns) - _log_odds(gate, tied.columns)
    gate.logits.add_(missing.unsqueeze(1) * tied.pruned)
    return gate


@torch.no_grad()
def _as_before(gate: Gate, before: Gate) -> Gate:
    gate.logits.copy_(before.logits)
    gate.temperature.copy_(before.temperature)
    gate.choice.copy_(before.choice)
    gate.mode = before.mode
    return gate.train(before.training)

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
        self.layers = geometry.layers
        sizes = [layer.filters for layer in self.layers.values()]
        self.starts = dict(zip(self.layers, np.concatenate([[0], np.cumsum(sizes)]).tolist(), strict=False))
        self.total = sum(sizes)
        groups = [g for g in geometry.groups if not (g.producers.keys() | g.consumers.keys()) - self.layers.keys()]
        within = list(self._within_layers())
        linked = self._classes([*within, *(edge for group in groups for edge in self._across(group))])
        self.fixed = self._where(linked, [self.of(name) for name in self.layers if name not in prunable])
        self.read = self._where(linked, [self._read_filters(group) for group in groups])
        self.linked, apart = linked, self._classes(within)
        self.classes = np.where((self.read & ~self.fixed)[linked], linked, apart + linked.max(initial=0) + 1)

    def of(self, name: str) -> np.ndarray:
        return self.starts[name] + np.arange(self.layers[name].filters)

    def _classes(self, edges: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        a, b = (np.concatenate([np.zeros(0, int), *side]) for side in zip(*edges, strict=True)) if edges else (np.zeros(0, int),) * 2
        return np.asarray(connected_components(coo_array((np.ones(len(a)), (a, b)), shape=(self.total, self.total)), directed=False)[1])

    @staticmethod
    def _where(classes: np.ndarray, members: list[np.ndarray]) -> np.ndarray:
        """Whether a class has one of the members."""
        found = np.zeros(classes.max(initial=-1) + 1, bool)
        found[classes[np.concatenate([np.zeros(0, int), *members])]] = True
        return found

    def _read_filters(self, group: ChannelGroup) -> np.ndarray:
        rows = sorted({r for pairs in group.consumers.values() for _, r in pairs})
        filters = [self.starts[name] + np.array(made)[rows] for name, made in group.producers.items()]
        return np.concatenate([np.zeros(0, int), *filters])

    def _within_layers(self) -> _Edges:
        for name, layer in self.layers.items():
            if layer.groups > 1 and not layer.depthwise:
                filters = self.of(name)
                yield filters, self.starts[name] + (filters - self.starts[name]) % (layer.filters // layer.groups)

    def _across(self, group: ChannelGroup) -> _Edges:
        names = list(group.producers)
        if not names:
            return
        first = self.starts[names[0]] + np.array(group.producers[names[0]], int)
        for name in names[1:]:
            yield first, self.starts[name] + np.array(group.producers[name], int)
        for name, pairs in group.consumers.items():
            layer, (inputs, channels) = self.layers[name], np.array(pairs, int).reshape(-1, 2).T
            if layer.depthwise:
                each = layer.filters // layer.groups
                for offset in range(each):
                    yield first[channels], self.starts[name] + inputs * each + offset
            elif layer.groups > 1:
                places = inputs % layer.inputs
                lead = dict(zip(places.tolist(), channels.tolist(), strict=True))
                yield first[channels], first[[lead[place] for place in places.tolist()]]


def filterwise(layer: Mixing) -> bool:
    """True if filters of a layer may choose 0 bits, each for itself, by gates that can be tied."""
    space, kind = layer.space, type(layer.weight_gate)
    return space.granularity == "filter" and kind in (Gate, TiedGate) and {True, False} == {w == PRUNED for w, _ in space.candidates}


def tied_channels(geometry: Geometry, prunable: Collection[str]) -> tuple[Tie, ...]:
    """What is pruned together, in the order of the layers. A channel that nobody is known to read, or that a layer which is not `prunable`
    makes too, is never removed: its filters are pruned on their own.

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
    """Layer of `prunable` → why some of its filters, once pruned, leave a channel that other layers still read."""
    filters, reasons = _Filters(geometry, prunable), {}
    for name in (name for name in geometry.layers if name in prunable):
        mine = np.unique(filters.linked[filters.of(name)])
        if filters.fixed[mine].any():
            others = [
                other for other in geometry.layers if other not in prunable and np.isin(filters.linked[filters.of(other)], mine).any()
            ]
            reasons[name] = f"its channels are those of {', '.join(others)} too, which cannot be pruned per filter"
        elif not filters.read[mine].all():
            reasons[name] = "no layer is known to read its channels"
        else:
            why = dict.fromkeys(group.why for group in geometry.groups if name in group.producers and not group.removable and group.why)
            reasons |= {name: ", ".join(why)} if why else {}
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

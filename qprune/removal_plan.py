"""What a network loses with its pruned filters: which filters, input channels and entries of normalisations remain, layer by layer.

A channel is gone for a layer that reads it once all filters that make it are at 0 bits. It can be taken out of the tensors between them if
everything that touches these is known (ChannelGroup.removable), and if no other filter writes to it: in a residual stage, one of the
later layers may. Where it stays, the layers at its ends become narrower all the same (see qprune.nn.spread).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from qprune.geometry import ChannelGroup, Geometry, LayerGeometry, Unit

Mask = np.ndarray
"""bool, one entry per filter or channel."""


@dataclass(frozen=True)
class LayerPlan:
    """What remains of a layer.

    rows      filters that are computed, by their old numbers; groups follow each other
    columns   input channels that are read, likewise
    groups    of the convolution; 0 if nothing remains to be computed
    present   input channels that are in the tensor which the layer gets
    outputs   filters that have a channel in the tensor which it gives
    fillers   rows at 0 bits, for a shape that the number of the others would not give
    silent    filters at 0 bits
    gone      [inputs] input channels that nobody makes
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    groups: int
    present: tuple[int, ...]
    outputs: tuple[int, ...]
    fillers: tuple[int, ...]
    silent: tuple[int, ...]
    gone: Mask

    @property
    def inputs(self) -> int:
        """Input channels that one filter reads."""
        return len(self.columns) // max(self.groups, 1)


@dataclass(frozen=True)
class CarrierPlan:
    """Entries of a normalisation (by their old numbers) whose channels are taken out, and those whose channels nobody makes."""

    absent: tuple[int, ...]
    silent: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """layers    of the geometry
    carriers  modules that have entries to lose, or to silence
    """

    layers: dict[str, LayerPlan]
    carriers: dict[str, CarrierPlan]


class _Channels:
    """All filters of all layers under one numbering; those that have one place in every tensor between layers are one channel."""

    def __init__(self, geometry: Geometry, pruned: Mapping[str, Sequence[int]], round_to: int) -> None:
        self.layers = geometry.layers
        counts = [layer.filters for layer in self.layers.values()]
        self.starts = dict(zip(self.layers, np.concatenate([[0], np.cumsum(counts)]).tolist(), strict=False))
        self.total = sum(counts)
        self.pruned = np.zeros(self.total, bool)
        for name, filters in pruned.items():
            self.pruned[self.starts[name] + np.array(filters, int)] = True
        self.groups = [g for g in geometry.groups if not (g.producers.keys() | g.consumers.keys()) - self.layers.keys() and g.producers]
        tied = [g for g in self.groups if g.consumers or g.carriers]
        edges = [(self.made(g, first), self.made(g, other)) for g in tied for first, other in _pairs(g.producers)]
        self.labels = self._components(edges)
        free = np.ones(self.labels.max(initial=-1) + 1, bool)
        free[self.labels[~self.pruned]] = False
        known = np.zeros_like(free)
        for group in tied:
            labels = self._labels_of(group)
            known[labels] = True
            if not group.removable:
                free[labels] = False
        removable = free & known
        self.removed = removable & ~self._kept_for_rounding(removable, round_to)
        self.filler = removable & ~self.removed

    def of(self, name: str) -> np.ndarray:
        return self.starts[name] + np.arange(self.layers[name].filters)

    def made(self, group: ChannelGroup, name: str) -> np.ndarray:
        """The filters of a producer, by the group's channels."""
        return self.starts[name] + np.array(group.producers[name], int)

    def _labels_of(self, group: ChannelGroup) -> np.ndarray:
        return np.concatenate([self.labels[self.made(group, name)] for name in group.producers])

    def _components(self, edges: Iterable[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        ends = list(edges)
        a, b = (np.concatenate([np.zeros(0, int), *side]) for side in zip(*ends, strict=True)) if ends else (np.zeros(0, int),) * 2
        graph = coo_array((np.ones(len(a)), (a, b)), shape=(self.total, self.total))
        return np.asarray(connected_components(graph, directed=False)[1])

    def _kept_for_rounding(self, removable: Mask, round_to: int) -> Mask:
        """The channels of `removable` that stay so that layers which are tied keep a multiple, the first ones."""
        kept = np.zeros_like(removable)
        if round_to == 1:
            return kept
        within = [(self.of(name)[:-1], self.of(name)[1:]) for name in self.layers]
        first = {label: f for f, label in reversed(list(enumerate(self.labels.tolist())))}
        same = [(np.arange(self.total), np.array([first[label] for label in self.labels.tolist()]))]
        streams = self._components([*within, *same])
        for stream in np.unique(streams):
            labels = np.unique(self.labels[streams == stream])
            candidates = labels[removable[labels]]
            remain = len(labels) - len(candidates)
            wanted = -(-remain // round_to) * round_to - remain
            kept[candidates[:wanted]] = True
        return kept


def _pairs(names: Iterable[str]) -> list[tuple[str, str]]:
    listed = list(names)
    return [(listed[0], other) for other in listed[1:]]


def plan_removal(geometry: Geometry, pruned: Mapping[str, Sequence[int]], remove: bool = True, round_to: int = 1) -> Plan:
    """What remains of a network without the filters `pruned`, per layer.

    remove    False: everything remains, and only what is silent and gone is told
    round_to  channels that are taken out leave a multiple of this, where they can: of the layers that are tied, some filters at 0 bits stay
    """
    channels = _Channels(geometry, pruned, round_to if remove else 1)
    gone, unread, absent = ({name: np.zeros(layer.channels, bool) for name, layer in geometry.layers.items()} for _ in range(3))
    carriers: dict[str, tuple[set[int], set[int]]] = {}
    for group in channels.groups:
        made = np.stack([channels.made(group, name) for name in group.producers])
        silent = channels.pruned[made].all(0)
        labels = channels.labels[made[0]]
        out, filler = channels.removed[labels], channels.filler[labels]
        for name in group.consumers.keys() - group.producers.keys():
            i, r = np.array(group.consumers[name], int).reshape(-1, 2).T
            gone[name][i] |= silent[r]
            unread[name][i] |= silent[r] & ~filler[r]
            absent[name][i] |= out[r]
        for name, pairs in group.carriers.items():
            lost, quiet = carriers.setdefault(name, (set(), set()))
            lost.update(i for i, r in pairs if remove and out[r])
            quiet.update(i for i, r in pairs if silent[r])
    layers = {}
    for name, layer in geometry.layers.items():
        filters = channels.of(name)
        removed = channels.removed[channels.labels[filters]]
        dead, filler = channels.pruned[filters], channels.filler[channels.labels[filters]]
        if remove:
            rows, columns = (~dead | filler).reshape(layer.groups, -1), (~unread[name]).reshape(layer.groups, -1)
            rows, columns = _regular(layer, rows, columns, ~removed, ~absent[name], round_to)
            layers[name] = LayerPlan(
                rows=_numbers(rows),
                columns=_numbers(columns),
                groups=int(rows.any(1).sum()),
                present=_numbers(~absent[name]),
                outputs=_numbers(~removed),
                fillers=tuple(f for f in _numbers(rows) if dead[f]),
                silent=_numbers(dead),
                gone=gone[name],
            )
        else:
            every = _numbers(np.ones(layer.channels, bool))
            rows = _numbers(np.ones(layer.filters, bool))
            layers[name] = LayerPlan(rows, every, layer.groups, every, rows, (), _numbers(dead), gone[name])
    entries = {name: CarrierPlan(tuple(sorted(lost)), tuple(sorted(quiet))) for name, (lost, quiet) in carriers.items() if lost or quiet}
    return Plan(layers, entries)


def _numbers(mask: Mask) -> tuple[int, ...]:
    return tuple(np.flatnonzero(mask).tolist())


def _regular(layer: LayerGeometry, rows: Mask, columns: Mask, made: Mask, present: Mask, round_to: int) -> tuple[Mask, Mask]:
    """rows and columns, [groups, …], that are to be computed, with others that make them a convolution: groups of which nothing remains are
    dropped, the others have equal numbers. Of the others, those that are in the tensors around it (made, present) come first."""
    made, present = made.reshape(rows.shape), present.reshape(columns.shape)
    alive = np.asarray(rows.any(1) & columns.any(1))
    if layer.groups == 1:
        rows = _filled(rows, made, -(-int(rows.sum()) // round_to) * round_to)
        if layer.kind != "Linear":
            columns = _filled(columns, present, -(-int(columns.sum()) // round_to) * round_to)
    else:
        filters, inputs = (int(mask[alive].sum(1).max(initial=0)) for mask in (rows, columns))
        spare = np.flatnonzero(~alive)
        inside = np.asarray(made.any(1) & present.any(1))
        spare = spare[np.argsort(~inside[spare], kind="stable")]
        missing = next((n for n in range(len(spare)) if filters * (alive.sum() + n) % round_to == 0), len(spare)) if filters else 0
        alive[spare[:missing]] = True
        rows, columns = _filled(rows, made, filters), _filled(columns, present, inputs)
    return rows & alive[:, None], columns & alive[:, None]


def _filled(chosen: Mask, there: Mask, number: int) -> Mask:
    """chosen [groups, …] with so many entries per group, where there are as many, those that are `there` first."""
    result = chosen.copy()
    for row, wanted, known in zip(result, chosen, there, strict=True):
        spare = np.flatnonzero(~wanted)
        spare = spare[np.argsort(~known[spare], kind="stable")]
        row[spare[: max(number - int(wanted.sum()), 0)]] = True
    return result


def smaller(geometry: Geometry, plan: Plan) -> Geometry:
    """The geometry of the network that remains. It knows no channel groups: nothing of it is at 0 bits any more."""
    layers = {}
    for name, layer in geometry.layers.items():
        left = plan.layers[name]
        if left.groups:
            layers[name] = replace(layer, filters=len(left.rows), inputs=left.inputs, groups=left.groups)
    units = {name: _unit(unit, name, geometry, plan) for name, unit in geometry.units.items() if name in layers}
    return Geometry(layers, (), units)


def _unit(unit: Unit, name: str, geometry: Geometry, plan: Plan) -> Unit:
    """The unit, with the channels that its layer still reads, by their place in the tensor that the source's activation gives."""
    if unit.source is None:
        return unit
    made, each = plan.layers[unit.source].outputs, geometry.layers[name].channels // geometry.layers[unit.source].filters
    place = {f: i for i, f in enumerate(made)}
    return replace(unit, channels=tuple(place.get(i // each, 0) for i in plan.layers[name].columns))

"""Whether a geometry that was read from a file can be one: types, sizes, and that what it names is there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qprune.geometry import ChannelGroup, Geometry, LayerGeometry, Unit

MOST = 1 << 24
"""Filters of all layers together, and what else takes memory; real networks have less than a million."""
MOST_POSITIONS = 1 << 48


def check_geometry(geometry: Geometry) -> None:
    """Raise ValueError, with the layer or the group, unless costs can be computed from it, in memory and time as of a real network."""
    for layer in geometry.layers.values():
        _check_layer(layer)
    _expect(sum(layer.filters for layer in geometry.layers.values()) <= MOST, f"it has more than {MOST} filters")
    for number, group in enumerate(geometry.groups):
        _check_group(f"group {number}", group, geometry)
    for name, unit in geometry.units.items():
        _check_unit(name, unit, geometry)


def _check_layer(layer: LayerGeometry) -> None:
    where = f"layer {layer.name!r:.80}"
    _expect(isinstance(layer.name, str) and isinstance(layer.kind, str), f"{where} has no name or kind")
    for key, most in (("filters", MOST), ("inputs", MOST), ("kernel", MOST), ("groups", MOST), ("positions", MOST_POSITIONS)):
        least = 1 if key in ("kernel", "groups") else 0  # what lost all filters remains where something goes around it
        _expect(_whole(getattr(layer, key), most + 1) and getattr(layer, key) >= least, f"{where} has {getattr(layer, key)!r:.80} {key}")
    _expect(layer.filters % layer.groups == 0, f"{where} has {layer.filters} filters in {layer.groups} groups")
    _expect(layer.channels <= MOST and layer.weights < 1 << 40, f"{where} is too large")


def _check_group(where: str, group: ChannelGroup, geometry: Geometry) -> None:
    _expect(_whole(group.size, MOST) and group.size > 0, f"{where} has size {group.size!r:.80}")
    for name, filters in group.producers.items():
        layer = _layer(where, name, geometry)
        _expect(len(filters) == group.size, f"{where} has {len(filters)} filters of {name!r:.80} for {group.size} channels")
        most = max(layer.filters, layer.channels) if "Transpose" in layer.kind else layer.filters
        _expect(all(_whole(f, most) for f in filters), f"{where} has filters that layer {name!r:.80} has not")
    for name, pairs in group.consumers.items():
        layer = _layer(where, name, geometry)
        most = max(layer.filters, layer.channels) if "Transpose" in layer.kind else layer.channels
        _check_pairs(where, name, pairs, most, group.size)
    for name, pairs in group.carriers.items():
        _expect(isinstance(name, str), f"{where} has a carrier without a name")
        _check_pairs(where, name, pairs, MOST, group.size)


def _check_pairs(where: str, name: str, pairs: Iterable[tuple[int, int]], entries: int, channels: int) -> None:
    fits = all(_whole(i, entries) and _whole(r, channels) for i, r in pairs)
    _expect(fits, f"{where} has channels that it or {name!r:.80} has not")


def _check_unit(name: str, unit: Unit, geometry: Geometry) -> None:
    where = f"unit {name!r:.80}"
    layer = _layer(where, name, geometry)
    for key in ("norm", "activation", "source"):
        _expect(getattr(unit, key) is None or isinstance(getattr(unit, key), str), f"{where}: {key} is no name")
    if unit.source is None:
        _expect(unit.channels is None, f"{where} has channels of no source")
        return
    if unit.channels is not None:
        _expect(isinstance(unit.channels, tuple) and len(unit.channels) == layer.channels, f"{where} has channels for another layer")
        _expect(all(_whole(c, MOST) for c in unit.channels), f"{where} has channels that layer {unit.source!r:.80} has not")
    elif unit.source in geometry.layers:
        filters = geometry.layers[unit.source].filters
        _expect(filters == 0 or layer.channels % filters == 0, f"{where} reads {layer.channels} channels of {filters} filters")


def _layer(where: str, name: str, geometry: Geometry) -> LayerGeometry:
    _expect(name in geometry.layers, f"{where} names layer {name!r:.80}, which is not there")
    return geometry.layers[name]


def _whole(value: Any, below: int) -> bool:
    return type(value) is int and 0 <= value < below


def _expect(fits: bool, otherwise: str) -> None:
    if not fits:
        raise ValueError(otherwise)

"""Which input channels of a layer are still there, given what the layers before prune."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from qprune.constants import constant
from qprune.geometry import ChannelGroup, Geometry, LayerGeometry


class Shares(NamedTuple):
    """The choices of 0 bits that a layer's filters share with others.

    owner     of the choices; layers of one owner share them
    channels  the choice that every filter follows
    """

    owner: int
    channels: tuple[int, ...]

    def of(self, filters: tuple[int, ...]) -> tuple[int, ...]:
        return _picked(self.channels, filters)


def kept_inputs(geometry: Geometry, pruned: Mapping[str, Tensor], shares: Mapping[str, Shares] | None = None) -> dict[str, Tensor]:
    """For every layer that reads prunable channels: the probability that each of its input channels is still there, [channels].

    pruned  probability of 0 bits per filter, [F] or [1], of the layers that have that candidate
    shares  of the layers whose filters are not pruned independently of others: a shared choice counts once
    """
    kept: dict[str, Tensor] = {}
    for group, gone in _gone(geometry, pruned, shares or {}):
        for name, pairs in _readers(group):
            index, row = (constant(column, torch.int64, gone.device) for column in zip(*pairs, strict=True))
            source = gone[row]
            kept[name] = kept.get(name, source.new_ones(geometry.layers[name].channels)).index_add(0, index, -source)
    return kept


def own_inputs(geometry: Geometry, pruned: Mapping[str, Tensor], shares: Mapping[str, Shares]) -> dict[str, Tensor]:
    """For every layer with filters that share their choice of 0 bits with an input channel of theirs (a depthwise filter always does): how
    many input channels a filter that is there finds beyond the number that `kept_inputs` expects, [F]. Zero or more: where the filter is,
    the channel is."""
    own: dict[str, Tensor] = {}
    if not shares:
        return own
    for group, gone in _gone(geometry, pruned, shares):
        for name, _ in _readers(group):
            filters, rows = own_reads(group, geometry.layers[name], shares)
            if filters:
                index, row = (constant(column, torch.int64, gone.device) for column in (filters, rows))
                own[name] = own.get(name, gone.new_zeros(geometry.layers[name].filters)).index_add(0, index, gone[row])
    return own


def own_reads(group: ChannelGroup, layer: LayerGeometry, shares: Mapping[str, Shares]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(filters, channels r of the group), pairwise: filters of a layer with the channels that they read and share their choice with."""
    mine = shares.get(layer.name)
    for name, filters in group.producers.items() if mine is not None else ():
        if mine is not None and name in shares and shares[name].owner == mine.owner:
            made = shares[name].of(tuple(filters))
            return _meeting(mine.channels, made, group.consumers[layer.name], layer.filters // layer.groups, layer.inputs)
    return (), ()


def _readers(group: ChannelGroup) -> Iterator[tuple[str, tuple[tuple[int, int], ...]]]:
    for name, pairs in group.consumers.items():
        if name not in group.producers:  # a layer that reads itself: its own choice is not independent of what is there
            yield name, pairs


def _gone(geometry: Geometry, pruned: Mapping[str, Tensor], shares: Mapping[str, Shares]) -> Iterator[tuple[ChannelGroup, Tensor]]:
    """Every group whose channels can go, with the probability that they are gone, [size]: all filters that make a channel are."""
    for group in geometry.groups:
        if not group.consumers or any(name not in pruned for name in group.producers):
            continue
        gone = torch.ones(())
        counted: list[tuple[int, tuple[int, ...]]] = []
        for name, filters in group.producers.items():
            p = pruned[name]
            p = p[constant(tuple(filters), torch.int64, p.device)] if p.numel() > 1 else p.expand(group.size)
            if name in shares:
                choices = shares[name].of(tuple(filters))
                new = _new(choices, tuple(others for owner, others in counted if owner == shares[name].owner))
                counted.append((shares[name].owner, choices))
                p = p if new is None else torch.where(constant(new, torch.bool, p.device), p, 1.0)
            gone = gone * p
        yield group, gone


@functools.lru_cache(maxsize=4096)
def _picked(channels: tuple[int, ...], filters: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(channels[f] for f in filters)


@functools.lru_cache(maxsize=4096)
def _new(choices: tuple[int, ...], counted: tuple[tuple[int, ...], ...]) -> tuple[bool, ...] | None:
    """Whether each choice was counted by none of the others yet; None if all are new."""
    new = tuple(all(other[r] != choice for other in counted) for r, choice in enumerate(choices))
    return None if all(new) else new


@functools.lru_cache(maxsize=4096)
def _meeting(
    reader: tuple[int, ...], made: tuple[int, ...], pairs: tuple[tuple[int, int], ...], per_group: int, inputs: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(filters, channels r): every filter of a layer with `per_group` filters and `inputs` input channels per group that reads a channel
    whose choice is its own. reader: choices of its filters; made: choices of the channels."""
    mine: dict[int, list[int]] = {}
    for f, choice in enumerate(reader):
        mine.setdefault(choice, []).append(f)
    found = [(f, r) for i, r in pairs for f in mine.get(made[r], ()) if f // per_group == i // inputs]
    return tuple(f for f, _ in found), tuple(r for _, r in found)

"""Which filters can be removed inside a network without touching a residual sum: found from the channel groups of its geometry."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from qprune.geometry import ChannelGroup, Geometry


@dataclass(frozen=True)
class Chain:
    """Channels that one convolution makes and one convolution reads.

    producers  the convolution, then the depthwise layers that its channels go through: filter r of each is channel r
    consumer   the convolution, not a depthwise one, that reads channel r as its input r, and nothing else does
    size       number of channels
    """

    producers: tuple[str, ...]
    consumer: str
    size: int


def prunable_chains(geometry: Geometry, layers: Collection[str]) -> tuple[Chain, ...]:
    """The chains all of whose producers are in `layers`, in the order of their first use.

    Channels that are added to others, read by two layers, by a linear or a transposed one, or by a convolution with groups, make no chain.
    In residual networks these are the inner widths of the blocks (as 1707.06342 prunes them): the first convolution of a BasicBlock, the
    first two of a Bottleneck, and the expanded width of an inverted residual, with its depthwise layer. A convolution outside of any
    residual path counts as well.
    """
    found = (_chain_from(name, geometry) for name, layer in geometry.layers.items() if name in layers and not layer.depthwise)
    return tuple(chain for chain in found if chain is not None and set(chain.producers) <= set(layers))


def _chain_from(name: str, geometry: Geometry) -> Chain | None:
    producers = [name]
    while True:
        reader = _only_reader(producers[-1], geometry)
        if reader is None:
            return None
        if not geometry.layers[reader].depthwise:
            break
        producers.append(reader)
    kinds = {geometry.layers[member].kind for member in (*producers, reader)}
    if kinds != {"Conv2d"} or geometry.layers[reader].groups > 1 or geometry.layers[name].groups > 1:
        return None
    members = set(producers)
    tied = [group for group in geometry.groups if members & group.producers.keys() and group.consumers]
    return Chain(tuple(producers), reader, geometry.layers[name].filters) if all(len(group.producers) == 1 for group in tied) else None


def _only_reader(name: str, geometry: Geometry) -> str | None:
    """The layer that reads this layer's channels one to one, if it is the only one."""
    groups = [group for group in geometry.groups if name in group.producers and group.consumers]
    if len(groups) != 1 or len(groups[0].consumers) != 1:
        return None
    (reader,) = groups[0].consumers
    return reader if _one_to_one(groups[0], name, reader, geometry) else None


def _one_to_one(group: ChannelGroup, name: str, reader: str, geometry: Geometry) -> bool:
    each = range(group.size)
    filters, channels = geometry.layers[name].filters, geometry.layers[reader].channels
    if not filters == channels == group.size or (geometry.layers[reader].depthwise and geometry.layers[reader].filters != filters):
        return False
    return group.producers[name] == tuple(each) and group.consumers[reader] == tuple((i, i) for i in each)

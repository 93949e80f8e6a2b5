"""What `prepare` remembers on the model: its geometry, and the layers that are fixed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from qprune.geometry import Geometry
from qprune.policy import LayerBits, Policy
from qprune.wrappers import unwrap


@dataclass(frozen=True)
class LayerRemoval:
    """What a layer lost with filters at 0 bits.

    filters, inputs  of the layer before: its filters, and the input channels of all its groups
    computed         filters that it still computes
    read             input channels that it still reads
    removed          of its filters, those whose channels are in no tensor any more
    spread           filters that it computes no more, while their channels remain in the tensors, as zeros
    fillers          filters at 0 bits that are computed as zeros: for `round_to`, and for equal numbers in all groups of a convolution
    why              why there are some of either
    """

    name: str
    filters: int
    inputs: int
    computed: int
    read: int
    removed: int
    spread: int
    fillers: int
    why: str = ""


@dataclass(frozen=True)
class Removal:
    """What `convert` did about pruned filters.

    policy    that the network was made by, with the geometry that it had before
    removed   whether filters were taken out
    round_to  of `convert`
    layers    one LayerRemoval per layer that lost something; empty if none did
    """

    policy: Policy
    removed: bool
    round_to: int
    layers: tuple[LayerRemoval, ...] = ()


@dataclass(frozen=True)
class Record:
    """geometry  of the network, None if prepare had no example inputs
    fixed     layers whose own cost is decided: their bits, or None for a layer left float
    removal   of a converted network with pruned filters; None for others
    """

    geometry: Geometry | None
    fixed: Mapping[str, LayerBits | None] = field(default_factory=dict)
    removal: Removal | None = None


def record_of(model: nn.Module) -> Record | None:
    record = unwrap(model).__dict__.get("qprune_record")
    return record if isinstance(record, Record) else None


def attach(model: nn.Module, record: Record) -> None:
    model.__dict__["qprune_record"] = record

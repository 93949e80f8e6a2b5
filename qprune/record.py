"""What `prepare` remembers on the model: its geometry, and the layers that are fixed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from qprune.geometry import Geometry
from qprune.policy import LayerBits


@dataclass(frozen=True)
class Record:
    """geometry  of the network, None if prepare had no example inputs
    fixed     layers whose own cost is decided: their bits, or None for a layer left float
    """

    geometry: Geometry | None
    fixed: Mapping[str, LayerBits | None] = field(default_factory=dict)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel and torch.compile wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def record_of(model: nn.Module) -> Record | None:
    record = unwrap(model).__dict__.get("qprune_record")
    return record if isinstance(record, Record) else None


def attach(model: nn.Module, record: Record) -> None:
    model.__dict__["qprune_record"] = record

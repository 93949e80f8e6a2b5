"""What a network of a run is worth and what it costs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from qprune.cost import Cost, geometry_of
from qprune.cost import cost as cost_of
from qprune.geometry import Geometry
from qprune.nn.codebook import codebook_layers
from qprune.overhead import overhead
from qprune.policy import Policy
from qprune.record import record_of
from qprune.stored import layer_bits, stored_sizes


@dataclass(frozen=True)
class Network:
    """A measured network: accuracies in 0 … 1 (test once, at the end), cost per sample, mean bits of its layers weighted by weights.

    size_bits       of the weights that remain, as budgets count them
    index_bits      what a file needs to tell where these are, and codebook_bits what their codes mean (see qprune.overhead)
    """

    label: str
    accuracy: float
    val_accuracy: float
    bops: float
    macs: float
    size_bits: float
    w_bits: float
    a_bits: float
    index_bits: int
    codebook_bits: int


def described(label: str, net: nn.Module, example: Tensor, convention: str, accuracy: float, val_accuracy: float) -> Network:
    """example: an input, for a network that does not know its geometry.

    What networks with codebooks cost is told by the bits of their layers: every weight of a filter that is not gone counts for bit
    operations, the weights in the mask for the size.
    """
    known, books = record_of(net) is not None, {name: layer_bits(layer) for name, layer in codebook_layers(net)}
    geometry = geometry_of(net, None if known else example)
    cost = cost_of(net, None if known else example, convention, Policy(books, geometry) if books else None)
    return Network(
        label,
        accuracy,
        val_accuracy,
        float(cost.bops),
        float(cost.macs),
        float(stored_sizes(net).total.values if books else cost.size_bits),
        *_mean_bits(cost, geometry),
        *overhead(net).values(),
    )


def _mean_bits(cost: Cost, geometry: Geometry) -> tuple[float, float]:
    """Mean weight bits over weights, and mean activation bits over multiplications."""
    weights = {name: layer.weights for name, layer in geometry.layers.items()}
    macs = {name: layer.macs for name, layer in geometry.layers.items()}
    w = sum(float(row.w_bits) * weights[row.name] for row in cost.rows) / sum(weights.values())
    a = sum(float(row.a_bits) * macs[row.name] for row in cost.rows) / max(sum(macs.values()), 1)
    return w, a

"""Which layers of a float network can be pruned and have their weights shared, and what the others cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from qprune.cost import geometry_of
from qprune.errors import InfeasibleBudgetError, InputError
from qprune.nn.surgery import plain
from qprune.space import FLOAT
from qprune.wrappers import unwrap


def compressible_layers(model: nn.Module, keep: Sequence[str], keep_edges: bool) -> dict[str, nn.Conv2d | nn.Linear]:
    """The plain nn.Conv2d and nn.Linear layers, in the order of their first use, without those that `keep` names (or matches) and, with
    keep_edges, the first and the last. Raises InputError for a model that was prepared, for layers that share a weight, for names that
    match no layer, and if nothing is left."""
    inner = unwrap(model)
    modules, order = dict(inner.named_modules()), list(geometry_of(model).layers)
    if isinstance(keep, str):
        raise InputError(f"annc: keep must be a list of layer names, got {keep!r}")
    for pattern in keep:
        if not any(fnmatchcase(name, pattern) for name in order):
            raise InputError(f"annc: keep names {pattern!r}, which matches no layer; the layers are {', '.join(order[:8])}")
    kept = {name for name in order if any(fnmatchcase(name, pattern) for pattern in keep)}
    if keep_edges:
        kept |= {order[0], order[-1]}
    layers: dict[str, nn.Conv2d | nn.Linear] = {}
    for name in order:
        layer = modules[name]
        if plain(layer) is not layer:
            raise InputError(f"annc: layer {name} is a {type(layer).__name__}; pass the float network itself, or `continued(network)`")
        if name not in kept and type(layer) in (nn.Conv2d, nn.Linear) and "weight" in layer._parameters:
            layers[name] = layer  # type: ignore[assignment]
    owners: dict[int, str] = {}
    for name, layer in layers.items():
        other = owners.setdefault(id(layer.weight), name)
        if other != name:
            raise InputError(f"annc: layers {other} and {name} share a weight, which has one mask and codebook only; name both in keep")
    if not layers:
        raise InputError("annc: the network has no nn.Conv2d or nn.Linear layer to be compressed")
    return layers


def output_layers(model: nn.Module) -> set[str]:
    """The layers whose filters nothing else reads; where channel groups are not known, the last layer."""
    geometry = geometry_of(model)
    if not geometry.groups:
        return {list(geometry.layers)[-1]}
    read = {name for group in geometry.groups if group.consumers for name in group.producers}
    return {name for group in geometry.groups for name in group.producers} - read


def float_bits(model: nn.Module, layers: Mapping[str, nn.Module]) -> int:
    """What the layers cost that stay float."""
    return sum(FLOAT * layer.weights for name, layer in geometry_of(model).layers.items() if name not in layers)


def check_size(cheapest: int, limit: float) -> None:
    """Raise InfeasibleBudgetError if even the cheapest is above the limit."""
    if cheapest > limit:
        raise InfeasibleBudgetError(
            f"annc: the smallest size there can be is {cheapest} bits, the budget is {limit:.6g}; raise it, or let fewer layers stay float",
            float(cheapest),
            limit,
        )

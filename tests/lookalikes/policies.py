"""The look-alikes prepared for a search, and random policies for them."""

from __future__ import annotations

import copy
import functools

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qprune import Policy, SearchSpace, calibrate, prepare
from qprune.convert import has_bypass, survives
from qprune.cost import geometry_of
from qprune.geometry import Geometry, weighted_layers
from qprune.nn.mixing import Mixing
from qprune.policy import LayerBits

from . import LOOKALIKES, SHAPE, build

W_BITS, A_BITS = (0, 2, 3, 4, 5, 8, 32), (3, 4, 8, 32)
SPACE = SearchSpace(W_BITS, A_BITS, granularity="filter")
X = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
NAMES = list(LOOKALIKES)


def prepared(name: str) -> nn.Module:
    return copy.deepcopy(_prepared(name))


@functools.cache
def _prepared(name: str) -> nn.Module:
    """Float64: a sum in another order then meets no rounding boundary of a quantizer."""
    model = calibrate(prepare(build(name), SPACE, example_inputs=X), [X])
    return model.double().eval()


def tensors(y: object) -> list[Tensor]:
    return [value for value in tree_leaves(y) if isinstance(value, Tensor)]


def random_bits(geometry: Geometry, layers: list[str], seed: int, whole: bool = False) -> dict[str, LayerBits]:
    """Any candidate for every filter. Whole channels go, and single filters of channels that others keep; channel 0 always stays.

    whole  also every filter of layers that a residual path goes around, where that leaves something
    """
    g = torch.Generator().manual_seed(seed)

    def pick(values: tuple[int, ...]) -> int:
        return values[int(torch.randint(len(values), (), generator=g))]

    def often(p: float) -> bool:
        return float(torch.rand((), generator=g)) < p

    bits = {name: [pick(W_BITS[1:]) for _ in range(geometry.layers[name].filters)] for name in layers}
    tied = {name for group in geometry.groups for name in group.producers}
    for group in geometry.groups:
        for r in range(1, group.size):
            gone = often(0.35)
            for name, filters in group.producers.items():
                if name in bits and (gone or often(0.08)):
                    bits[name][filters[r]] = 0
    for name in set(layers) - tied:
        bits[name][1:] = [0 if often(0.3) else b for b in bits[name][1:]]
    found = {name: LayerBits(tuple(rows), pick(A_BITS)) for name, rows in bits.items()}
    assert survives(found, geometry)
    for name in layers:
        without = found | {name: LayerBits(0, found[name].a_bits)}
        if whole and has_bypass(geometry, name) and survives(without, geometry):
            found = without
    return found


def random_policy(model: nn.Module, seed: int, whole: bool = False) -> Policy:
    geometry = geometry_of(model)
    return Policy(random_bits(geometry, searched(model), seed, whole), geometry)


def searched(model: nn.Module) -> list[str]:
    """The layers that have candidates and are called."""
    geometry = geometry_of(model)
    return [name for name, layer in weighted_layers(model) if isinstance(layer, Mixing) and name in geometry.layers]


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return tensors(model(x))


def assert_same_outputs(a: nn.Module, b: nn.Module, x: Tensor, tolerance: float) -> None:
    for here, there in zip(outputs(a, x), outputs(b, x), strict=True):
        assert here.isfinite().all()
        torch.testing.assert_close(here, there, rtol=tolerance, atol=tolerance)


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())

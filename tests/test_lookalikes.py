"""The library on the wiring and idioms of the networks that people bring: prepared, converted, costed, made smaller, saved."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from lookalikes import LOOKALIKES, SHAPE, build
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qprune import Policy, SearchSpace, calibrate, convert, cost, prepare
from qprune.convert import has_bypass, survives
from qprune.cost import geometry_of
from qprune.geometry import Geometry, weighted_layers
from qprune.nn.mixing import Mixing
from qprune.nn.quantizing import Quantizing
from qprune.policy import LayerBits

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


@pytest.mark.parametrize("name", NAMES)
def test_the_prepared_network_keeps_its_weights_and_learns(name: str) -> None:
    net = build(name, seed=3)
    model = prepare(build(name), SPACE, example_inputs=X)
    model.load_state_dict(net.state_dict(), strict=True)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in net.state_dict().items())
    called = set(geometry_of(model).layers)
    sum(y.float().square().sum() for y in tensors(model.train()(X))).backward()
    for layer_name, layer in weighted_layers(model):
        if layer_name in called:
            assert layer.weight.grad is not None and layer.weight.grad.isfinite().all(), layer_name


@pytest.mark.parametrize("name", NAMES)
def test_float_bits_are_the_float_network(name: str) -> None:
    net = build(name)
    model = prepare(net, SPACE, example_inputs=X)
    policy = Policy({called: LayerBits(32, 32) for called in searched(model)}, geometry_of(model))
    with torch.no_grad():
        for here, there in zip(tensors(convert(model, policy)(X)), tensors(net(X)), strict=True):
            torch.testing.assert_close(here, there)


@pytest.mark.parametrize("name", NAMES)
def test_the_cost_of_the_policy_is_that_of_the_masked_network(name: str) -> None:
    model = prepared(name)
    policy = random_policy(model, seed=1)
    whole, float_cost = cost(policy), cost(Policy({}, policy.geometry))
    assert 0 < whole.bops < float_cost.bops and 0 < whole.macs < float_cost.macs
    masked = convert(model, policy)
    layers = dict(weighted_layers(masked))
    for layer_name, bits in policy.layers.items():
        layer = layers[layer_name]
        assert isinstance(layer, Quantizing) and layer.w_bits == bits.per_filter(len(layer.weight))
        assert not layer.weight[[b == 0 for b in layer.w_bits]].any()

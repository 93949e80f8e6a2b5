"""The library on the wiring and idioms of the networks that people bring: prepared, converted, costed."""

from __future__ import annotations

import pytest
import torch
from lookalikes import build
from lookalikes.policies import NAMES, SPACE, X, prepared, random_policy, searched, tensors

from qprune import Policy, convert, cost, prepare
from qprune.cost import geometry_of
from qprune.geometry import weighted_layers
from qprune.nn.quantizing import Quantizing
from qprune.policy import LayerBits


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
    masked = convert(model, policy, remove=False)
    layers = dict(weighted_layers(masked))
    for layer_name, bits in policy.layers.items():
        layer = layers[layer_name]
        assert isinstance(layer, Quantizing) and layer.w_bits == bits.per_filter(len(layer.weight))
        assert not layer.weight[[b == 0 for b in layer.w_bits]].any()

"""From searched units, or a float network, to fixed bits with activations quantized where they are produced."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qprune
from qprune import Policy, PolicyMismatchError, SearchSpace
from qprune.checkpoint import policy_of
from qprune.cost import cost, geometry_of
from qprune.gates import FilterGate, set_gates
from qprune.nn import QuantActivation, QuantConv2d
from qprune.nn.filterwise import FilterConv2d
from qprune.policy import LayerBits
from qprune.tasks import models

NICE = {"placement": "output", "weight_quantizer": "nice", "input_quantizer": "nice"}
PAIRS = ((2, 2), (2, 4), (3, 3), (8, 8))
X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def prepared(seed: int = 0, **options: object) -> nn.Module:
    torch.manual_seed(seed)
    space = SearchSpace(
        **{"pairs": PAIRS, "granularity": "filter", "placement": "output", "weight_quantizer": "nice", "input_quantizer": "nice", **options}
    )
    model = qprune.prepare(models.resnet8(num_classes=10), space, example_inputs=X)
    qprune.calibrate(model, [X])
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, FilterGate):
            module.choice.copy_(torch.randint(len(module.logits), module.choice.shape, generator=generator))
    set_gates(model, mode="fixed")
    model.train()
    model(X)  # statistics of their own for the candidates
    return model


def chosen(model: nn.Module) -> Policy:
    layers = {}
    for name, layer in model.named_modules():
        if isinstance(layer, FilterConv2d):
            w, a = zip(*(layer.candidates[k] for k in layer.gate.choice.tolist()), strict=True)
            layers[name] = LayerBits(w, layer.input_bits, a if layer.produces else None)
    return Policy(layers, geometry_of(model))


CASES = {
    "nice": {},
    "own": {"shared_weights": False},
    "uniq": {"weight_quantizer": "uniq", "input_quantizer": "uniq"},
    "own-lsq-pact": {"shared_weights": False, "weight_quantizer": "lsq", "input_quantizer": "pact"},
    "symmetric-pact": {"weight_quantizer": "symmetric", "input_quantizer": "pact"},
}


@pytest.fixture(scope="module", params=CASES, ids=list(CASES))
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module, Policy]:
    model = prepared(**CASES[request.param])
    for parameter in model.parameters():  # clips and ranges that differ between candidates
        with torch.no_grad():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    policy = chosen(model)
    return model, qprune.convert(model, policy), policy


def test_converted_computes_what_was_searched(pair: tuple[nn.Module, nn.Module, Policy]) -> None:
    model, final, _ = pair
    with torch.no_grad():
        torch.testing.assert_close(final.eval()(X), model.eval()(X), rtol=0, atol=1e-5)
    kinds = {type(module) for module in final.modules()}
    assert {QuantConv2d, QuantActivation, nn.BatchNorm2d, nn.Linear} <= kinds
    assert not any(type(module).__name__.startswith("Filter") for module in final.modules())


def test_converted_trains(pair: tuple[nn.Module, nn.Module, Policy]) -> None:
    _, final, _ = pair
    final.train()(X).square().sum().backward()
    assert all(parameter.grad is not None for parameter in final.parameters())


def test_cost_and_policy_are_those_that_were_chosen(pair: tuple[nn.Module, nn.Module, Policy]) -> None:
    _, final, policy = pair
    for convention in ("product", "zur"):
        assert float(cost(final, convention=convention).bops) == float(cost(policy, convention=convention).bops)
    again = policy_of(final)
    for name, bits in policy.layers.items():
        assert again.layers[name].per_filter(len(bits.w_bits)) == bits.w_bits
        assert again.layers[name].out_bits in (bits.out_bits, None if bits.out_bits is None else bits.out_bits[0])


def test_saved_and_loaded(pair: tuple[nn.Module, nn.Module, Policy], tmp_path: Path) -> None:
    _, final, _ = pair
    qprune.save(final, tmp_path / "net.safetensors")
    again = qprune.load(tmp_path / "net.safetensors", lambda: models.resnet8(num_classes=10))
    with torch.no_grad():
        assert torch.equal(again.eval()(X), final.eval()(X))
    assert float(cost(again, convention="zur").bops) == float(cost(final, convention="zur").bops)


def test_a_float_network_takes_such_a_policy() -> None:
    policy = chosen(prepared())
    torch.manual_seed(0)
    final = qprune.convert(models.resnet8(num_classes=10), policy, SearchSpace(**NICE))
    activations = [module for module in final.modules() if isinstance(module, QuantActivation)]
    assert len(activations) == 7 and not any(a.quantizer.calibrated for a in activations)
    final.train()(X)
    assert all(a.quantizer.calibrated for a in activations)


def test_calibrate_reaches_the_activations_of_a_converted_network() -> None:
    policy = chosen(prepared())
    final = qprune.convert(models.resnet8(num_classes=10), policy, SearchSpace(**NICE))
    qprune.calibrate(final, [X])
    assert all(a.quantizer.calibrated for a in final.modules() if isinstance(a, QuantActivation))


def test_layers_that_the_policy_leaves_out_are_float() -> None:
    model = prepared()
    policy = chosen(model)
    rest = Policy({name: bits for name, bits in policy.layers.items() if name != "layer1.0.conv2"}, policy.geometry)
    final = qprune.convert(model, rest)
    assert (
        type(final.layer1[0].conv2) is nn.Conv2d and type(final.layer1[0].relu2) is nn.ReLU and type(final.layer1[0].bn2) is nn.BatchNorm2d
    )


def test_bits_that_were_no_candidate_are_refused() -> None:
    model = prepared()
    policy = chosen(model)
    bits = LayerBits(4, 8, 4)
    with pytest.raises(PolicyMismatchError, match=r"^layer conv1: \(4, 4\) is not a candidate"):
        qprune.convert(model, Policy({**policy.layers, "conv1": bits}, policy.geometry))


def test_homogeneous_networks_cost_what_was_published() -> None:
    """GBOPs of thin_resnet made with the published code of 1904.09872, as in test_cost, here with producers' bits."""
    torch.manual_seed(0)
    space = SearchSpace(pairs=PAIRS, granularity="filter", **NICE)
    model = qprune.prepare(models.thin_resnet(), space, example_inputs=torch.zeros(1, 3, 32, 32))
    printed = dict(zip(PAIRS, ("0.148709376", "0.208543744", "0.237301760", "0.991686656"), strict=True))
    for pair, expected in printed.items():
        for module in model.modules():
            if isinstance(module, FilterConv2d):
                wanted = pair if module.produces else (pair[0], 32)
                module.gate.choice.fill_(module.candidates.index(wanted))
        assert f"{float(cost(chosen(model), convention='zur').bops) / 1e9:.9f}" == expected


def _relu_reference(x: Tensor, clip: float, bits: list[int]) -> Tensor:
    rows = []
    for channel, b in zip(x.unbind(1), bits, strict=True):
        scale = (2**b - 1) / clip
        rows.append((channel.clamp(0, clip) * scale).round() / scale)
    return torch.stack(rows, 1)


@pytest.mark.parametrize("bits", [3, (2, 3, 4, 8)])
def test_quant_activation(bits: int | tuple[int, ...]) -> None:
    layer = QuantActivation(bits)
    layer.quantizer.calibrate(X.repeat(1, 2, 1, 1)[:, :4])
    x = torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(2))
    clip = float(layer.quantizer.learned_range())
    per_channel = [bits] * 4 if isinstance(bits, int) else list(bits)
    torch.testing.assert_close(layer.eval()(x), _relu_reference(x, clip, per_channel), rtol=0, atol=1e-6)
    assert layer.channel_bits == bits


def test_quant_activation_refuses() -> None:
    for arguments, message in [((0,), "out_bits: 0 is not possible"), ((9,), "out_bits: expected bits"), ((4, "lsq+"), "'lsq\\+'")]:
        with pytest.raises(qprune.QPruneError, match=message):
            QuantActivation(*arguments)

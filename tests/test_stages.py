"""Gradual quantization: which layer does what at every stage, in which order, and what that means for the network's output."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from unit_models import batches, block_net, chain, prepared

import qprune
from qprune.errors import CheckpointError, InputError
from qprune.geometry import Geometry, LayerGeometry, Unit
from qprune.search.extraction import extract
from qprune.search.stages import Stages, network_order

Q, N, F, C = "quantized", "noisy", "float", "clamped"
TABLE = [
    (0, (N, F, F), (C, C, C)),
    (1, (Q, N, F), (Q, C, C)),
    (2, (Q, Q, N), (Q, Q, C)),
    (3, (Q, Q, Q), (Q, Q, Q)),
]


def seen(model: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
    modules = dict(model.named_modules())
    return tuple(modules[n].weight_quantizer.stage for n in "036"), tuple(modules[n].quantizer.stage for n in "258")


@pytest.mark.parametrize("converted", [False, True], ids=["searched", "converted"])
def test_the_stages_of_three_layers(converted: bool) -> None:
    model = prepared(chain(3))
    if converted:
        model = qprune.convert(model, extract(model))
    stages = Stages(model)
    assert (stages.layers, len(stages), stages.stage) == (["0", "3", "6"], 4, 3)
    assert stages.epochs == [0, 1, 2, 3, 3]  # L + 2 weight epochs
    assert seen(model) == TABLE[3][1:]
    for stage, weights, activations in TABLE:
        stages.set(stage)
        assert seen(model) == (weights, activations)


@pytest.mark.parametrize("converted", [False, True], ids=["searched", "converted"])
def test_what_the_network_computes(converted: bool) -> None:
    """Evaluation quantizes everything at every stage; in training a weight is float before its stage, noisy at it, quantized after it. All
    weights have a gradient at all stages."""
    model = prepared(chain(3))
    if converted:
        model = qprune.convert(model, extract(model))
    x = batches(1)[0][0]
    stages, modules = Stages(model), dict(model.named_modules())
    model.eval()
    at: list[Tensor] = []
    for stage in range(len(stages)):
        stages.set(stage)
        at.append(model(x))
    assert all(torch.equal(y, at[0]) for y in at[1:])
    model.train()
    weights: list[Tensor] = []
    for stage in range(len(stages)):
        stages.set(stage)
        quantizer = modules["3"].weight_quantizer
        weights.append(quantizer(modules["3"].weight, torch.eye(len(quantizer.bits))[0]).detach())
        model.zero_grad()
        model(x).square().sum().backward()
        for name in stages.layers:
            assert modules[name].weight.grad.abs().sum() > 0, (stage, name)
    weight = modules["3"].weight.detach()
    assert torch.equal(weights[0], weight)
    assert not torch.equal(weights[1], weight) and not torch.equal(weights[1], weights[2])  # noise, mixed with quantization
    assert weights[2].unique().numel() <= 7 and torch.equal(weights[2], weights[3])  # 3 bits


def test_activations_are_clamped_before_their_stage() -> None:
    model = prepared(chain(2))
    stages, x = Stages(model.train()), 3 * torch.randn(2, 4, 5, 5)
    activation = dict(model.named_modules())["2"]
    clip = float(activation.quantizer.learned_range().max())
    stages.set(0)
    assert torch.equal(activation(x), x.clamp(0, clip))
    stages.set(1)
    assert activation(x).unique().numel() <= 4  # every filter is at its first candidate, 2 bits


def test_a_shortcut_comes_before_the_second_convolution() -> None:
    model = prepared(block_net())
    assert Stages(model).layers == ["0", "3.conv1", "3.conv2", "4.conv1", "4.shortcut", "4.conv2"]


def test_the_order_of_layers_that_read_no_unit() -> None:
    """An inverted bottleneck: the layer behind one without an activation comes behind it."""
    names = ["stem", "depthwise", "project", "expand", "last"]
    layers = {name: LayerGeometry(name, "Conv2d", 4, 4, 1, 1, 1) for name in names}
    sources = {"depthwise": "stem", "project": "depthwise", "last": "expand"}
    geometry = Geometry(layers, (), {name: Unit(source=sources.get(name)) for name in names})
    assert network_order(geometry, names) == names


def test_noise_is_renewed_where_it_is_used() -> None:
    model = prepared(chain(3))
    stages, modules = Stages(model), dict(model.named_modules())

    def seeds() -> list[int]:
        return [int(modules[name].weight_quantizer.seed) for name in stages.layers]

    stages.set(1)
    before = seeds()
    stages.renew(torch.Generator().manual_seed(5))
    first = seeds()
    assert [a != b for a, b in zip(before, first)] == [False, True, False]
    stages.renew(torch.Generator().manual_seed(5))
    assert seeds() == first
    stages.set(3)
    stages.renew(torch.Generator().manual_seed(6))
    assert seeds() == first


def test_state_and_errors() -> None:
    model = prepared(chain(3))
    stages = Stages(model)
    stages.set(1)
    state = stages.state_dict()
    other = prepared(chain(3))
    again = Stages(other)
    again.load_state_dict(state)
    assert again.stage == 1 and seen(other) == TABLE[1][1:]
    with pytest.raises(CheckpointError, match="another network"):
        Stages(prepared(chain(2))).load_state_dict(state)
    for stage in (-1, 4):
        with pytest.raises(InputError, match=f"expected 0 to 3 for 3 layers, got {stage}"):
            stages.set(stage)
    plain = qprune.prepare(chain(2), qprune.SearchSpace(), example_inputs=batches(1)[0][0])
    with pytest.raises(InputError, match="placement='output'"):
        Stages(plain)

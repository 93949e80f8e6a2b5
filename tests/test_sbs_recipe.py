"""What a run with method "sbs" makes of a network, and filters that say nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qprune
from qprune.errors import PolicyMismatchError
from qprune.nn import QuantConv2d
from qprune.options import RunOptions
from qprune.policy import LayerBits
from qprune.recipes import SbsRecipe
from qprune.search import driver
from qprune.search.sbs import Sbs
from qprune.silence import silence
from qprune.tasks.models import resnet8


def test_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(driver.METHODS, "sbs", Sbs)
    torch.manual_seed(0)
    options = RunOptions(method="sbs", w_bits=(0, 2, 4, 8), a_bits=(2, 4, 8), budget="w3a3")
    x = torch.randn(16, 1, 8, 8)
    net, recipe = resnet8(in_channels=1), SbsRecipe(options, x[:2])
    recipe.check(net)
    model = recipe.prepare(net, [x])
    search = qprune.Search(model, qprune.Budget.parse("w3a3"), "sbs", weight_lr=0.05, lmbda=3.0)
    loss = nn.functional.cross_entropy
    for _ in range(6):
        search.step(lambda m: loss(m(x), torch.arange(16) % 10))
    policy = search.policy()
    final = recipe.finish(search, policy, [x])
    pruned = policy.pruned()
    assert pruned and all("conv1" in name for name in pruned)
    for name, filters in pruned.items():
        norm = final.get_submodule(name.replace("conv1", "bn1"))
        assert not norm.get_parameter("weight")[filters].any() and not norm.get_buffer("running_mean")[filters].any()
        assert norm.get_parameter("weight").count_nonzero() == len(norm.get_parameter("weight")) - len(filters)
    label, uniform = recipe.uniform(net, search, [x])
    assert label.startswith("uniform w3a3")
    layers = {type(module): module for module in uniform.modules() if isinstance(module, QuantConv2d)}
    assert {layer.space.weight_quantizer for layer in layers.values()} == {"dorefa"}
    assert float(qprune.cost(uniform).bops) == search.limits["bops"]


def test_silence_without_normalisation() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    nn.init.ones_(net[0].bias)
    x = torch.randn(2, 1, 8, 8)
    policy = qprune.Policy({"0": LayerBits((0, 4, 0, 4), 4), "2": LayerBits(8, 8)})
    model = qprune.convert(net, policy)
    assert model[0](x)[:, [0, 2]].any()
    assert silence(model, policy, x) is model
    assert not model[0](x)[:, [0, 2]].any() and model[0](x)[:, 1].any()
    assert model[0].get_parameter("bias").tolist() == [0.0, 1.0, 0.0, 1.0]
    with pytest.raises(PolicyMismatchError, match="'5'"):
        silence(model, qprune.Policy({"5": LayerBits(0, 4)}), x)


def test_nothing_pruned_changes_nothing() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    policy = qprune.Policy({"0": LayerBits(4, 4)})
    model = qprune.convert(net, policy)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    silence(model, policy, torch.randn(2, 1, 8, 8))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

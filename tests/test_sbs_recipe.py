"""What a run with method "sbs" makes of a network."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qprune
from qprune.nn import QuantConv2d
from qprune.options import RunOptions
from qprune.recipes import SbsRecipe
from qprune.search import driver
from qprune.search.sbs import Sbs
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
        left = len(net.get_submodule(name).get_parameter("weight")) - len(filters)
        assert len(final.get_submodule(name).get_parameter("weight")) == left
        assert len(final.get_submodule(name.replace("conv1", "bn1")).get_parameter("weight")) == left
    label, uniform = recipe.uniform(net, search, [x])
    assert label.startswith("uniform w3a3")
    layers = {type(module): module for module in uniform.modules() if isinstance(module, QuantConv2d)}
    assert {layer.space.weight_quantizer for layer in layers.values()} == {"dorefa"}
    assert float(qprune.cost(uniform).bops) == search.limits["bops"]

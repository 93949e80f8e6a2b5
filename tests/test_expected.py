"""The expected cost in a few operations is qprune.cost, with its gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qprune
from qprune import SearchSpace, prepare
from qprune.gates import gates, set_gates
from qprune.search.expected import FIELDS, ExpectedCost
from qprune.tasks.mobilenet import mobilenet
from qprune.tasks.models import resnet8

SPACES = {
    "factorised": SearchSpace((2, 4, 8), (2, 4, 8), granularity="filter"),
    "per layer": SearchSpace((2, 4), (4, 8)),
    "joint": SearchSpace((2, 4), (4, 8), joint=True, granularity="filter"),
    "pairs": SearchSpace(pairs=((2, 4), (4, 4), (4, 8))),
    "pruning": SearchSpace((0, 2, 4), (4, 8), granularity="filter"),
}


def _model(space: SearchSpace, network: type[nn.Module] = resnet8) -> nn.Module:  # type: ignore[assignment]
    edge = {"conv1": SearchSpace.fixed(8, 8), "fc": None} if network is resnet8 else {"classifier": None}
    rules = {name: rule for name, rule in edge.items() if name in dict(network().named_modules())}
    model = prepare(network(), space, rules=rules, example_inputs=torch.rand(1, 3, 16, 16))
    for _, gate in gates(model):
        nn.init.normal_(gate.logits)
    return model


@pytest.mark.parametrize("convention", ["product", "zur", "uniq"])
@pytest.mark.parametrize("network", [resnet8, mobilenet])
@pytest.mark.parametrize("name", SPACES)
def test_is_the_cost(name: str, network: type[nn.Module], convention: str) -> None:
    model = _model(SPACES[name], network)
    set_gates(model, temperature=0.7)
    expected, full = ExpectedCost(model, convention)(), qprune.cost(model, convention=convention)
    for field in FIELDS:
        got, want = getattr(expected, field), getattr(full, field)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
        logits = qprune.arch_parameters(model)
        scale = want.detach()
        g, w = (torch.autograd.grad(value / scale, logits, retain_graph=True, materialize_grads=True) for value in (got, want))
        for a, b in zip(g, w, strict=True):
            # softmax and its gradient are float32: where the gradient is zero, terms of size one cancel to 2⁻²³
            torch.testing.assert_close(a, b, rtol=1e-4, atol=2.0**-23)


def test_follows_the_gates() -> None:
    model = _model(SPACES["factorised"])
    expected = ExpectedCost(model, "product")
    before = expected().bops.item()
    for _, gate in gates(model):
        gate.mode = "fixed"
    assert expected().bops.item() == pytest.approx(qprune.cost(model).bops.item())
    assert expected().bops.item() != pytest.approx(before)


def test_everything_fixed() -> None:
    model = prepare(resnet8(), SearchSpace.fixed(4, 4), example_inputs=torch.rand(1, 3, 16, 16))
    assert ExpectedCost(model, "product")().bops.item() == pytest.approx(qprune.cost(model).bops.item())

"""Nested candidates behind gates: against the residual recursion in plain PyTorch, and the gates themselves."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qprune
from qprune.errors import SpaceError
from qprune.geometry import Geometry, trace_geometry
from qprune.groups import channel_groups
from qprune.nn.bitgates import BitGate, PruningGate, nested_mixture, opened
from qprune.nn.nested import NestedConv2d, NestedLinear, nest
from qprune.nn.prunable import prunable_chains
from qprune.quantizers.nested import SharedInputQuantizer, check_nested
from qprune.quantizers.normalised import NormalisedWeightQuantizer
from qprune.record import record_of
from qprune.tasks.mobilenet import mobilenet
from qprune.tasks.resnet import resnet20


class Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def grid(z: Tensor, bits: int) -> Tensor:
    """D(z, s) with s = 1 / (2^b − 1)."""
    return Round.apply(z * (2**bits - 1)) / (2**bits - 1)


def recursion(z: Tensor, bits: tuple[int, ...], thresholds: Tensor) -> Tensor:
    """z_1 + g_2 (r_2 + g_3 (r_3 + …)), each residual that of the ungated sum so far, each statistic that of the gated one."""
    parts, gates = [grid(z, bits[0])], []
    current, product = parts[0], torch.ones((), dtype=z.dtype)
    for b, threshold in zip(bits[1:], thresholds.unbind(), strict=True):
        statistic = (z - current).abs().mean()
        soft = (statistic - threshold).sigmoid()
        gates.append((statistic > threshold).to(z.dtype) - soft.detach() + soft)
        parts.append(grid(z - sum(parts), b))
        product = product * gates[-1].detach()
        current = current + product * parts[-1]
    total = torch.zeros_like(z)
    for gate, part in zip(reversed(gates), reversed(parts[1:]), strict=True):
        total = gate * (part + total)
    return parts[0] + total


def nested_conv(bits: tuple[int, ...], a_bits: tuple[int, ...] | None = None, dtype: torch.dtype = torch.float64) -> NestedConv2d:
    conv = nn.Conv2d(3, 5, 3, padding=1, bias=False)
    model = qprune.prepare(nn.Sequential(conv), qprune.SearchSpace(bits, a_bits or bits), example_inputs=torch.rand(2, 3, 6, 6))
    record = record_of(model)
    assert record is not None and record.geometry is not None
    nest(model, record.geometry)
    layer = model[0]
    assert isinstance(layer, NestedConv2d)
    return layer.to(dtype)


SETTINGS = [
    pytest.param((2, 4, 8), (0.0, 0.0), (0.0, 0.0), id="all-open"),
    pytest.param((2, 4, 8), (0.0, 0.5), (0.5, 0.0), id="second-closed-first-closed"),
    pytest.param((2, 4, 8), (0.5, 0.5), (0.0, 0.03), id="both-closed-near"),
    pytest.param((3, 6), (0.0,), (0.01,), id="3-6"),
]


@pytest.mark.parametrize("bits, w_thresholds, a_thresholds", SETTINGS)
def test_layer_is_the_residual_recursion(bits: tuple[int, ...], w_thresholds: tuple[float, ...], a_thresholds: tuple[float, ...]) -> None:
    layer = nested_conv(bits)
    with torch.no_grad():
        layer.weight_gate.bits.thresholds.copy_(torch.tensor(w_thresholds))
        layer.input_gate.thresholds.copy_(torch.tensor(a_thresholds))
        layer.weight_quantizer.log_clip.fill_(0.25)
        layer.input_quantizer.log_clip.fill_(-0.1)
    x = torch.rand(4, 3, 6, 6, dtype=torch.float64).mul_(1.3).requires_grad_()
    upstream = torch.randn(4, 5, 6, 6, dtype=torch.float64)
    (layer(x) * upstream).sum().backward()

    w, tw, ta, lw, la = (
        t.detach().clone().requires_grad_()
        for t in (layer.weight, layer.weight_gate.bits.thresholds, layer.input_gate.thresholds, *clips(layer))
    )
    y = x.detach().clone().requires_grad_()
    mean, deviation = w.detach().mean(), w.detach().std()
    z_w = (((w - mean) / deviation / lw.exp()).clamp(-1, 1) + 1) / 2
    weight = deviation * lw.exp() * (2 * recursion(z_w, bits, tw) - 1)
    inputs = la.exp() * recursion((y / la.exp()).clamp(0, 1), bits, ta)
    expected = F.conv2d(inputs, weight, padding=1)
    (expected * upstream).sum().backward()
    torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-6)
    found = (layer.weight, layer.weight_gate.bits.thresholds, layer.input_gate.thresholds, *clips(layer), x)
    for mine, other in zip(found, (w, tw, ta, lw, la, y), strict=True):
        assert mine.grad is not None and other.grad is not None
        torch.testing.assert_close(mine.grad, other.grad, rtol=2e-6, atol=2e-6)
    assert tw.grad is not None and tw.grad[0] != 0


def clips(layer: NestedConv2d) -> tuple[Tensor, Tensor]:
    return layer.weight_quantizer.log_clip, layer.input_quantizer.get_parameter("log_clip")


def test_no_gradient_reaches_the_clip_or_weight_through_a_statistic() -> None:
    z = torch.rand(50, dtype=torch.float64, requires_grad=True)
    (z - grid(z, 2)).abs().mean().backward()
    assert z.grad is not None and not z.grad.any()


@pytest.mark.parametrize("bits, nested", [((2, 4, 8), True), ((1, 2, 4), True), ((3, 6), True), ((2, 3), False), ((4, 6, 8), False)])
def test_nested_bits(bits: tuple[int, ...], nested: bool) -> None:
    z = torch.rand(10_000, dtype=torch.float64)
    total = recursion(z, bits, torch.full((len(bits) - 1,), -1.0, dtype=torch.float64))
    same = torch.allclose(total, grid(z, bits[-1]), atol=1e-12)
    assert same == nested
    if nested:
        check_nested("w_bits", bits)
        check_nested("w_bits", (0, *bits))
    else:
        low, high = next((low, high) for low, high in itertools.pairwise(bits) if high % low)
        with pytest.raises(SpaceError, match=f"w_bits: {high} bits behind {low} are not nested, since {low} does not divide {high}"):
            check_nested("w_bits", bits)


def test_gate_and_its_surrogate() -> None:
    a = torch.tensor([0.3, 0.1], dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.2, 0.4], dtype=torch.float64, requires_grad=True)
    g = opened(a, t)
    assert g.tolist() == [1.0, 0.0]
    g.sum().backward()
    slope = [math.exp(-d) / (1 + math.exp(-d)) ** 2 for d in (0.1, -0.3)]
    assert a.grad is not None and t.grad is not None
    assert a.grad.tolist() == pytest.approx(slope) and t.grad.tolist() == pytest.approx([-s for s in slope])


def test_mixture_of_gates() -> None:
    for gates in itertools.product((0.0, 1.0), repeat=3):
        p = nested_mixture(torch.tensor(gates))
        reached = next((k for k, g in enumerate(gates) if g == 0), 3)
        assert p.tolist() == [float(k == reached) for k in range(4)]
    soft = nested_mixture(torch.tensor([0.5, 0.25]))
    assert soft.tolist() == [0.5, 0.375, 0.125]


def test_statistics_are_those_of_the_gated_output() -> None:
    gate = BitGate(4)
    gate.observe(torch.tensor([0.08, 0.02, 0.01]))
    gate.thresholds.data = torch.tensor([0.05, 0.03, 0.005])
    assert gate.statistic().tolist() == pytest.approx([0.08, 0.02, 0.02])  # the second gate is closed: no 0.01
    assert gate().tolist() == [0.0, 1.0, 0.0, 0.0]
    gate.thresholds.data = torch.tensor([0.09, 0.0, 0.0])
    assert gate.statistic().tolist() == pytest.approx([0.08, 0.08, 0.08])
    gate.held = True
    gate.observe(torch.ones(3))
    assert gate.errors.tolist() == pytest.approx([0.08, 0.02, 0.01])


def test_residuals_of_uniform_values() -> None:
    """A grid of step s leaves s/4 on average."""
    quantizer = SharedInputQuantizer((2, 4, 8), signed=False, start=2.0)
    found = quantizer.residual_means(2 * torch.rand(50, 4, 20, 20))
    assert found.tolist() == pytest.approx([1 / 12, 1 / 60], rel=0.01)
    kept = torch.tensor([1.0, 0.0, 1.0, 0.0])
    assert quantizer.residual_means(2 * torch.rand(50, 4, 20, 20), kept).tolist() == pytest.approx([1 / 24, 1 / 120], rel=0.02)


@pytest.mark.parametrize("signed", [False, True])
def test_signed_inputs_are_nested_too(signed: bool) -> None:
    layer = nn.Sequential(nn.Linear(6, 4))
    x = torch.randn(40, 6) if signed else torch.rand(40, 6)
    model = qprune.prepare(layer, qprune.SearchSpace(), example_inputs=x)
    record = record_of(model)
    assert record is not None and record.geometry is not None
    nest(model, record.geometry)
    nested = model[0]
    assert isinstance(nested, NestedLinear) and nested.space.input_quantizer == ("lsq+" if signed else "pact")
    quantizer = nested.input_quantizer
    assert quantizer.offset.tolist() == [[-1.0 if signed else 0.0] * 3]
    levels = [
        set(quantizer(torch.linspace(-3, 3, 2001).view(-1, 1), torch.eye(3)[k]).flatten().mul(1e5).round().tolist()) for k in range(3)
    ]
    assert levels[0] < levels[1] < levels[2]
    assert [len(found) for found in levels] == [4, 16, 256]


def test_normalisation_counts_kept_weights_only() -> None:
    quantizer = NormalisedWeightQuantizer((2, 4, 8))
    weight = torch.randn(6, 4, 3, 3) + 0.5
    kept = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0]).view(-1, 1, 1, 1)
    found = quantizer.centred(weight, kept)
    alive = weight[kept.flatten() > 0]
    torch.testing.assert_close(found, weight - alive.mean())
    torch.testing.assert_close(quantizer.deviation.squeeze(), alive.std())
    one = quantizer(weight, torch.tensor([1.0, 0.0, 0.0]))
    levels = torch.tensor([-1.0, -1 / 3, 1 / 3, 1.0]) * weight.std()
    assert (one.unsqueeze(-1) - levels).abs().min(-1).values.max() < 1e-6


def test_filter_gate() -> None:
    gate = PruningGate(10, group_size=4, closable=0.5)
    assert gate.members.sum(0).tolist() == [4, 6] and gate.closable == 1
    weight = torch.cat([torch.full((4, 2), 0.2), torch.full((6, 2), -0.8)])
    assert gate.importance(weight).tolist() == pytest.approx([0.25, 1.0])
    assert gate(weight).tolist() == [1.0] * 10
    gate.thresholds.data.fill_(0.6)
    assert gate(weight).tolist() == [0.0] * 4 + [1.0] * 6
    gate.thresholds.data.fill_(3.0)
    assert not gate(weight).any()
    gate.clamp(weight)
    assert gate.thresholds.item() == pytest.approx(0.25)
    assert gate(weight).tolist() == [0.0] * 4 + [1.0] * 6
    gate.thresholds.data.fill_(-1.0)
    gate.clamp(weight)
    assert gate.thresholds.item() == 0
    gate.thresholds.data.fill_(0.25)
    gate.hold(weight)
    assert gate(torch.ones(10, 2)).tolist() == [0.0] * 4 + [1.0] * 6


def test_filter_gate_of_few_filters_never_closes() -> None:
    gate = PruningGate(3, group_size=4)
    gate.thresholds.data.fill_(9.0)
    gate.clamp(torch.ones(3, 2))
    assert gate(torch.ones(3, 2)).tolist() == [1.0] * 3


def test_filter_gate_reaches_its_weight_and_every_threshold() -> None:
    gate = PruningGate(8, group_size=2, per_group=True)
    weight = torch.rand(8, 3, requires_grad=True)
    scale = torch.arange(8.0)
    (gate(weight) * scale).sum().backward()
    margin = gate.margins(weight)
    slope = margin.sigmoid() * (-margin).sigmoid() * scale.view(4, 2).sum(1)
    torch.testing.assert_close(gate.thresholds.grad, -slope)
    plain = weight.detach().clone().requires_grad_()
    soft = (plain.abs() / plain.abs().max()).view(4, -1).mean(1).sigmoid()
    (soft * scale.view(4, 2).sum(1)).sum().backward()
    torch.testing.assert_close(weight.grad, plain.grad)


class Bottleneck(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 8, 1)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x + self.conv3(self.relu(self.conv2(self.relu(self.conv1(x))))))


def bottlenecks() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), Bottleneck(), Bottleneck(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


NETWORKS = [
    pytest.param(resnet20, "conv1", id="BasicBlock"),
    pytest.param(lambda: resnet20(preactivation=True), "conv1", id="pre-activation"),
    pytest.param(bottlenecks, "conv1 conv2", id="Bottleneck"),
    pytest.param(mobilenet, "expand depthwise", id="inverted residual"),  # the first block has no expansion
]


@pytest.mark.parametrize("build, inner", NETWORKS)
def test_prunable_chains_are_the_inner_widths_of_blocks(build: Any, inner: str) -> None:
    net, x = build(), torch.randn(2, 3, 32, 32)
    geometry = Geometry(trace_geometry(net, x), channel_groups(net, x))
    chains = prunable_chains(geometry, geometry.layers)
    found = {name for chain in chains for name in chain.producers}
    blocks = {name for name in geometry.layers if "." in name and "layer1.0.d" not in name}
    assert found == {name for name in blocks if name.rpartition(".")[2] in inner.split()}
    for chain in chains:
        block = chain.consumer.rpartition(".")[0]
        names = [name.rpartition(".")[2] for name in (*chain.producers, chain.consumer)]
        assert all(name.startswith(f"{block}.") for name in chain.producers)
        assert names in (["conv1", "conv2"], ["conv2", "conv3"], ["expand", "depthwise", "project"])

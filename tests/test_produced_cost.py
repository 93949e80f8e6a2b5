"""Costs where activations are quantized by their producers: channels of different bits, exact for a policy, expected for a search."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import pytest
import torch

from qprune import Policy, PolicyMismatchError
from qprune.conventions import CONVENTIONS, Inputs
from qprune.cost import Choice, cost, evaluate, one_hot
from qprune.geometry import ChannelGroup, Geometry, LayerGeometry, Unit, trace_geometry
from qprune.policy import LayerBits
from qprune.tasks import models

CHANNELS, FILTERS, POSITIONS, KERNEL = 5, 4, 6, 9
PAIRS = ((2, 2), (3, 3), (4, 4), (8, 8))


def pair_of_layers(filters: int = FILTERS) -> Geometry:
    first = LayerGeometry("first", "Conv2d", CHANNELS, 3, KERNEL, 1, POSITIONS)
    second = LayerGeometry("second", "Conv2d", filters, CHANNELS, KERNEL, 1, POSITIONS)
    units = {"first": Unit("bn1", "relu1", None), "second": Unit("bn2", "relu2", "first")}
    return Geometry({"first": first, "second": second}, units=units)


def one_filter(w: int, bits: list[int]) -> int:
    """Zur et al.'s count for one filter, in integers."""
    multiplications = POSITIONS * KERNEL * (w - 1) * sum(bits)
    largest = sum(2**a - 1 for a in bits) * KERNEL * max(2 ** (w - 1) - 1, 1)
    return multiplications + POSITIONS * (len(bits) * KERNEL - 1) * math.ceil(math.log2(largest))


@pytest.mark.parametrize("seed", range(20))
def test_zur_counts_every_input_channel_with_its_own_bits(seed: int) -> None:
    draw = random.Random(seed)
    out = tuple(draw.choice((1, 2, 3, 4, 8)) for _ in range(CHANNELS))
    w = tuple(draw.choice((1, 2, 3, 4, 8)) for _ in range(FILTERS))
    policy = Policy({"first": LayerBits(4, 8, out), "second": LayerBits(w, 32)}, pair_of_layers())
    rows = {row.name: row for row in cost(policy, convention="zur").rows}
    assert float(rows["second"].bops) == sum(one_filter(bits, list(out)) for bits in w)
    assert float(rows["first"].bops) == CHANNELS * one_filter(4, [8, 8, 8])
    assert float(rows["second"].a_bits) == pytest.approx(sum(out) / CHANNELS)


def test_product_and_uniq_sum_over_channels() -> None:
    out, w = (2, 2, 3, 4, 8), 4
    policy = Policy({"first": LayerBits(4, 8, out), "second": LayerBits(w, 32)}, pair_of_layers())
    product = {row.name: row for row in cost(policy).rows}["second"]
    assert float(product.bops) == POSITIONS * FILTERS * KERNEL * w * sum(out)
    uniq = {row.name: row for row in cost(policy, convention="uniq").rows}["second"]
    each = [a * w + a + w + math.log2(CHANNELS * KERNEL) for a in out]
    assert float(uniq.bops) == pytest.approx(POSITIONS * FILTERS * KERNEL * sum(each))


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_equal_bits_cost_what_the_reader_quantizing_them_costs(convention: str) -> None:
    produced = Policy({"first": LayerBits(4, 8, 3), "second": LayerBits(2, 32)}, pair_of_layers())
    consumed = Policy({"first": LayerBits(4, 8), "second": LayerBits(2, 3)}, pair_of_layers())
    assert float(cost(produced, convention=convention).bops) == float(cost(consumed, convention=convention).bops)


def test_a_layer_that_quantizes_its_input_again_pays_for_its_own_bits() -> None:
    policy = Policy({"first": LayerBits(4, 8, 2), "second": LayerBits(2, 6)}, pair_of_layers())
    assert float({row.name: row for row in cost(policy).rows}["second"].a_bits) == 6


def test_pruned_channels_are_not_counted() -> None:
    geometry = pair_of_layers()
    every = tuple((i, i) for i in range(CHANNELS))
    group = ChannelGroup(CHANNELS, {"first": tuple(range(CHANNELS))}, {"second": every})
    policy = Policy(
        {"first": LayerBits((0, 4, 4, 0, 4), 8, (2, 3, 4, 8, 8)), "second": LayerBits(4, 32)}, replace(geometry, groups=(group,))
    )
    row = {row.name: row for row in cost(policy, convention="zur").rows}["second"]
    assert float(row.bops) == FILTERS * one_filter(4, [3, 4, 8])


def test_a_flattened_activation_gives_every_feature_its_channel() -> None:
    head = LayerGeometry("head", "Linear", 10, CHANNELS * 4, 1, 1, 1)
    first = pair_of_layers().layers["first"]
    geometry = Geometry({"first": first, "head": head}, units={"first": Unit(None, "relu", None), "head": Unit(None, None, "first")})
    policy = Policy({"first": LayerBits(4, 8, (2, 3, 4, 8, 8)), "head": LayerBits(2, 32)}, geometry)
    assert float({row.name: row for row in cost(policy).rows}["head"].bops) == 10 * 2 * 4 * (2 + 3 + 4 + 8 + 8)


def test_the_published_grid() -> None:
    """ResNet-20, all layers at (3, 3) but the first, whose 16 filters are split over four pairs in steps of two: 165 partitions."""
    layers = trace_geometry(models.resnet20(), torch.zeros(1, 3, 32, 32))
    names = [name for name in layers if name != "fc"]
    readers = ("layer1.0.conv1",)
    units = {name: Unit(None, "relu" if name == "conv1" else None, "conv1" if name in readers else None) for name in names}
    geometry = Geometry(layers, units=units)
    partitions = [n for n in itertools.product(range(0, 17, 2), repeat=4) if sum(n) == 16]
    assert len(partitions) == 165
    found = {}
    for partition in partitions:
        w, a = (tuple(pair[side] for pair, count in zip(PAIRS, partition, strict=True) for _ in range(count)) for side in (0, 1))
        rest = {name: LayerBits(3, 32 if name in readers else 3) for name in names[1:]}
        policy = Policy({"conv1": LayerBits(w, 8, a), **rest}, geometry)
        found[partition] = float(cost(policy, convention="zur").bops) / 1e9
    assert f"{min(found.values()):.6f}" == "0.762327" and f"{max(found.values()):.6f}" == "0.828912"
    homogeneous = [found[tuple(16 * (k == j) for k in range(4))] for j in range(4)]
    assert [f"{value:.6f}" for value in homogeneous] == ["0.762327", "0.773779", "0.784806", "0.828912"]
    assert f"{found[(8, 2, 6, 0)]:.6f}" == "0.772481"


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_the_expected_cost_is_the_mean_over_draws(convention: str) -> None:
    """Multiplications exactly; the additions' width, a rounded logarithm of a random sum, by its normal approximation."""
    generator = torch.Generator().manual_seed(0)
    geometry = pair_of_layers(filters=3)
    wide = LayerGeometry("first", "Conv2d", 64, 3, KERNEL, 1, POSITIONS)
    reader = LayerGeometry("second", "Conv2d", 3, 64, KERNEL, 1, POSITIONS)
    geometry = Geometry({"first": wide, "second": reader}, units=geometry.units)
    q, p = torch.tensor([0.4, 0.3, 0.2, 0.1]).double(), torch.tensor([0.1, 0.2, 0.3, 0.4]).double()
    a, w = tuple(pair[1] for pair in PAIRS), tuple(pair[0] for pair in PAIRS)
    choices = {
        "first": Choice((4,), (8,), torch.ones(1, 1, 1).double(), a, q.unsqueeze(0)),
        "second": Choice(w, (32,), p.view(1, 4, 1)),
    }
    expected = float(evaluate(geometry, choices, CONVENTIONS[convention]).bops)
    draws = []
    for _ in range(400):
        out = tuple(a[i] for i in torch.multinomial(q, 64, replacement=True, generator=generator))
        chosen = tuple(w[i] for i in torch.multinomial(p, 3, replacement=True, generator=generator))
        policy = Policy({"first": LayerBits(4, 8, out), "second": LayerBits(chosen, 32)}, geometry)
        draws.append(float(cost(policy, convention=convention).bops))
    mean, error = torch.tensor(draws).mean().item(), torch.tensor(draws).std().item() / len(draws) ** 0.5
    assert abs(expected - mean) < 4 * error


def test_the_expected_width_meets_the_known_one_as_the_variance_goes() -> None:
    layer = pair_of_layers().layers["second"]
    w, one = torch.tensor(4.0).double(), torch.tensor(1.0).double()
    for levels in (31.0, 32.0, 33.0):
        known = CONVENTIONS["zur"](layer, w, Inputs(one * 5, one * 10, one * levels))
        nearly = CONVENTIONS["zur"](layer, w, Inputs(one * 5, one * 10, one * levels, one * 1e-6))
        assert float(nearly) == pytest.approx(float(known), rel=1e-9)


def test_the_expected_cost_has_gradients_to_producers_and_readers() -> None:
    geometry = pair_of_layers()
    q = torch.full((1, 4), 0.25, dtype=torch.float64, requires_grad=True)
    p = torch.full((1, 4, 1), 0.25, dtype=torch.float64, requires_grad=True)
    choices = {
        "first": Choice((4,), (8,), torch.ones(1, 1, 1).double(), tuple(pair[1] for pair in PAIRS), q),
        "second": Choice(tuple(pair[0] for pair in PAIRS), (32,), p),
    }
    evaluate(geometry, choices, CONVENTIONS["zur"]).bops.backward()
    assert q.grad is not None and p.grad is not None
    assert bool((q.grad.diff() > 0).all()) and bool((p.grad.flatten().diff() > 0).all())


@pytest.mark.parametrize(
    "bits, message",
    [
        (LayerBits(4, 8, (2, 3)), r"layer first: the policy has out_bits for 2 filters, the layer has 5"),
        (LayerBits(4, 8, 0), r"layer first: out_bits: 0 is not possible; a filter is pruned by its w_bits"),
        (LayerBits(4, 8, 9), r"layer first: out_bits: expected bits from 0 \(pruned\), 1 … 8, 32 \(float\), got 9"),
    ],
)
def test_refuses(bits: LayerBits, message: str) -> None:
    with pytest.raises(PolicyMismatchError, match=f"^{message}$"):
        Policy({"first": bits}, pair_of_layers())


def test_out_bits_need_a_known_activation() -> None:
    geometry = Geometry(pair_of_layers().layers)
    with pytest.raises(PolicyMismatchError, match=r"^layer first: the policy has out_bits, but no activation is known"):
        Policy({"first": LayerBits(4, 8, 2)}, geometry)


def test_a_policy_with_out_bits_survives_its_file() -> None:
    policy = Policy({"first": LayerBits(4, 8, (2, 3, 4, 8, 8)), "second": {"w_bits": 2, "a_bits": 32, "out_bits": 4}}, pair_of_layers())
    again = Policy.from_json(policy.to_json())
    assert again == policy and again.geometry == policy.geometry
    assert again.layers["second"] == LayerBits(2, 32, 4)


def test_one_hot() -> None:
    assert one_hot(3)[0] == (3,) and one_hot((4, 2, 4))[0] == (2, 4)
    assert one_hot((4, 2, 4))[1].tolist() == [[0, 1], [1, 0], [0, 1]]

"""Grids of configurations, and the networks that kinds of studies make of their points."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from qprune.cost import cost
from qprune.errors import InputError, QPruneError, SpaceError
from qprune.nn.activation import QuantActivation
from qprune.nn.quant import QuantConv2d
from qprune.options import OptionError
from qprune.study.grid import assigned, partitions, width_grid
from qprune.study.kinds import KINDS, Kind
from qprune.study.options import StudyOptions
from qprune.tasks import data

SMALL = StudyOptions(pairs=((2, 2), (3, 4)), step=8, others=(4, 3), ratios=(0.5, 1.0))


def kind_of(options: StudyOptions) -> Kind:
    return KINDS[options.kind](options, data.load(options.data))


def test_all_partitions() -> None:
    found = partitions(16, 4, 2)
    assert len(found) == 165 == math.comb(8 + 3, 3)
    assert len(set(found)) == 165
    assert all(sum(counts) == 16 and all(n % 2 == 0 for n in counts) for counts in found)
    assert found[0] == (16, 0, 0, 0) and found[-1] == (0, 0, 0, 16)
    assert partitions(3, 2) == [(3, 0), (2, 1), (1, 2), (0, 3)]


def test_a_step_that_does_not_divide() -> None:
    with pytest.raises(InputError, match=r"expected a divisor of the layer's 6 filters \(1, 2, 3, 6\), got 4"):
        partitions(6, 2, 4)


def test_first_filters_get_the_first_candidate() -> None:
    assert assigned((2, 0, 3)) == (0, 0, 2, 2, 2)


def test_all_ratios_per_stage() -> None:
    found = width_grid(3, (0.25, 0.5, 0.75, 1.0))
    assert len(found) == len(set(found)) == 64
    with pytest.raises(InputError, match="at least one stage"):
        width_grid(0, (0.5,))


def test_points_of_a_bit_study() -> None:
    points = kind_of(SMALL).points()
    assert [p.label for p in points] == ["16×2/2", "8×2/2 + 8×3/4", "16×3/4"]
    assert [p.homogeneous for p in points] == [True, False, True]
    # conv1 reads 8-bit images: 256 positions, 9 weights a filter; its activation is read by 2 convolutions of 4-bit weights.
    low, middle, high = (p.cost for p in points)
    assert low < middle < high
    product = [p.cost for p in kind_of(replace(SMALL, convention="product")).points()]
    per_filter = 256 * 9 * 8 * (3 - 2) + 256 * 16 * 9 * 4 * (4 - 2)
    assert product[1] - product[0] == pytest.approx(8 * per_filter)
    assert product[2] - product[1] == pytest.approx(8 * per_filter)


def test_the_network_of_a_point_has_its_bits() -> None:
    kind = kind_of(SMALL)
    point = kind.points()[1]
    trained = kind.float_network()
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    net = kind.network(trained, point, torch.Generator().manual_seed(0))
    conv1, relu1 = net.get_submodule("conv1"), net.get_submodule("relu1")
    assert isinstance(conv1, QuantConv2d) and isinstance(relu1, QuantActivation)
    assert conv1.w_bits == (2,) * 8 + (3,) * 8
    assert relu1.channel_bits == (2,) * 8 + (4,) * 8
    other = net.get_submodule("layer2.0.conv1")
    assert isinstance(other, QuantConv2d) and set(other.w_bits) == {4}
    assert type(net.get_submodule("fc")) is nn.Linear
    assert float(cost(net, convention="zur").bops) == pytest.approx(point.cost)
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    net.train()
    net(kind.task.train.x[:4]).sum().backward()
    assert conv1.weight.grad is not None and bool(conv1.weight.grad.abs().sum() > 0)


def test_points_of_a_width_study() -> None:
    kind = kind_of(replace(SMALL, kind="widths"))
    points = kind.points()
    assert len(points) == 8 and sum(p.homogeneous for p in points) == 2
    chosen = next(p for p in points if p.choice == (0.5, 1.0, 0.5))
    net = kind.network(kind.float_network(), chosen, torch.Generator())
    widths = {name: m.out_channels for name, m in net.named_modules() if isinstance(m, nn.Conv2d)}
    assert widths["conv1"] == 8 and widths["layer2.0.conv2"] == 32 and widths["layer3.0.conv1"] == 32
    rows = cost(net, kind.task.train.x[:1]).rows
    assert sum(float(row.macs) for row in rows if row.name != "fc") == chosen.cost
    assert net(kind.task.train.x[:2]).shape == (2, 10)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"layer": "fc"}, OptionError, "layer: 'fc' is no convolution of resnet8; expected one of conv1, layer1.0.conv1"),
        ({"step": 5}, InputError, "divisor of the layer's 16 filters"),
        ({"kind": "depth"}, OptionError, "kind: 'depth' is unknown; expected one of bits, widths"),
        ({"pairs": ((2, 2),)}, OptionError, "at least two candidates"),
        ({"pairs": ((2, 2), (0, 4))}, SpaceError, "w_bits"),
        ({"seeds": 0}, OptionError, "seeds must be positive, got 0"),
        ({"kind": "widths", "ratios": (0.5, 1.5)}, OptionError, r"different ones in \(0, 1\]"),
    ],
)
def test_bad_options(changes: dict[str, Any], error: type[QPruneError], message: str) -> None:
    with pytest.raises(error, match=message):
        kind_of(replace(SMALL, **changes)).points()


def test_options_as_stored_are_those_of_the_kind() -> None:
    assert SMALL.as_dict()["pairs"] == [[2, 2], [3, 4]] and "ratios" not in SMALL.as_dict()
    widths = replace(SMALL, kind="widths").as_dict()
    assert widths["ratios"] == [0.5, 1.0] and "pairs" not in widths
    assert (SMALL.quick().seeds, SMALL.quick().epochs) == (2, 2)

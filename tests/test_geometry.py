"""Geometry found by running a network: against torch's own count of operations, whatever the network does."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from qprune import SearchSpace, convert, prepare
from qprune.cost import cost
from qprune.errors import BudgetError, InputError
from qprune.geometry import Geometry, LayerGeometry, trace_geometry
from qprune.groups import channel_groups
from qprune.policy import Policy
from qprune.tasks import models
from tests.geometries import mobilenet_v2, resnet18


class Shared(nn.Module):
    """One convolution called three times, at two resolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.pool, self.alias = nn.MaxPool2d(2), self.conv

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.stem(x))
        y: Tensor = self.alias(self.conv(self.pool(x)))
        return y


class Folded(nn.Module):
    """Positions folded into the batch before a linear layer, as window attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).permute(0, 2, 3, 1)
        y: Tensor = self.linear(x.reshape(-1, 8)).view(*x.shape[:3], 5)
        return y


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "plain": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.Conv2d(8, 5, (1, 3), dilation=(1, 2))), (4, 3, 17, 15)),
    "grouped": (lambda: nn.Sequential(nn.Conv2d(6, 9, 3, groups=3, padding="same")), (2, 6, 9, 8)),
    "depthwise": (lambda: nn.Sequential(nn.Conv2d(6, 12, 3, groups=6), nn.Conv2d(12, 4, 1)), (2, 6, 9, 8)),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), nn.Conv2d(6, 3, 3)), (2, 4, 7, 6)),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(4, 6, 5), nn.Flatten(), nn.Linear(6 * 12, 3)), (3, 4, 16)),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(2, 3, 3), nn.Conv3d(3, 3, 1, groups=3)), (2, 2, 5, 6, 7)),
    "linear-NTF": (lambda: nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4)), (3, 7, 8)),
    "linear-NF": (lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), (5, 8)),
    "shared": (Shared, (2, 3, 8, 8)),
    "folded": (Folded, (3, 3, 8, 8)),
    "resnet8": (lambda: models.resnet8(in_channels=1), (2, 1, 16, 16)),
    "mobilenet": (lambda: models.mobilenet(in_channels=3), (2, 3, 16, 16)),
    "lenet5": (lambda: models.lenet5(image_size=28), (2, 1, 28, 28)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_macs_against_flop_counter(name: str) -> None:
    build, shape = NETWORKS[name]
    net, x = build().eval(), torch.randn(shape)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(x)
    total = counter.get_total_flops() / 2 / shape[0]
    assert sum(layer.macs for layer in trace_geometry(net, x).values()) == total
    assert float(cost(net, x).macs) == total
    assert float(cost(net, x).bops) == 1024 * total
    assert float(cost(net, x).size_bits) == 32 * sum(p.numel() for p in set(net.parameters()) if p.dim() > 1)


@pytest.mark.parametrize("name", ["plain", "resnet8", "shared", "folded"])
def test_batch_size_does_not_matter(name: str) -> None:
    build, (_, *shape) = NETWORKS[name]
    net = build()
    assert trace_geometry(net, torch.randn(1, *shape)) == trace_geometry(net, torch.randn(5, *shape))


def test_unbatched_inputs() -> None:
    net, x = NETWORKS["plain"][0](), torch.randn(3, 17, 15)
    assert trace_geometry(net, x) == trace_geometry(net, x.unsqueeze(0))
    linear = nn.Sequential(nn.Linear(6, 4))
    assert trace_geometry(linear, torch.randn(6)) == trace_geometry(linear, torch.randn(9, 6))


def test_tuple_and_keyword_inputs() -> None:
    class TwoInputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Linear(5, 4)

        def forward(self, image: Tensor, code: Tensor) -> Tensor:
            y: Tensor = self.a(image) + self.b(code)[:, :, None, None]
            return y

    net, image, code = TwoInputs(), torch.randn(2, 3, 4, 4), torch.randn(2, 5)
    layers = trace_geometry(net, (image, code))
    assert layers == trace_geometry(net, [image, code]) == trace_geometry(net, {"image": image, "code": code})
    assert [(layer.name, layer.macs) for layer in layers.values()] == [("a", 12 * 16), ("b", 20)]
    with pytest.raises(InputError, match="got str"):
        trace_geometry(net, "image")


def test_one_layer_is_a_network() -> None:
    geometry = trace_geometry(nn.Conv2d(3, 4, 3), torch.randn(2, 3, 5, 5))
    assert geometry == {"": LayerGeometry("", "Conv2d", 4, 3, 9, 1, 9)}


def test_tracing_changes_nothing() -> None:
    net = models.resnet8(in_channels=1).train()
    net.layer1.eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    state = torch.get_rng_state()
    trace_geometry(net, torch.randn(2, 1, 16, 16, generator=torch.Generator()))
    channel_groups(net, torch.zeros(2, 1, 16, 16))
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())


def test_modes_come_back_after_an_error() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(1, 1)).train()
    with pytest.raises(RuntimeError):
        trace_geometry(net, torch.randn(2, 3, 5, 5))
    assert all(module.training and not module._forward_hooks for module in net.modules())


def test_uncalled_layers_are_left_out() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3))
    net.spare = nn.Conv2d(3, 4, 3)
    net.forward = lambda x: net[0](x)  # type: ignore[method-assign]
    assert list(trace_geometry(net, torch.randn(1, 3, 5, 5))) == ["0"]
    with pytest.raises(BudgetError, match="nothing to cost"):
        cost(nn.ReLU(), torch.randn(1, 3))


def test_same_geometry_before_and_after_prepare_and_convert() -> None:
    net, x = models.mobilenet(in_channels=3), torch.randn(1, 3, 16, 16)
    plain = Geometry(trace_geometry(net, x))
    mixed = prepare(net, SearchSpace((2, 4), (2, 4), granularity="filter"), example_inputs=x)
    final = convert(mixed, Policy.uniform(plain, 4, 4))
    for model in (mixed, final):
        assert Geometry(trace_geometry(model, x)).fingerprint == plain.fingerprint


def test_fingerprint_tells_networks_apart() -> None:
    def fingerprint(net: nn.Module, side: int = 16) -> str:
        return Geometry(trace_geometry(net, torch.randn(2, 1, side, side))).fingerprint

    torch.manual_seed(1)
    first = fingerprint(models.resnet8(in_channels=1))
    torch.manual_seed(2)
    assert fingerprint(models.resnet8(in_channels=1)) == first
    assert fingerprint(models.thin_resnet(in_channels=1)) == first
    others = [
        fingerprint(models.resnet8(in_channels=1, num_classes=11)),
        fingerprint(models.resnet8(in_channels=1), side=20),
        fingerprint(models.resnet20(in_channels=1)),
        fingerprint(models.resnet8(in_channels=1, preactivation=True)),
    ]
    assert len({first, *others}) == 5


@pytest.mark.parametrize("geometry, count, weights", [(resnet18(), 21, 11_678_912), (mobilenet_v2(), 53, 3_469_760)])
def test_imagenet_tables(geometry: Geometry, count: int, weights: int) -> None:
    """Layers and weights (without biases and normalisation) of the published networks: 11.69 M and 3.50 M parameters in all."""
    assert len(geometry.layers) == count
    assert sum(layer.weights for layer in geometry.layers.values()) == weights


def test_json_round_trip() -> None:
    net, x = models.mobilenet(in_channels=3), torch.randn(1, 3, 16, 16)
    geometry = Geometry(trace_geometry(net, x), channel_groups(net, x))
    again = Geometry.from_json(json.loads(json.dumps(geometry.to_json())))
    assert again == geometry
    assert again.fingerprint == geometry.fingerprint

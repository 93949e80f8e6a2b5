"""Channel groups: what must be pruned together, by name and index; and what cannot be told is never counted as removable."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn

from qprune import Policy, SearchSpace, channel_groups, prepare
from qprune.cost import cost, geometry_of
from qprune.geometry import ChannelGroup
from qprune.tasks import models

X = torch.randn(2, 3, 8, 8)
Groups = dict[tuple[str, ...], ChannelGroup]


def groups_of(net: nn.Module, x: Tensor = X) -> Groups:
    """The groups that have consumers, by their producers."""
    groups = channel_groups(net, x)
    return {tuple(sorted(group.producers)): group for group in groups if group.consumers}


def straight(n: int) -> tuple[tuple[int, int], ...]:
    return tuple((i, i) for i in range(n))


def test_sequential() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(4, 5, 1), nn.Flatten(), nn.Linear(45, 2)
    )
    groups = groups_of(net)
    assert groups[("0",)] == ChannelGroup(4, {"0": (0, 1, 2, 3)}, {"4": straight(4)}, {"1": straight(4)}, True)
    assert groups[("4",)] == ChannelGroup(5, {"4": (0, 1, 2, 3, 4)}, {"6": tuple((i, i // 9) for i in range(45))}, {}, True)
    assert len(groups) == 2
    assert [tuple(group.producers) for group in channel_groups(net, X)] == [("0",), ("4",), ("6",)]


def test_residual_and_downsample() -> None:
    groups = groups_of(models.resnet8(in_channels=3))
    assert {producers: sorted(group.consumers) for producers, group in groups.items()} == {
        ("conv1",): ["layer1.0.conv1"],
        ("conv1", "layer1.0.conv2"): ["layer2.0.conv1", "layer2.0.shortcut"],
        ("layer1.0.conv1",): ["layer1.0.conv2"],
        ("layer2.0.conv1",): ["layer2.0.conv2"],
        ("layer2.0.conv2", "layer2.0.shortcut"): ["layer3.0.conv1", "layer3.0.shortcut"],
        ("layer3.0.conv1",): ["layer3.0.conv2"],
        ("layer3.0.conv2", "layer3.0.shortcut"): ["fc"],
    }
    assert all(pairs == straight(group.size) for group in groups.values() for pairs in group.consumers.values())
    assert all(filters == tuple(range(group.size)) for group in groups.values() for filters in group.producers.values())


@pytest.mark.parametrize("name", ["resnet20", "mobilenet", "lenet5"])
@pytest.mark.parametrize("options", [{}, {"preactivation": True}], ids=["", "preactivation"])
def test_every_layer_but_the_first_reads_a_group(name: str, options: dict[str, bool]) -> None:
    if options and name != "resnet20":
        options = {"num_classes": 7}
    net = models.get(name)(in_channels=3, **options)
    groups = groups_of(net, torch.zeros(1, 3, 32, 32))
    readers = {consumer for group in groups.values() for consumer in group.consumers}
    layers = {n for n, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert layers - readers == {"conv1"}


def test_depthwise() -> None:
    """What a depthwise layer reads is the expanding layer's, what follows it reads its own."""
    groups = groups_of(models.mobilenet(in_channels=3))
    assert groups[("layer2.0.expand",)].consumers == {"layer2.0.depthwise": straight(64)}
    assert groups[("layer2.0.depthwise",)].consumers == {"layer2.0.project": straight(64)}
    assert list(groups[("conv1", "layer1.0.project")].consumers) == ["layer2.0.expand"]
    multiplied = groups_of(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(8, 2, 1)))
    assert {producers: group.consumers for producers, group in multiplied.items()} == {
        ("0",): {"1": straight(4)},
        ("1",): {"2": straight(8)},
    }


class Dense(nn.Module):
    """Every layer reads everything before it, as in DenseNet (1608.06993)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(n, 2, 3, padding=1) for n in (3, 2, 4, 6))
        self.head = nn.Conv2d(8, 3, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(n) for n in (2, 4, 6))

    def forward(self, x: Tensor) -> Tensor:
        features = [self.a(x)]
        for norm, layer in zip(self.norms, (self.b, self.c, self.d)):
            features.append(layer(torch.relu(norm(torch.cat(features, 1)))))
        y: Tensor = self.head(torch.cat(features, 1))
        return y


def test_concat() -> None:
    groups = groups_of(Dense())
    assert groups[("a",)].consumers == dict.fromkeys(("b", "c", "d", "head"), ((0, 0), (1, 1)))
    assert groups[("b",)].consumers == dict.fromkeys(("c", "d", "head"), ((2, 0), (3, 1)))
    assert groups[("c",)].consumers == dict.fromkeys(("d", "head"), ((4, 0), (5, 1)))


class Mixer(nn.Module):
    """c(x), with something done to it, read by d."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.c, self.d = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, 1)
        self.t, self.s = nn.ConvTranspose2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)
        self.group_norm, self.pieces = nn.GroupNorm(2, 4), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.c(x)
        if self.how == "concat-then-flatten":
            flat = torch.cat([y.flatten(1)[:, :32], self.s(x).flatten(1)[:, :32]], 1)
            out: Tensor = self.pieces(flat)
            return out
        changed = {
            "relu": lambda: torch.relu(y),
            "sum": lambda: torch.relu(y) + self.s(x),
            "gate": lambda: y * torch.sigmoid(self.s(x)),
            "transposed": lambda: y + self.t(x),
            "image": lambda: y + x.mean(1, keepdim=True),
            "shuffle": lambda: y[:, [2, 0, 3, 1]],
            "swap": lambda: y[:, [0, 2, 1, 3]],
            "flip": lambda: y.flip(1),
            "softmax": lambda: y.softmax(1),
            "centred": lambda: y - y.mean(1, keepdim=True),
            "group-norm": lambda: self.group_norm(y),
            "reshape": lambda: y.reshape(y.size(0), 2, 2, 8, 8).transpose(1, 2).reshape(y.shape),
        }[self.how]()
        return self.d(changed)  # type: ignore[no-any-return]


@pytest.mark.parametrize("how, producers", [("relu", ("c",)), ("sum", ("c", "s")), ("gate", ("c", "s"))])
def test_what_is_followed(how: str, producers: tuple[str, ...]) -> None:
    assert groups_of(Mixer(how))[producers].consumers == {"d": straight(4)}


@pytest.mark.parametrize(
    "how",
    ["transposed", "image", "shuffle", "swap", "flip", "softmax", "centred", "group-norm", "reshape", "concat-then-flatten"],
)
def test_what_is_not_followed_is_not_removable(how: str) -> None:
    """The tracer alone claims channel i for filter i in all of these; the gradients say otherwise."""
    net = Mixer(how)
    groups = channel_groups(net, X)
    assert groups
    assert not any(group.consumers for group in groups)
    mixed = prepare(net, SearchSpace((0, 4), (4,), granularity="filter"), example_inputs=X)
    policy = Policy({"c": ((0, 4, 4, 4), 4)}, geometry_of(mixed))
    reader = "pieces" if how == "concat-then-flatten" else "d"
    rows = {row.name: row for row in cost(policy).rows}
    assert float(rows[reader].macs) == geometry_of(mixed).layers[reader].macs


@pytest.mark.parametrize("channels, filters, groups", [(4, 6, 2), (8, 4, 4), (6, 6, 3)])
def test_grouped_convolution(channels: int, filters: int, groups: int) -> None:
    """What is claimed is right, where the tracer takes a grouped convolution for a depthwise one too."""
    net = nn.Sequential(nn.Conv2d(3, channels, 1), nn.Conv2d(channels, filters, 3, groups=groups), nn.Conv2d(filters, 2, 1))
    found = groups_of(net)
    for producers, group in found.items():
        assert producers in (("0",), ("1",))
        assert group.consumers == ({"1": straight(channels)} if producers == ("0",) else {"2": straight(filters)})
    assert groups == 4 or len(found) == 2


def test_shared_layer() -> None:
    """It reads a channel that two filters produce in turn: the channel is gone when both are."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.c(self.a(x)) + self.c(self.b(x))
            return y

    assert {producers: group.consumers for producers, group in groups_of(Twice()).items()} == {("a", "b"): {"c": straight(4)}}


def test_frozen_parameters_and_modes() -> None:
    net = models.resnet8(in_channels=3).train()
    free = channel_groups(net, X)
    net.layer1.requires_grad_(False)
    with torch.no_grad():
        assert channel_groups(net, X) == free
    assert net.training
    assert [p.requires_grad for p in net.layer1.parameters()] == [False] * len(list(net.layer1.parameters()))
    mixed = prepare(net, SearchSpace((2, 4), (2, 4)), example_inputs=X)
    assert channel_groups(mixed, X) == geometry_of(mixed).groups == free


@pytest.mark.parametrize("inputs", [X, (X,), [X], {"x": X}], ids=["tensor", "tuple", "list", "dict"])
def test_forms_of_example_inputs(inputs: object) -> None:
    assert channel_groups(models.resnet8(in_channels=3), inputs) == channel_groups(models.resnet8(in_channels=3), X)  # type: ignore[arg-type]


def test_untraceable_network(caplog: pytest.LogCaptureFixture) -> None:
    class Strange(nn.Module):
        """Leaves autograd half way."""

        def __init__(self) -> None:
            super().__init__()
            self.c, self.d = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                raise NotImplementedError("no gradients here")
            y: Tensor = self.d(torch.from_numpy(self.c(x).numpy()))
            return y

    with caplog.at_level(logging.WARNING, logger="qprune"):
        assert channel_groups(Strange(), X) == ()
        mixed = prepare(Strange(), SearchSpace((0, 4), (4,), granularity="filter"), example_inputs=X)
    assert [record.getMessage().count("\n") for record in caplog.records] == [0, 0]
    assert "no channel groups (NotImplementedError: no gradients here)" in caplog.text
    policy = Policy({"c": ((0, 0, 4, 4), 4), "d": (4, 4)}, geometry_of(mixed))
    assert [float(row.macs) for row in cost(policy).rows] == [3 * 2 * 64, 4 * 5 * 64]

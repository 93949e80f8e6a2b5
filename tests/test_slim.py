"""Slim networks: first filters only, shortcuts between unequal widths, and the networks that are cut out of them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qprune.errors import InputError, UnsupportedLayerError
from qprune.nn.slim import current_widths, estimating, extract, flops, homogeneous, reestimate, set_widths, slim, state_of
from qprune.nn.slimlayers import ResidualBlock, SlimBatchNorm2d, SlimBlock, SlimConv2d, SlimLinear
from qprune.tasks import models


class Block(nn.Module):
    """A block as torchvision writes it: one rectifier in two places, `downsample`."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = (
            nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
            if stride != 1 or inputs != outputs
            else None
        )
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x if self.downsample is None else self.downsample(x)
        y: Tensor = self.relu(out)
        return y


def residual_net() -> nn.Module:
    """conv 3→6, blocks 6→6, 6→8 (stride 2), 8→8, at 3x8x8, with statistics unlike a fresh network's."""
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, 1, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        Block(6, 6, 1), Block(6, 8, 2), Block(8, 8, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip
    return scrambled(net)


def chain() -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 10), nn.ReLU(), nn.Linear(10, 3),
    )  # fmt: skip
    return scrambled(net)


def scrambled(net: nn.Module) -> nn.Module:
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                for value, low, high in (
                    (module.weight, 0.5, 1.5), (module.bias, -0.5, 0.5), (module.running_mean, -0.3, 0.3), (module.running_var, 0.5, 2.0)
                ):  # fmt: skip
                    assert value is not None
                    value.uniform_(low, high)
    return net.eval()


NETS = [
    pytest.param(residual_net, (5, 3, 8, 8), id="torchvision-block"),
    pytest.param(chain, (5, 2, 8, 8), id="chain"),
    pytest.param(lambda: scrambled(models.resnet8(4, 1)), (5, 1, 8, 8), id="resnet8"),
    pytest.param(lambda: models.lenet5(4, 1, 16).eval(), (5, 1, 16, 16), id="lenet5"),
]


@pytest.mark.parametrize("order", ["index", "l1", "gamma"])
@pytest.mark.parametrize("make, shape", NETS)
def test_full_width_computes_what_the_network_does(make: object, shape: tuple[int, ...], order: str) -> None:
    net, x = make(), torch.randn(shape)  # type: ignore[operator]
    before = copy.deepcopy(net.state_dict())
    slimmed = slim(net, x, order=order)
    torch.testing.assert_close(slimmed(x), net(x), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("make, shape", NETS)
def test_flops_at_full_width_are_those_of_the_convolutions(make: object, shape: tuple[int, ...]) -> None:
    net, x = make(), torch.randn(shape)  # type: ignore[operator]
    slimmed = slim(net, x)
    assert flops(slimmed) == macs_of_convolutions(net, x[:1])


def macs_of_convolutions(net: nn.Module, x: Tensor) -> int:
    counts: list[int] = []
    handles = [
        m.register_forward_hook(lambda m, _, y: counts.append(y[0, 0].numel() * m.weight.numel()))
        for m in net.modules()
        if isinstance(m, nn.Conv2d)
    ]
    with torch.no_grad():
        net(x)
    for handle in handles:
        handle.remove()
    return sum(counts)


@pytest.mark.parametrize(
    "ratio, expected", [(0.25, 2_633_728), (0.5, 10_313_728), (0.75, 23_040_000), (1.0, 40_812_544)]
)  # Zur et al. (1904.09872)
def test_flops_of_homogeneous_resnet20(ratio: float, expected: int, resnet20: nn.Module) -> None:
    assert flops(resnet20, homogeneous(resnet20, ratio)) == expected


@pytest.fixture(scope="module")
def resnet20() -> nn.Module:
    torch.manual_seed(0)
    return slim(models.resnet20(), torch.randn(1, 3, 32, 32))


def test_flops_of_uneven_widths_by_hand() -> None:
    """The sum written out for conv 3→6, blocks 6→6, 6→8 (stride 2), 8→8 at 8x8."""
    net = slim(residual_net(), torch.randn(1, 3, 8, 8))
    names = list(current_widths(net))
    assert names == ["0", "3.conv1", "3.conv2", "4.conv1", "4.conv2", "5.conv1", "5.conv2"]
    widths = dict(zip(names, (5, 2, 4, 3, 7, 6, 7), strict=True))
    by_hand = (
        64 * 9 * 3 * 5
        + 64 * 9 * (5 * 2 + 2 * 4) + 64 * 5 * 4  # widths 5 and 4 differ: a shortcut
        + 16 * 9 * (4 * 3 + 3 * 7) + 16 * 4 * 7  # the network's own shortcut
        + 16 * 9 * (7 * 6 + 6 * 7)  # 7 and 7: none
    )  # fmt: skip
    assert flops(net, widths) == by_hand
    vectors = torch.stack([torch.tensor(list(widths.values())), torch.tensor(list(current_widths(net).values()))])
    assert state_of(net).structure.flops(vectors).tolist() == [by_hand, flops(net)]


@pytest.mark.parametrize("kind", ["permanent", "temporary"])
@pytest.mark.parametrize("make, shape", NETS)
def test_flops_are_those_of_the_extracted_network(make: object, shape: tuple[int, ...], kind: str) -> None:
    x = torch.randn(shape)
    net = slim(make(), x, shortcut=kind)  # type: ignore[operator]
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        full = {name: layer.filters for name, layer in state_of(net).structure.layers.items()}
        widths = {name: int(torch.randint(1, filters + 1, (), generator=generator)) for name, filters in full.items()}
        set_widths(net, widths)
        assert flops(net) == macs_of_convolutions(extract(net), x[:1])


def first_filters(conv: nn.Conv2d, outputs: int, inputs: int) -> nn.Conv2d:
    new = nn.Conv2d(inputs, outputs, conv.kernel_size, conv.stride, conv.padding, bias=False)  # type: ignore[arg-type]
    new.weight.data.copy_(conv.weight[:outputs, :inputs])
    return new


def normalised(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """By the statistics of the batch, with the first channels' scale and shift."""
    c = x.size(1)
    mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
    return (x - mean) / (variance + norm.eps).sqrt() * norm.weight[:c, None, None] + norm.bias[:c, None, None]


@pytest.mark.parametrize(
    "kind, widths, shortcut",
    [
        pytest.param("permanent", (4, 3, 4), "identity", id="identity-permanent"),
        pytest.param("temporary", (4, 3, 4), "identity", id="identity-temporary"),
        pytest.param("permanent", (4, 3, 5), "bridge", id="wider-permanent"),
        pytest.param("temporary", (4, 3, 5), "bridge", id="wider-temporary"),
        pytest.param("permanent", (4, 3, 2), "bridge", id="narrower-permanent"),
        pytest.param("temporary", (4, 3, 2), "bridge", id="narrower-temporary"),
    ],
)
def test_block_equals_a_smaller_one_built_by_hand(kind: str, widths: tuple[int, int, int], shortcut: str) -> None:
    net = residual_net()
    block = net[3]
    assert isinstance(block, Block)
    slimmed = slim(net, torch.randn(2, 3, 8, 8), shortcut=kind)
    w0, w1, w2 = widths
    set_widths(slimmed, {"0": w0, "3.conv1": w1, "3.conv2": w2})
    x = torch.randn(7, w0, 8, 8, requires_grad=True)
    here = slimmed[3]  # type: ignore[index]
    assert isinstance(here, SlimBlock)
    if here.bridge is not None:
        nn.init.normal_(here.bridge.weight)
    got = here(x)
    h = normalised(first_filters(block.conv1, w1, w0)(x), block.bn1).relu()
    out = normalised(first_filters(block.conv2, w2, w1)(h), block.bn2)
    if shortcut == "identity":
        residual = x
        assert kind == "permanent" or here.bridge is None
    else:
        assert here.bridge is not None
        assert here.bridge.weight.shape[:2] == ((6, 6) if kind == "permanent" else (w2, w0))
        residual = normalised(F.conv2d(x, here.bridge.weight[:w2, :w0]), nn.BatchNorm2d(w2))
    expected = (out + residual).relu()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    g = torch.randn_like(got)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, g, retain_graph=True)[0] for y in (got, expected)), rtol=1e-4, atol=1e-4)


def test_own_shortcut_is_sliced() -> None:
    net = residual_net()
    block = net[4]
    assert isinstance(block, Block) and block.downsample is not None
    slimmed = slim(net, torch.randn(2, 3, 8, 8))
    set_widths(slimmed, {"3.conv2": 5, "4.conv1": 3, "4.conv2": 6})
    x = torch.randn(7, 5, 8, 8)
    h = normalised(first_filters(block.conv1, 3, 5)(x), block.bn1).relu()
    out = normalised(first_filters(block.conv2, 6, 3)(h), block.bn2)
    residual = normalised(first_filters(block.downsample[0], 6, 5)(x), block.downsample[1])  # type: ignore[arg-type]
    torch.testing.assert_close(slimmed[4](x), (out + residual).relu(), rtol=1e-4, atol=1e-5)  # type: ignore[index]


def test_gradients_reach_the_active_filters_only() -> None:
    net = slim(residual_net(), torch.randn(2, 3, 8, 8)).train()
    set_widths(net, {"0": 4, "3.conv1": 2, "3.conv2": 5})
    net(torch.randn(4, 3, 8, 8)).square().sum().backward()
    gradient = net[3].conv1.weight.grad  # type: ignore[index]
    assert bool((gradient[:2, :4].abs().sum((2, 3)) > 0).all())
    assert float(gradient[2:].abs().sum() + gradient[:, 4:].abs().sum()) == 0
    assert net[3].bridge.weight.grad is not None  # type: ignore[index]


@pytest.mark.parametrize("kind", ["permanent", "temporary"])
@pytest.mark.parametrize("make, shape", NETS)
@pytest.mark.parametrize("ratio", [None, 0.5, 1.0])
def test_extracted_network_computes_the_same(make: object, shape: tuple[int, ...], kind: str, ratio: float | None) -> None:
    x = torch.randn(shape)
    net = slim(make(), x, shortcut=kind, order="l1")  # type: ignore[operator]
    full = current_widths(net)
    set_widths(net, {name: max(1, w - 1 - i % 2) for i, (name, w) in enumerate(full.items())} if ratio is None else homogeneous(net, ratio))
    reestimate(net, [torch.randn(shape), torch.randn(shape)])
    small = extract(net)
    torch.testing.assert_close(small(x), net(x), rtol=1e-5, atol=1e-5)
    assert not any(isinstance(m, SlimConv2d | SlimBatchNorm2d | SlimLinear | SlimBlock) for m in small.modules())
    kinds = {type(m) for m in small.modules() if list(m.parameters(recurse=False))}
    assert kinds <= {nn.Conv2d, nn.BatchNorm2d, nn.Linear}
    kept = {id(p) for p in net.parameters()}
    assert not any(id(p) in kept for p in small.parameters())
    if ratio == 1.0:
        assert sum(p.numel() for p in small.parameters()) == sum(p.numel() for p in make().parameters())  # type: ignore[operator]


def test_extract_at_other_widths_leaves_the_network() -> None:
    x = torch.randn(4, 3, 8, 8)
    net = slim(residual_net(), x)
    before = net(x)
    small = extract(net, homogeneous(net, 0.5))
    assert small[0].out_channels == 3  # type: ignore[index, union-attr]
    assert current_widths(net)["0"] == 6
    assert torch.equal(net(x), before)
    set_widths(net, homogeneous(net, 0.5))
    torch.testing.assert_close(small(x), net(x), rtol=1e-5, atol=1e-5)


def test_extract_estimates_statistics() -> None:
    batches = [torch.randn(4, 3, 8, 8) for _ in range(2)]
    net = slim(residual_net(), batches[0])
    before = copy.deepcopy(net.state_dict())
    widths = {"0": 4, "3.conv2": 5}
    small = extract(net, widths, batches)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    fresh = extract(net, widths)
    assert torch.equal(fresh[1].running_var, torch.ones(4))  # type: ignore[index, union-attr]
    set_widths(net, widths)
    reestimate(net, batches)
    torch.testing.assert_close(small(batches[0]), net(batches[0]), rtol=1e-5, atol=1e-5)


def test_full_width_without_its_ratio() -> None:
    x = torch.randn(4, 3, 8, 8)
    original = residual_net()
    net = slim(original, x, ratios=(0.5,))
    torch.testing.assert_close(net(x), original(x), rtol=1e-5, atol=1e-5)
    assert len(net[1].norms) == 1  # type: ignore[index]
    torch.testing.assert_close(extract(net)(x), original(x), rtol=1e-5, atol=1e-5)


def test_every_homogeneous_width_has_its_own_normalisation() -> None:
    x = torch.randn(16, 3, 8, 8) + 1
    net = slim(residual_net(), x, ratios=(0.5, 1.0)).train()
    norm = net[1]  # type: ignore[index]
    assert isinstance(norm, SlimBatchNorm2d)
    before = [copy.deepcopy(n.running_mean) for n in (norm.norms[0], norm.norms[1], norm)]
    set_widths(net, homogeneous(net, 0.5))
    net(x)
    after = [n.running_mean for n in (norm.norms[0], norm.norms[1], norm)]
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [False, True, True]
    set_widths(net, {"0": 4})
    net(x)
    assert [torch.equal(a, b) for a, b in zip(after, (n.running_mean for n in (norm.norms[0], norm.norms[1], norm)), strict=True)] == [
        True
    ] * 3


def test_reestimated_statistics_are_the_mean_over_batches() -> None:
    batches = [torch.randn(6, 2, 8, 8) * (i + 1) for i in range(3)]
    net = slim(chain(), batches[0])
    set_widths(net, {"0": 3, "4": 2})
    conv, norm = net[0], net[1]  # type: ignore[index]
    modes = [m.training for m in net.modules()]
    reestimate(net, batches)
    with torch.no_grad():
        seen = [conv(batch) for batch in batches]
    torch.testing.assert_close(norm.running_mean[:3], torch.stack([y.mean((0, 2, 3)) for y in seen]).mean(0))
    torch.testing.assert_close(norm.running_var[:3], torch.stack([y.var((0, 2, 3)) for y in seen]).mean(0))
    assert [m.training for m in net.modules()] == modes
    batch = batches[2]
    alone, together = net(batch[:1]), net(batch)
    torch.testing.assert_close(alone, together[:1], rtol=1e-4, atol=1e-5)
    set_widths(net, {"0": 4})
    assert not torch.allclose(net(batch[:2])[0], net(batch)[0], rtol=1e-3), "a new configuration normalises by the batch"


def test_estimating_leaves_homogeneous_statistics() -> None:
    x = torch.randn(6, 2, 8, 8)
    net = slim(chain(), x)
    set_widths(net, homogeneous(net, 0.5))
    state = copy.deepcopy(net.state_dict())
    with estimating(net):
        net(x)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


def test_filters_are_ordered_by_importance() -> None:
    net = chain()
    with torch.no_grad():
        for f, size in enumerate((0.5, 3.0, 0.1, 2.0)):
            net[0].weight[f].fill_(size)  # type: ignore[union-attr, operator]
        net[1].weight.copy_(torch.tensor([-5.0, 1.0, 2.0, 0.1]))  # type: ignore[union-attr, operator]
    by_norm, by_scale = (slim(net, torch.randn(2, 2, 8, 8), order=order)[0] for order in ("l1", "gamma"))  # type: ignore[index]
    assert by_norm.order.tolist() == [1, 3, 0, 2]
    assert by_scale.order.tolist() == [0, 2, 1, 3]
    assert by_norm.weight[:, 0, 0, 0].tolist() == pytest.approx([3.0, 2.0, 0.5, 0.1])


def test_filters_added_by_identity_shortcuts_keep_one_order() -> None:
    net = slim(residual_net(), torch.randn(2, 3, 8, 8), order="l1")
    orders = {name: m.order.tolist() for name, m in net.named_modules() if isinstance(m, SlimConv2d) and "bridge" not in name}
    assert orders["0"] == orders["3.conv2"] != list(range(6))
    assert orders["4.conv2"] == orders["4.shortcut"] == orders["5.conv2"]


def test_permanent_bridge_starts_as_the_cut_identity() -> None:
    net = slim(residual_net(), torch.randn(2, 3, 8, 8))
    set_widths(net, {"0": 3, "3.conv2": 5})
    x = torch.randn(2, 3, 8, 8)
    y = net[3].bridge(x)  # type: ignore[index]
    torch.testing.assert_close(y, torch.cat([x, torch.zeros(2, 2, 8, 8)], 1))


def test_channels_last_is_kept() -> None:
    net = slim(residual_net().to(memory_format=torch.channels_last), torch.randn(2, 3, 8, 8))  # type: ignore[call-overload]
    set_widths(net, {"0": 4, "3.conv2": 5})
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    y = net[:3](x)  # type: ignore[index]
    assert net[3](y).is_contiguous(memory_format=torch.channels_last)  # type: ignore[index]
    assert extract(net)[0].weight.is_contiguous(memory_format=torch.channels_last)  # type: ignore[index, union-attr]


def test_state_dict_round_trip() -> None:
    x = torch.randn(4, 3, 8, 8)
    one, two = slim(residual_net(), x, order="l1"), slim(residual_net(), x, order="l1")
    two.load_state_dict(one.state_dict())
    for net in (one, two):
        set_widths(net, {"0": 4, "3.conv2": 5})
    assert torch.equal(one(x), two(x))


class Concatenation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(2, 4, 1)
        self.c = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c(torch.cat([self.a(x), self.b(x)], 1))
        return y


class Addition(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(x)
        return y + self.b(y)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.a(x), x


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(self.a(x))
        return y


@pytest.mark.parametrize(
    "net, message",
    [
        pytest.param(Concatenation(), "layer b: its input has 2 channels", id="branches"),
        pytest.param(Addition(), "layers of different width", id="addition"),
        pytest.param(Twice(), "layer a is called more than once", id="shared"),
        pytest.param(Pair(), "returns a tuple", id="pair"),
        pytest.param(nn.Conv2d(2, 4, 1, groups=2), "in 2 groups", id="groups"),
        pytest.param(nn.Conv3d(2, 4, 1), "Conv3d cannot be made slim", id="3d"),
        pytest.param(nn.Sequential(nn.Flatten(), nn.Linear(128, 3)), "no convolution", id="linear"),
        pytest.param(nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4, affine=False)), "without scale", id="not-affine"),
        pytest.param(nn.Sequential(nn.Conv2d(2, 8, 1), nn.GroupNorm(2, 8)), "does not run", id="group-norm"),
        pytest.param(models.resnet8(3, 2, preactivation=True), "computes something else", id="preactivation"),
    ],
)
def test_other_networks_are_refused_with_the_reason(net: nn.Module, message: str) -> None:
    with pytest.raises(UnsupportedLayerError, match=message):
        slim(net, torch.randn(2, 2, 8, 8))


def test_bad_arguments() -> None:
    x = torch.randn(2, 2, 8, 8)
    with pytest.raises(InputError, match="shortcut 'none'"):
        slim(chain(), x, shortcut="none")
    with pytest.raises(InputError, match="order 'random'"):
        slim(chain(), x, order="random")
    with pytest.raises(InputError, match=r"\(0, 1\]"):
        slim(chain(), x, ratios=(0.0, 1.0))
    net = slim(chain(), x)
    with pytest.raises(InputError, match="no convolution '7'"):
        set_widths(net, {"7": 3})
    with pytest.raises(InputError, match="layer 0 has 1 to 4 filters, got 5"):
        set_widths(net, {"0": 5})
    with pytest.raises(InputError, match="not a slim network"):
        extract(chain())


def test_blocks_of_another_kind_are_left_alone() -> None:
    block = Block(4, 4, 1)
    block.conv3 = nn.Conv2d(4, 4, 1)  # type: ignore[assignment]
    assert ResidualBlock.of(block) is None
    assert ResidualBlock.of(nn.ReLU()) is None
    assert isinstance(ResidualBlock.of(Block(4, 8, 2)), ResidualBlock)

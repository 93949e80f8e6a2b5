"""Pruned filters are taken out: the same outputs as with zeros, fewer parameters, and costs of what is really computed."""

from __future__ import annotations

import copy
import functools
import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qprune import Policy, PolicyMismatchError, SearchSpace, calibrate, convert, cost, load, prepare, removal_report, save
from qprune.checkpoint import policy_of
from qprune.convert import has_bypass, survives, without_pruned
from qprune.cost import geometry_of
from qprune.errors import InputError
from qprune.geometry import Geometry, weighted_layers
from qprune.nn import QuantConv2d
from qprune.nn.codebook import to_codebook
from qprune.nn.spread import ConstantOutput
from qprune.nn.surgery import replace_modules
from qprune.policy import LayerBits
from qprune.recipes.annc import without_empty_filters
from qprune.record import Record, attach
from qprune.tasks import models

W_BITS, A_BITS = (0, 2, 3, 4, 5, 8, 32), (3, 4, 8, 32)
SPACE = SearchSpace(W_BITS, A_BITS, granularity="filter")
X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def build(name: str) -> nn.Module:
    torch.manual_seed(1)
    name, _, form = name.partition("-")
    options = {"image_size": 16} if name == "lenet5" else {"preactivation": True} if form else {}
    return models.get(name)(in_channels=3, num_classes=7, **options)


def ready(net: nn.Module, space: SearchSpace = SPACE, x: Tensor = X) -> nn.Module:
    """Prepared, with learned ranges and statistics, in float64: a sum in another order then meets no rounding boundary."""
    mixed = calibrate(prepare(net, space, example_inputs=x), [x])
    for module in mixed.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.bias, 0, 0.3)
            nn.init.uniform_(module.weight, -1, 1)
    return mixed.double().eval()


@functools.cache
def _ready(name: str) -> nn.Module:
    return ready(build(name))


def random_policy(geometry: Geometry, seed: int, w_bits: tuple[int, ...] = W_BITS, a_bits: tuple[int, ...] = A_BITS) -> Policy:
    """Whole channels at 0 bits, single filters, and whole layers where something passes around them."""
    g = torch.Generator().manual_seed(seed)

    def pick(values: tuple[int, ...]) -> int:
        return values[int(torch.randint(len(values), (), generator=g))]

    bits = {name: [pick(w_bits[1:]) for _ in range(layer.filters)] for name, layer in geometry.layers.items()}
    for group in geometry.groups:
        gone = torch.rand(group.size, generator=g) < 0.3
        for name, filters in group.producers.items():
            for r in range(1, group.size):
                if gone[r] or float(torch.rand((), generator=g)) < 0.06:
                    bits[name][filters[r]] = 0
    layers = {name: LayerBits(tuple(row), pick(a_bits)) for name, row in bits.items()}
    for name in layers:
        without = layers | {name: LayerBits(0, 4)}
        if seed % 2 and has_bypass(geometry, name) and survives(without, geometry):
            layers = without
    return Policy(layers, geometry)


def numbers(model: nn.Module) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if not name.endswith("log_range"))


def assert_same(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> None:
    assert b.abs().max() > 0
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * float(b.detach().abs().max()))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", ["resnet8", "resnet20", "resnet8-preactivation", "mobilenet", "lenet5"])
def test_networks(name: str, seed: int) -> None:
    mixed = _ready(name)
    policy = random_policy(geometry_of(mixed), seed)
    masked, small = convert(mixed, policy, remove=False), convert(mixed, policy)
    x = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    assert_same(small(x), masked(x))
    assert numbers(small) < 0.75 * numbers(masked)
    for convention in ("product", "zur", "uniq"):
        expected, found, traced = (
            cost(policy, convention=convention),
            cost(small, convention=convention),
            cost(small, X.double(), convention),
        )
        for field in ("bops", "macs", "size_bits"):
            assert float(getattr(found, field)) == pytest.approx(float(getattr(expected, field)), rel=1e-12)
            assert float(getattr(traced, field)) == float(getattr(found, field))
    weights = sum(layer.weight.numel() for _, layer in weighted_layers(small))
    assert weights == sum(layer.weights for layer in geometry_of(small).layers.values())
    assert policy_of(small) == policy
    lost = removal_report(small)
    computed = {name: layer.weight.size(0) for name, layer in weighted_layers(small)}
    for row in lost:
        assert row.computed == computed.get(row.name, 0)
        assert row.filters == row.computed + row.removed + row.spread and not row.fillers
        assert bool(row.why) == bool(row.spread or row.fillers)
    assert removal_report(masked) == ()


@pytest.mark.parametrize("name", ["resnet8", "mobilenet", "lenet5"])
def test_round_to(name: str) -> None:
    mixed = _ready(name)
    policy = random_policy(geometry_of(mixed), 0)
    masked, small = convert(mixed, policy, remove=False), convert(mixed, policy, round_to=8)
    assert_same(small(X.double()), masked(X.double()))
    geometry = geometry_of(mixed)
    for layer_name, layer in weighted_layers(small):
        filters = geometry.layers[layer_name].filters
        assert layer.weight.size(0) % 8 == 0 or layer.weight.size(0) == filters
    between = (
        float(cost(convert(mixed, policy)).bops),
        float(cost(small).bops),
        float(cost(masked, policy=Policy.uniform(geometry, 32, 32)).bops),
    )
    assert between[0] < between[1] < between[2]
    assert float(cost(small, X.double()).bops) == float(cost(small).bops)
    assert any(row.fillers for row in removal_report(small))
    with pytest.raises(InputError, match="round_to must be a whole number from 1, got 0"):
        convert(mixed, policy, round_to=0)


KINDS = {
    "one-bit": {"w_bits": (0, 1, 2, 8)},
    "one-bit-one-range": {"w_bits": (0, 1, 4), "scales": "layer"},
    "symmetric": {"w_bits": (0, 2, 4), "weight_quantizer": "symmetric", "scales": "layer"},
    "dorefa-lsq+": {"w_bits": (0, 1, 3, 32), "weight_quantizer": "dorefa", "input_quantizer": "lsq+"},
    "lsq+": {"w_bits": (0, 2, 4), "input_quantizer": "lsq+"},
    "one-bit-inputs": {"w_bits": (0, 1, 4), "a_bits": (1, 3)},
}


@pytest.mark.parametrize("round_to", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_quantizers(kind: str, round_to: int) -> None:
    """Statistics over weights count what remains; a pruned channel is not seen, also where its quantized zero is none."""
    space = SearchSpace(**{"a_bits": (2, 3, 8), "granularity": "filter", **KINDS[kind]})
    for name in ("resnet8", "mobilenet"):
        mixed = ready(build(name), space)
        for module in mixed.modules():
            if hasattr(module, "kind") and module.kind == "lsq+":
                nn.init.normal_(module.offset, -0.2, 0.1)
        policy = random_policy(geometry_of(mixed), 0, space.w_bits, space.a_bits)
        masked, small = convert(mixed, policy, remove=False), convert(mixed, policy, round_to=round_to)
        assert_same(small(X.double()), masked(X.double()), 1e-6)  # the means of |w| are float32


@pytest.mark.parametrize("kind", ["nice", "uniq", "lsq"])
def test_activations_quantized_where_they_are_produced(kind: str, tmp_path: Path) -> None:
    inputs = {"nice": "nice", "uniq": "uniq", "lsq": "pact"}[kind]
    space = SearchSpace(pairs=((2, 3), (4, 4)), granularity="filter", placement="output", weight_quantizer=kind, input_quantizer=inputs)
    mixed = prepare(build("resnet8"), space, example_inputs=X)
    geometry = geometry_of(mixed)
    drawn = random_policy(geometry, 0, (0, 2, 4)).layers
    layers = {}
    for name, bits in drawn.items():
        out = tuple(3 + f % 3 for f in range(geometry.layers[name].filters)) if geometry.units[name].activation else None
        reads = geometry.units[name].source is not None
        layers[name] = LayerBits(bits.w_bits, 32 if reads else 8, out)
    policy = Policy(layers, geometry)
    spaces = SearchSpace(placement="output", weight_quantizer=kind, input_quantizer=inputs)
    net = build("resnet8").double()
    masked, small = (calibrate(convert(net, policy, spaces, remove=remove), [X.double()]).eval() for remove in (False, True))
    small.load_state_dict({**small.state_dict(), **{n: v for n, v in masked.state_dict().items() if "activation" in n or "relu" in n}})
    for name, module in small.named_modules():  # statistics over all channels, and their clips, are data, not what is tested
        if hasattr(module, "average"):
            module.load_state_dict(masked.get_submodule(name).state_dict())
    assert_same(small(X.double()), masked(X.double()))
    for convention in ("product", "zur", "uniq"):
        assert float(cost(small, convention=convention).bops) == pytest.approx(float(cost(policy, convention=convention).bops), rel=1e-12)
    save(small, tmp_path / "net")
    assert torch.equal(load(tmp_path / "net", lambda: build("resnet8").double()).eval()(X.double()), small(X.double()))


def test_what_is_left_is_a_slice_of_the_network() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.PReLU(4), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(720, 2))
    nn.init.normal_(net[1].weight)
    policy = Policy({"0": ((8, 0, 8, 0), 8), "3": ((8, 8, 0, 8, 8), 8)}, geometry_of(prepare(net, SPACE, example_inputs=X)))
    small = convert(net, policy)
    left, there = [0, 2], [0, 1, 3, 4]
    assert torch.equal(small[0].weight, net[0].weight[left]) and torch.equal(small[0].bias, net[0].bias[left])
    assert torch.equal(small[1].weight, net[1].weight[left]) and small[1].num_features == 2
    assert small[2].weight.shape == (2,)
    assert torch.equal(small[3].weight, net[3].weight[there][:, left])
    assert torch.equal(small[6].weight, net[6].weight.view(2, 5, 144)[:, there].flatten(1))
    assert (small[0].out_channels, small[3].in_channels, small[3].out_channels, small[6].in_features) == (2, 2, 4, 576)
    assert not any(name.endswith(("gather", "spread")) for name, _ in small.named_modules())
    assert net[0].weight.shape == (4, 3, 3, 3)


class Residual(nn.Module):
    """Two convolutions around which something passes, and a head that reads the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        y: Tensor = self.head(torch.relu(x + self.b(torch.relu(self.a(x)))))
        return y


def test_a_channel_that_others_write_to_stays() -> None:
    mixed = ready(Residual())
    policy = Policy({"stem": ((0, 0, 4, 4, 4, 4), 8), "a": ((4, 4, 0, 4, 4, 4), 4), "b": ((0, 4, 4, 4, 0, 4), 4)}, geometry_of(mixed))
    small = convert(mixed, policy)
    assert_same(small(X.double()), convert(mixed, policy, remove=False)(X.double()))
    assert [tuple(getattr(small, n).weight.shape[:2]) for n in ("stem", "a", "b", "head")] == [(4, 3), (5, 4), (4, 5), (2, 5)]
    report = {row.name: row for row in removal_report(small)}
    assert (report["stem"].removed, report["stem"].spread, report["b"].removed, report["b"].spread) == (1, 1, 1, 1)
    assert report["stem"].why == "other filters write to the same channels: b"
    assert float(cost(small).bops) == float(cost(policy).bops) == float(cost(small, X.double()).bops)
    assert type(small.head) is nn.Conv2d


def test_a_layer_without_filters_computes_nothing() -> None:
    mixed = ready(Residual())
    policy = Policy({"stem": (4, 8), "b": (0, 4)}, geometry_of(mixed))
    small = convert(mixed, policy)
    assert isinstance(small.b, ConstantOutput) and numbers(small.b) == 0
    assert_same(small(X.double()), convert(mixed, policy, remove=False)(X.double()))
    assert float(cost(small).bops) == float(cost(policy).bops)


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(3, 5, 3), nn.Conv2d(3, 5, (3, 1), (2, 1), (1, 0), (1, 2)), nn.Conv2d(3, 5, 3, padding="same"), nn.Linear(16, 5)],
    ids=["plain", "uneven", "same", "linear"],
)
def test_constant_output(layer: nn.Conv2d | nn.Linear) -> None:
    bias = torch.randn(5)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.copy_(bias)
    assert torch.equal(ConstantOutput.of(layer, 5, bias)(X), layer(X))
    assert not ConstantOutput.of(layer, 5, None)(X).any()


def test_depthwise_filters_and_their_inputs_on_their_own() -> None:
    """A filter whose input is gone gives its bias; an input whose filter is gone is not read."""
    net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 12, 3, groups=6), nn.ReLU(), nn.Conv2d(12, 4, 1))
    mixed = ready(net)
    middle = (4, 4, 0, 4, 0, 0, 0, 0, 4, 4, 4, 4)
    policy = Policy({"0": ((4, 0, 4, 4, 4, 4), 8), "2": (middle, 4), "4": (4, 4)}, geometry_of(mixed))
    small = convert(mixed, policy)
    assert_same(small(X.double()), convert(mixed, policy, remove=False)(X.double()))
    assert small[2].weight.shape == (6, 1, 3, 3) and small[2].groups == 3
    assert [row.name for row in removal_report(small) if row.fillers] == []
    assert float(cost(small).bops) == float(cost(policy).bops)
    assert small[0].weight.size(0) == 5


def test_groups_keep_equal_numbers() -> None:
    """Zero filters fill up, and the converted network's cost counts them, at the least width of the layer."""
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 4, 1))
    mixed = ready(net)
    policy = Policy({"0": ((4, 0, 0, 4, 4, 4, 4, 0), 8), "2": ((5, 3, 0, 0, 4, 0, 0, 0), 4), "4": (4, 4)}, geometry_of(mixed))
    small = convert(mixed, policy)
    assert_same(small(X.double()), convert(mixed, policy, remove=False)(X.double()))
    grouped = small[2]
    assert isinstance(grouped, QuantConv2d)
    assert (tuple(grouped.weight.shape), grouped.groups, grouped.w_bits) == ((4, 3, 3, 3), 2, (5, 3, 4, 0))
    assert grouped.computed_bits == (5, 3, 4, 3) and len(grouped.fillers) == 1
    rows = {row.name: row for row in cost(small).rows}
    assert float(rows["2"].bops) == 14 * 14 * 9 * 3 * (5 + 3 + 4 + 3) * 4
    (filled,) = [row for row in removal_report(small) if row.fillers]
    assert filled.why == "the groups of a convolution have equal numbers of filters"
    dead = Policy({"2": ((0, 0, 0, 0, 4, 4, 4, 4), 4)}, geometry_of(mixed))
    assert convert(mixed, dead)[2].groups == 1
    assert_same(convert(mixed, dead)(X.double()), convert(mixed, dead, remove=False)(X.double()))


class Odd(nn.Module):
    """The channels of `c` go through something that cannot be traced, or that is no function of single channels."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.c, self.d = how, nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, 1)
        self.scale, self.norm, self.bn = nn.Parameter(torch.ones(4, 1, 1)), nn.GroupNorm(2, 4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.c(x)
        if self.how == "output":
            return torch.cat([y, self.d(y)], 1)
        y = {"scale": lambda: y * self.scale, "norm": lambda: self.norm(y), "sigmoid": lambda: y.sigmoid(), "bn": lambda: self.bn(y)}[
            self.how
        ]()
        out: Tensor = self.d(y)
        return out


@pytest.mark.parametrize(
    "how, inputs, why",
    [
        ("scale", 2, "the network does not run without some of them"),
        ("output", 2, "they are channels of the network's output"),
        ("norm", 4, ""),
        ("sigmoid", 4, ""),
    ],
)
def test_what_cannot_be_removed_is_reported_and_costed(how: str, inputs: int, why: str) -> None:
    mixed = ready(Odd(how))
    policy = Policy({"c": ((4, 0, 4, 0), 8), "d": (4, 4)}, geometry_of(mixed))
    small = convert(mixed, policy)
    assert_same(small(X.double()), convert(mixed, policy, remove=False)(X.double()))
    assert (small.c.weight.size(0), small.d.weight.size(1)) == (2, inputs)
    assert small.c(X.double()).size(1) == 4
    (row,) = [row for row in removal_report(small) if row.name == "c"]
    assert (row.spread, row.removed) == (2, 0) and row.why.startswith(why) and row.why
    assert float(cost(small).bops) == float(cost(policy).bops)
    assert {r.name: float(r.macs) for r in cost(policy).rows}["d"] == 5 * inputs * 256


def test_networks_that_are_not_known_keep_zeros(caplog: pytest.LogCaptureFixture) -> None:
    policy = Policy({"c": ((4, 0, 4, 0), 8)})
    with caplog.at_level(logging.WARNING, logger="qprune"):
        final = convert(Odd("bn"), policy)
    assert [record.getMessage().split(":")[1] for record in caplog.records] == [" filters at 0 bits stay as zeros in c"]
    assert final.c.weight.shape[0] == 4 and not final.c.weight[[1, 3]].any() and not final.c.bias[[1, 3]].any()
    assert removal_report(final) == ()


def test_another_wiring_is_refused() -> None:
    geometry = geometry_of(_ready("resnet8"))
    with pytest.raises(PolicyMismatchError, match=r"'bn1' was a normalisation .* here it is none"):
        net = build("resnet8")
        net.bn1 = nn.Identity()
        convert(net, random_policy(geometry, 0))


def test_policies_from_before_still_convert() -> None:
    """Their geometry does not say what stands on the way, so nothing is taken out of the tensors; the layers become narrower."""
    geometry = geometry_of(_ready("resnet8"))
    old = geometry.to_json()
    for group in old["groups"]:
        for key in ("carriers", "removable", "why"):
            del group[key]
    policy = Policy(random_policy(geometry, 0).layers, Geometry.from_json(old))
    small, masked = (convert(build("resnet8").double(), policy, remove=remove).eval() for remove in (True, False))
    assert_same(small(X.double()), masked(X.double()))
    assert float(cost(small).bops) == pytest.approx(float(cost(policy).bops), rel=1e-12)
    assert Geometry.from_json(geometry.to_json()) == geometry


@pytest.mark.parametrize("name", ["resnet8", "mobilenet"])
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    mixed = _ready(name)
    policy = random_policy(geometry_of(mixed), 1)
    sizes = {}
    for remove, round_to in ((True, 1), (True, 8), (False, 1)):
        final = convert(mixed, policy, remove=remove, round_to=round_to)
        save(final, tmp_path / "net")
        sizes[remove, round_to] = sum(v.numel() for v in final.state_dict().values())
        again = load(tmp_path / "net", lambda: build(name).double()).eval()
        assert torch.equal(again(X.double()), final(X.double()))
        assert removal_report(again) == removal_report(final) and policy_of(again) == policy_of(final)
        assert float(cost(again).bops) == float(cost(final).bops)
    assert sizes[True, 1] < sizes[True, 8] < sizes[False, 1]


@pytest.mark.parametrize("name", ["resnet8", "mobilenet", "resnet8-preactivation"])
def test_training_goes_on_as_with_zeros(name: str) -> None:
    """A few steps, all parameters trained: the networks stay the same function. Not where a filter of the output is pruned, whose bias
    would learn among zeros."""
    mixed = _ready(name)
    policy = random_policy(geometry_of(mixed), 0)
    policy = Policy({**policy.layers, "fc": LayerBits(4, 4)}, policy.geometry)
    outputs = []
    for remove in (False, True):
        final = copy.deepcopy(convert(mixed, policy, remove=remove)).train()
        optimizer = torch.optim.SGD(final.parameters(), lr=0.01, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(final(X.double()), torch.tensor([1, 4])).backward()
            optimizer.step()
        assert [n for n, p in final.named_parameters() if p.grad is None] == []
        outputs.append(final.eval()(X.double()))
    assert_same(outputs[1], outputs[0])


def test_networks_with_codebooks(tmp_path: Path) -> None:
    net = build("resnet8").eval()
    swaps: dict[nn.Module, nn.Module] = {}
    geometry = geometry_of(prepare(net, SPACE, example_inputs=X))
    policy = random_policy(geometry, 0)
    empty = {**policy.pruned(), "fc": []}
    for name, layer in weighted_layers(net):
        mask = torch.ones_like(layer.weight, dtype=torch.bool)
        mask[empty[name]] = False
        swaps[layer] = made = to_codebook(layer, mask, torch.linspace(-0.1, 0.1, 4), 32)
        made.layer_name = name
    coded = replace_modules(net, swaps)
    attach(coded, Record(geometry))
    small, masked = without_empty_filters(copy.deepcopy(coded)), copy.deepcopy(coded)
    bits = Policy(
        {name: LayerBits(tuple(0 if f in empty[name] else 2 for f in range(n.filters)), 32) for name, n in geometry.layers.items()}
    )
    masked = without_pruned(masked, Record(geometry), Policy(bits.layers, geometry), remove=False)
    torch.testing.assert_close(small(X), masked(X), rtol=1e-5, atol=1e-5)
    assert numbers(small) < 0.6 * numbers(masked)
    save(small, tmp_path / "net")
    again = load(tmp_path / "net", lambda: build("resnet8")).eval()
    assert torch.equal(again(X), small(X))
    assert {name: type(layer) for name, layer in weighted_layers(again)} == {name: type(layer) for name, layer in weighted_layers(small)}


def test_formats_and_compilation() -> None:
    mixed = _ready("resnet8")
    policy = random_policy(geometry_of(mixed), 0)
    small = convert(mixed, policy).float()
    expected = small(X).detach()
    last = copy.deepcopy(small).to(memory_format=torch.channels_last)
    torch.testing.assert_close(last(X.contiguous(memory_format=torch.channels_last)), expected, rtol=1e-4, atol=1e-4)
    compiled = torch.compile(small, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(calibrate(copy.deepcopy(small), [X])(X), expected, rtol=0, atol=float(expected.abs().max()))

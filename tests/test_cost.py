"""Costs: published constants to every printed digit, exact policies, expectations and their gradients, and what pruning saves."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from qprune import Policy, PolicyMismatchError, SearchSpace, arch_parameters, convert, prepare, set_gates
from qprune.conventions import CONVENTIONS
from qprune.cost import cost, evaluate, geometry_of, policy_choices
from qprune.errors import InputError
from qprune.gates import gates
from qprune.geometry import Geometry, trace_geometry
from qprune.nn.mixing import Mixing
from qprune.policy import LayerBits
from qprune.search.expected import ExpectedCost
from qprune.tasks import models
from tests.geometries import mobilenet_v2, resnet18

EDGE = LayerBits(8, 8)


def uniform(geometry: Geometry, w: int, a: int, first: LayerBits = EDGE, last: LayerBits = EDGE) -> Policy:
    names = list(geometry.layers)
    return Policy.uniform(geometry, w, a, {names[0]: first, names[-1]: last})


def traced(name: str, **options: object) -> Geometry:
    return Geometry(trace_geometry(models.get(name)(**options), torch.zeros(1, 3, 32, 32)))


def test_imagenet_constants() -> None:
    """GBOPs as Single-path Bit Sharing (2101.04935) prints them; W3A3 of ResNet-18 is 22.85 by the same count."""
    printed = {"1857.6": Policy({}, resnet18()), "34.7": uniform(resnet18(), 4, 4), "308.0": Policy({}, mobilenet_v2())}
    assert [f"{float(cost(policy).bops) / 1e9:.1f}" for policy in printed.values()] == list(printed)


@pytest.mark.parametrize("name, floating, w4a4", [("resnet20", "41798.6", "674.6"), ("resnet56", "128771.7", "2033.6")])
def test_cifar_constants(name: str, floating: str, w4a4: str) -> None:
    """MBOPs of the pre-activation networks with 100 classes, first and last layer at 8 bits (2101.04935)."""
    geometry = traced(name, num_classes=100, preactivation=True)
    assert f"{float(cost(Policy({}, geometry)).bops) / 1e6:.1f}" == floating
    assert f"{float(cost(uniform(geometry, 4, 4)).bops) / 1e6:.1f}" == w4a4


ZUR = {
    "thin_resnet": ("0.148709376", "0.208543744", "0.237301760", "0.337596416", "0.497950720", "0.991686656"),
    "resnet20": ("0.487350272", "0.688398336", "0.773779456", "1.100337152", "1.600086016", "3.253907456"),
}


@pytest.mark.parametrize("name", ZUR)
@pytest.mark.parametrize("column, bits", list(enumerate([(2, 2), (2, 4), (3, 3), (4, 4), (8, 3), (8, 8)])), ids=lambda v: str(v))
def test_zur_constants(name: str, column: int, bits: tuple[int, int]) -> None:
    """GBOPs of homogeneous networks, made with the published code of 1904.09872: the image has 8 bits, Linear is not counted."""
    w, a = bits
    policy = uniform(traced(name), w, a, first=LayerBits(w, 8), last=LayerBits(w, a))
    assert f"{float(cost(policy, convention='zur').bops) / 1e9:.9f}" == ZUR[name][column]


def test_uniq_formula() -> None:
    geometry = Geometry(trace_geometry(nn.Sequential(nn.Conv2d(3, 8, 3)), torch.zeros(1, 3, 6, 6)))
    bops = float(cost(Policy({"0": (4, 2)}, geometry), convention="uniq").bops)
    assert bops == pytest.approx(16 * 8 * 27 * (4 * 2 + 4 + 2 + math.log2(27)), rel=1e-12)


def test_float_and_absent_bits() -> None:
    geometry = Geometry(trace_geometry(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)), torch.zeros(1, 3, 6, 6)))
    first, second = (layer.macs for layer in geometry.layers.values())
    for policy, bops in [
        (Policy({}, geometry), 1024 * (first + second)),
        (Policy({"0": (4, 32)}, geometry), 128 * first + 1024 * second),
        (Policy({"0": (4, 2), "1": (0, 8)}, geometry), 8 * first),
        (Policy({"0": (4, 2), "1": (8, 0)}, geometry), 8 * first),
        (Policy({"0": ((0, 0, 2, 2, 4, 4, 8, 8), 2)}, geometry), 2 * first * 28 // 8 + 1024 * second),
    ]:
        assert float(cost(policy).bops) == bops
        for convention in ("zur", "uniq"):
            rows = cost(policy, convention=convention).rows
            assert all((float(row.bops) == 0) == (0 in (policy.bits(row.name).w_bits, policy.bits(row.name).a_bits)) for row in rows)


def test_size_and_overhead() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1))
    geometry = Geometry(trace_geometry(net, torch.zeros(1, 3, 6, 6)))
    whole = cost(Policy({"0": (4, 2), "1": (2, 2)}, geometry))
    assert (float(whole.size_bits), whole.overhead_bits) == (4 * 216 + 2 * 32, 32 * (8 + 1) + 32 * (4 + 1))
    single = cost(Policy({"0": ((2, 2, 2, 2, 4, 4, 4, 0), 2)}, geometry))
    assert (float(single.size_bits), single.overhead_bits) == (27 * 20 + 32 * 32, 32 * 9 + 4 * 8)


class Residual(nn.Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(2, width, 3), nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, 2, 1)
        self.bn = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.a(x)))
        y: Tensor = self.c(torch.relu(x + self.b(x)))
        return y


class Concat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(2, 3, 1), nn.Conv2d(2, 2, 1), nn.Conv2d(5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c(torch.cat([self.a(x), self.b(x)], 1))
        return y


def depthwise() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 3, groups=3), nn.ReLU(), nn.Conv2d(3, 2, 1))


def flattened() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 2))


# network, filters at 0 bits, the pairs (filter, input channel) that remain in the layers where they are not filters times inputs
PRUNING: dict[str, tuple[Callable[[], nn.Module], dict[str, tuple[int, ...]], dict[str, int]]] = {
    "chain": (lambda: nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)), {"0": (0, 3)}, {"2": 4}),
    "residual-both": (Residual, {"a": (1,), "b": (1, 2)}, {"c": 4, "b": 2}),
    "residual-one": (Residual, {"b": (0, 1)}, {}),
    "concat": (Concat, {"a": (2,), "b": (0,)}, {"c": 6}),
    "depthwise-both": (depthwise, {"0": (1,), "2": (1,)}, {"2": 2, "4": 4}),
    "depthwise-first": (depthwise, {"0": (1,)}, {"2": 2}),
    "depthwise-second": (depthwise, {"2": (1,)}, {"2": 2, "4": 4}),
    "flatten-pool": (flattened, {"0": (0, 2)}, {"4": 8}),
}


@pytest.mark.parametrize("name", PRUNING)
def test_what_pruning_saves(name: str) -> None:
    build, gone, left = PRUNING[name]
    mixed = prepare(build(), SearchSpace((0, 4), (4,), granularity="filter"), example_inputs=torch.randn(1, 2, 6, 6))
    layers = geometry_of(mixed).layers
    bits = {n: tuple(0 if f in gone.get(n, ()) else 4 for f in range(layer.filters)) for n, layer in layers.items()}
    policy = Policy({n: (row, 4) for n, row in bits.items()}, geometry_of(mixed))
    rows = {row.name: row for row in cost(policy).rows}
    for layer_name, layer in layers.items():
        weights = layer.kernel * left.get(layer_name, layer.inputs * sum(b > 0 for b in bits[layer_name]))
        row = rows[layer_name]
        assert (float(row.macs), float(row.bops)) == (layer.positions * weights, 16 * layer.positions * weights), layer_name
        assert float(row.size_bits) == 4 * weights


def pinned(mixed: nn.Module, policy: Policy) -> None:
    """Fix every gate to the policy."""
    for _, layer in ((n, m) for n, m in mixed.named_modules() if isinstance(m, Mixing)):
        bits = policy.bits(next(n for n, m in mixed.named_modules() if m is layer))
        rows = bits.per_filter(layer.weight.size(0))
        pairs = [layer.space.candidates.index((w, bits.a_bits)) if layer.space.joint else layer.space.w_bits.index(w) for w in rows]
        for gate, choice in ((layer.weight_gate, pairs), (layer.input_gate, [layer.space.a_bits.index(bits.a_bits)])):
            if isinstance(gate, nn.Module) and hasattr(gate, "choice"):
                gate.choice.copy_(torch.tensor(choice if gate.choice.dim() else choice[0]))
    set_gates(mixed, mode="fixed")


SPACES = {
    "layer": SearchSpace((0, 2, 4), (2, 4)),
    "layer-joint": SearchSpace((2, 4), (2, 4), joint=True),
    "filter": SearchSpace((0, 2), (2, 4), granularity="filter"),
    "filter-pairs": SearchSpace(pairs=((0, 4), (2, 4), (2, 2), (0, 2)), granularity="filter"),
}


def policies(space: SearchSpace, geometry: Geometry) -> list[Policy]:
    """Every policy of a network in which all layers have this space."""
    rows = []
    for layer in geometry.layers.values():
        weights = itertools.product(space.w_bits, repeat=layer.filters) if space.granularity == "filter" else [(w,) for w in space.w_bits]
        pairs = itertools.product(weights, space.a_bits)
        rows.append([(w if len(w) > 1 else w[0], a) for w, a in pairs if all((b, a) in space.candidates for b in w)])
    return [Policy(dict(zip(geometry.layers, combo)), geometry) for combo in itertools.product(*rows)]


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("space", SPACES)
def test_one_hot_gates_policy_and_converted_model_agree(space: str, convention: str) -> None:
    mixed = prepare(Residual(2), SPACES[space], example_inputs=torch.randn(1, 2, 4, 4))
    some = policies(SPACES[space], geometry_of(mixed))
    for policy in some[:: len(some) // 11]:
        pinned(mixed, policy)
        expected = cost(policy, convention=convention)
        for found in (cost(mixed, convention=convention), cost(mixed, convention=convention, policy=policy)):
            for field in ("bops", "macs", "size_bits"):
                assert getattr(found, field).item() == getattr(expected, field).item(), field
        if all(row.w_bits > 0 for row in expected.rows):
            final = cost(convert(mixed, policy, remove=False), convention=convention)
            assert (float(final.bops), float(final.size_bits)) == (float(expected.bops), float(expected.size_bits))
            assert final.overhead_bits == expected.overhead_bits
            small = cost(convert(mixed, policy), convention=convention)
            assert (float(small.bops), float(small.size_bits)) == (float(expected.bops), float(expected.size_bits))
            assert small.overhead_bits <= expected.overhead_bits


@pytest.mark.parametrize("space", ["layer", "filter"])
@pytest.mark.parametrize(
    "build, tied", [(lambda: Residual(2), ("a", "b")), (Concat, ()), (depthwise, ("0", "2"))], ids=["residual", "concat", "depthwise"]
)
def test_expected_cost_is_the_mean_over_all_policies(build: Callable[[], nn.Module], tied: tuple[str, ...], space: str) -> None:
    mixed = prepare(build(), SPACES[space], example_inputs=torch.randn(1, 2, 4, 4))
    for p in arch_parameters(mixed):
        nn.init.normal_(p)
    geometry = geometry_of(mixed)
    tables = {n: m.filter_probabilities().detach().double() for n, m in mixed.named_modules() if isinstance(m, Mixing)}
    mean, total = torch.zeros(3, dtype=torch.float64), 0.0
    for policy in policies(SPACES[space], geometry):
        chance = 1.0
        for n, p in tables.items():
            bits = policy.bits(n)
            w, a = [SPACES[space].w_bits.index(b) for b in bits.per_filter(len(p))], SPACES[space].a_bits.index(bits.a_bits)
            weight = p.sum(2)[range(len(p)), w].prod()
            if space == "filter" and n in tied[1:]:  # 0 bits or not was drawn with the first layer's filters
                kept = torch.stack([p.sum(2)[:, 0], 1 - p.sum(2)[:, 0]])
                weight = weight / kept[[int(k > 0) for k in w], range(len(p))].prod()
                weight = weight * all(
                    (b == 0) == (c == 0) for b, c in zip(policy.bits(tied[0]).per_filter(len(p)), bits.per_filter(len(p)))
                )
            chance *= float(weight * p[0].sum(0)[a])
        one = evaluate(geometry, policy_choices(geometry, policy), CONVENTIONS["product"])
        mean, total = mean + chance * torch.stack([one.bops, one.macs, one.size_bits]), total + chance
    found = cost(mixed)
    assert total == pytest.approx(1.0)
    torch.testing.assert_close(torch.stack([found.bops, found.macs, found.size_bits]).detach(), mean, rtol=1e-6, atol=0)


@pytest.mark.parametrize("space", SPACES)
def test_gradients_by_finite_differences(space: str) -> None:
    mixed = prepare(Residual(2), SPACES[space], example_inputs=torch.randn(1, 2, 4, 4)).double()
    for p in arch_parameters(mixed):
        nn.init.normal_(p)
    for convention, field in (("product", "bops"), ("product", "size_bits"), ("zur", "bops"), ("uniq", "macs")):
        total = getattr(cost(mixed, convention=convention), field)
        analytic = torch.autograd.grad(total, arch_parameters(mixed), allow_unused=True)
        for p, gradient in zip(arch_parameters(mixed), analytic):
            direction = torch.randn_like(p)
            with torch.no_grad():
                p.add_(direction, alpha=2e-2)
                above = float(getattr(cost(mixed, convention=convention), field))
                p.sub_(direction, alpha=4e-2)
                below = float(getattr(cost(mixed, convention=convention), field))
                p.add_(direction, alpha=2e-2)
            along = 0.0 if gradient is None else float((gradient * direction).sum())
            if convention != "zur":  # its logarithm is rounded up: its slope is taken between the steps
                assert (above - below) / 4e-2 == pytest.approx(along, rel=5e-3, abs=1e-4 * total.item()), (field, p.shape)
            assert math.isfinite(along)


def test_cost_of_a_float_model_with_a_policy_knows_the_groups() -> None:
    net, x = Residual(), torch.randn(1, 2, 6, 6)
    policy = Policy({"a": ((4, 0, 4), 4), "b": ((4, 0, 4), 4)}, geometry_of(prepare(net, SearchSpace(), example_inputs=x)))
    assert float(cost(net, x, policy=policy).bops) == float(cost(policy).bops) < float(cost(net, x, policy=Policy(policy.layers)).bops)


def test_refusals() -> None:
    net, x = Residual(), torch.randn(1, 2, 6, 6)
    with pytest.raises(InputError, match="unknown convention 'bits'; expected one of product, zur, uniq"):
        cost(net, x, convention="bits")
    with pytest.raises(InputError, match="pass example_inputs"):
        cost(net)
    with pytest.raises(InputError, match="does not hold its network's geometry"):
        cost(Policy({"a": (4, 4)}))
    with pytest.raises(PolicyMismatchError, match="'d', which this network does not have"):
        cost(net, x, policy=Policy({"d": (4, 4)}))


def test_rows_sum_up_and_name_mean_bits() -> None:
    mixed = prepare(Residual(), SPACES["filter"], {"c": None}, example_inputs=torch.randn(1, 2, 6, 6))
    with torch.no_grad():
        found = cost(mixed)
    assert [row.name for row in found.rows] == ["a", "b", "c"]
    assert float(sum(row.bops for row in found.rows)) == pytest.approx(float(found.bops))
    assert [(float(row.w_bits), float(row.a_bits)) for row in found.rows] == [(1, 3), (1, 3), (32, 32)]
    assert len(list(gates(mixed))) == 5, "a and b share one more"


@pytest.mark.parametrize("w_bits", [(0, 2, 4), (2, 4)])
def test_layers_left_float_beside_a_model_on_another_device(w_bits: tuple[int, ...]) -> None:
    """The meta device stands for a GPU: like one, it does not mix with the CPU."""
    rules = {"conv1": None, "fc": SearchSpace.fixed(8, 8)}
    space = SearchSpace(w_bits, (4, 8), granularity="filter")
    model = prepare(models.resnet8(), space, rules=rules, example_inputs=torch.rand(1, 3, 16, 16))
    model = model.to("meta")
    assert cost(model).bops.device.type == "meta"
    assert ExpectedCost(model, "product")().bops.device.type == "meta"

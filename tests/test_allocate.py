"""The allocation against brute force over all policies: always within the budget, and how far from the best score."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qprune import Budget, InfeasibleBudgetError, Policy, Search, SearchSpace, arch_parameters, convert, prepare, sample_gates, set_gates
from qprune.convert import survives
from qprune.cost import cost, geometry_of
from qprune.gates import gates
from qprune.policy import LayerBits
from qprune.record import Record, attach
from qprune.search.allocate import LayerScores, allocate, gate_scores
from qprune.search.knapsack import Choices, solve
from qprune.tasks import models
from tests.geometries import resnet18

MEASURES = ("bops", "size_bits", "macs")


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        y: Tensor = self.c(torch.relu(x + self.b(x)))
        return y


class Stage(nn.Module):
    """Three layers that make the same channels, two of them from what the first made."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 1)
        self.d = nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        x = torch.relu(x + self.b(x))
        y: Tensor = self.d(torch.relu(x + self.c(x)))
        return y


def grouped() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.ReLU(), nn.Conv2d(4, 1, 1))


def chain(*widths: int, groups: int = 1) -> nn.Module:
    layers = [nn.Conv2d(a, b, 3, padding=1, groups=groups if a > 2 else 1) for a, b in itertools.pairwise(widths)]
    return nn.Sequential(*[module for layer in layers for module in (layer, nn.ReLU())][:-1])


def depthwise() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 3, padding=1, groups=2), nn.ReLU(), nn.Conv2d(2, 3, 1))


FILTER = SearchSpace((0, 2, 8), (2, 8), granularity="filter")
ONE_INPUT = SearchSpace((0, 2, 8), (4,), granularity="filter")
CASES: dict[str, tuple[Callable[[], nn.Module], SearchSpace]] = {
    "layer": (lambda: chain(2, 3, 3, 2), SearchSpace((2, 4, 8), (2, 4, 8))),
    "layer-joint": (lambda: chain(2, 3, 3, 2), SearchSpace((2, 4, 8), (2, 4, 8), joint=True)),
    "layer-pairs": (lambda: chain(2, 3, 3, 2), SearchSpace(pairs=((2, 2), (2, 8), (4, 4), (8, 2), (8, 8)))),
    "layer-pruning": (Residual, SearchSpace((0, 2, 4, 8), (2, 4, 8))),
    "filter": (lambda: chain(2, 2, 2, 2), SearchSpace((2, 4, 8), (2, 8), granularity="filter")),
    "filter-pruning": (lambda: chain(2, 2, 2, 2), FILTER),
    "filter-pruning-wide": (lambda: chain(2, 3, 3), FILTER),
    "filter-pruning-residual": (Residual, FILTER),
    "filter-pruning-depthwise": (depthwise, ONE_INPUT),
    "filter-pruning-stage": (Stage, ONE_INPUT),
    "filter-pruning-grouped": (grouped, SearchSpace((0, 2), (4,), granularity="filter")),
    "filter-pruning-pairs": (Residual, SearchSpace(pairs=((0, 2), (2, 2), (8, 4), (0, 4)), granularity="filter")),
}
# (layer, filter) that are pruned together with another, by hand
TIES = {
    "filter-pruning-residual": [(("a", f), ("b", f)) for f in range(2)],
    "filter-pruning-pairs": [(("a", f), ("b", f)) for f in range(2)],
    "filter-pruning-depthwise": [(("0", f), ("2", f)) for f in range(2)],
    "filter-pruning-stage": [(("a", f), (other, f)) for f in range(2) for other in ("b", "c")],
    "filter-pruning-grouped": [((name, f), (name, f + 2)) for f in range(2) for name in ("0", "2")],
}


@functools.cache
def network(case: str) -> nn.Module:
    torch.manual_seed(0)
    build, space = CASES[case]
    return prepare(build(), space, example_inputs=torch.randn(1, 2, 5, 5))


@functools.cache
def everything(case: str) -> tuple[list[Policy], np.ndarray]:
    """Every policy of the network that passes a signal and can be removed as it says, and the costs [policies, measures]."""
    space, geometry = CASES[case][1], geometry_of(network(case))
    rows = []
    for layer in geometry.layers.values():
        weights = itertools.product(space.w_bits, repeat=layer.filters) if space.granularity == "filter" else [(w,) for w in space.w_bits]
        pairs = [(w, a) for w in weights for a in space.a_bits if all((b, a) in space.candidates for b in w)]
        rows.append([LayerBits(w[0] if len(set(w)) == 1 else w, a) for w, a in pairs])
    combinations = (dict(zip(geometry.layers, combo)) for combo in itertools.product(*rows))
    possible = (layers for layers in combinations if together(layers, TIES.get(case, ())))
    found = [Policy(layers) for layers in possible if survives(layers, geometry)]
    costs = [cost(Policy(policy.layers, geometry)) for policy in found]
    return found, np.array([[float(getattr(one, measure)) for measure in MEASURES] for one in costs])


def together(layers: dict[str, LayerBits], ties: Sequence[tuple[tuple[str, int], tuple[str, int]]]) -> bool:
    """True if tied filters are pruned both or not at all."""

    def pruned(name: str, f: int) -> bool:
        bits = layers[name].w_bits
        return (bits if isinstance(bits, int) else bits[f]) == 0

    return all(pruned(*one) == pruned(*other) for one, other in ties)


def likelihood(policy: Policy, scores: dict[str, LayerScores]) -> float:
    total = 0.0
    for name, table in scores.items():
        bits = policy.bits(name)
        w, a = [table.space.w_bits.index(b) for b in bits.per_filter(len(table.weight))], table.space.a_bits.index(bits.a_bits)
        pair = np.zeros((1, 1, 1)) if table.pair is None else table.pair
        pair = np.broadcast_to(pair, (*table.weight.shape, len(table.input)))
        total += sum(table.weight[f, k] + pair[f, k, a] for f, k in enumerate(w)) + table.input[a]
    return float(total)


def random_gates(mixed: nn.Module, seed: int, spread: float = 1.5) -> dict[str, LayerScores]:
    torch.manual_seed(seed)
    for p in arch_parameters(mixed):
        nn.init.normal_(p, std=spread)
    return gate_scores(mixed)


BUDGETS: list[dict[str, Any]] = [{"bops": p} for p in ("0.4%", "0.8%", "1.5%", "3%")]
BUDGETS += [{"bops": "1.5%", "size": "15%"}, {"bops": "w4a4", "size": "w4a4"}, {"size": "12%"}]


GAPS = {"filter-pruning-depthwise": 0.03}
"""The largest relative gap to the best policy, where there is one: in one of 21 cases."""


@pytest.mark.parametrize("case", CASES)
def test_against_brute_force(case: str) -> None:
    mixed, (policies, costs) = network(case), everything(case)
    gaps: list[float] = []
    for seed in range(3):
        scores = random_gates(mixed, seed)
        values = np.array([likelihood(policy, scores) for policy in policies])
        for amounts in BUDGETS:
            budget = Budget(**amounts)
            limits = budget.limits(geometry_of(mixed))
            columns = [MEASURES.index(measure) for measure in limits]
            fits = (costs[:, columns] <= list(limits.values())).all(1)
            if not fits.any():
                with pytest.raises(InfeasibleBudgetError) as caught:
                    allocate(mixed, budget)
                assert caught.value.cheapest in costs[:, columns].min(0)
                continue
            policy = allocate(mixed, budget)
            found = cost(policy)
            assert all(float(getattr(found, measure)) <= limit for measure, limit in limits.items())
            assert survives(policy.layers, geometry_of(mixed))
            assert together(dict(policy.layers), TIES.get(case, ()))
            best, got = values[fits].max(), likelihood(policy, scores)
            assert got <= best + 1e-9
            gaps.append((best - got) / abs(best))
    assert len(gaps) > 10
    assert max(gaps) <= GAPS.get(case, 1e-4), f"{case}: largest relative gap {max(gaps):.4f}, mean {np.mean(gaps):.5f} over {len(gaps)}"


def test_two_limits_at_odds() -> None:
    """The cheapest pair in one measure is not the cheapest in the other: the one policy that meets both limits is nobody's cheapest."""
    space = SearchSpace(pairs=((1, 8), (4, 1)))
    mixed = prepare(chain(2, 4, 4), space, example_inputs=torch.randn(1, 2, 5, 5))
    only = Policy({"0": (4, 1), "2": (1, 8)}, geometry_of(mixed))
    bops, size = float(cost(only).bops), float(cost(only).size_bits)
    assert allocate(mixed, Budget(bops=bops, size=size)).layers == only.layers
    with pytest.raises(InfeasibleBudgetError, match="each of its limits can be met, but not all at once: bops 36000"):
        allocate(mixed, Budget(bops=bops, size=size - 1))


def test_scores_of_the_user() -> None:
    """A pair of −inf is never chosen, whatever the budget allows."""
    mixed = network("layer-joint")
    pair = np.array([[0, -9, -9], [-9, -np.inf, -np.inf], [-9, -np.inf, -np.inf]])
    scores = {n: LayerScores(s.space, np.zeros((1, 3)), np.zeros(3), pair) for n, s in gate_scores(mixed).items()}
    for spend, bits in ((False, {(2, 2)}), (True, {(2, 8), (8, 2)})):
        chosen = allocate(mixed, Budget(bops="w8a8"), scores, spend=spend)
        assert {(b.w_bits, b.a_bits) for b in chosen.layers.values()} <= bits


@pytest.mark.parametrize("case", CASES)
def test_infeasible_names_the_cheapest(case: str) -> None:
    mixed, (_, costs) = network(case), everything(case)
    for measure, name in (("bops", "bops"), ("size", "size_bits")):
        least = costs[:, MEASURES.index(name)].min()
        with pytest.raises(InfeasibleBudgetError) as caught:
            allocate(mixed, Budget(**{measure: least - 1}))
        assert (caught.value.cheapest, caught.value.limit) == (least, least - 1)
        what = f"{name} is limited to {least - 1:.6g}, the cheapest policy needs {least:.6g}"
        assert str(caught.value).startswith(f"no policy meets the budget: {what}")
        assert "\n" not in str(caught.value)
        assert float(getattr(cost(allocate(mixed, Budget(**{measure: least}))), name)) == least


def test_fixed_layers_count() -> None:
    net = prepare(chain(2, 3, 3), SearchSpace.fixed(4, 4), {"2": None}, example_inputs=torch.randn(1, 2, 5, 5))
    assert dict(allocate(net, Budget(bops="w4a4")).layers) == {"0": LayerBits(4, 4)}
    with pytest.raises(InfeasibleBudgetError):
        allocate(net, Budget(bops="w4a4", size="1%"))


def searched(name: str, space: SearchSpace) -> nn.Module:
    rules = {"conv1": SearchSpace.fixed(8, 8), "fc": SearchSpace.fixed(8, 8)}
    return prepare(models.get(name)(in_channels=1), space, rules, example_inputs=torch.randn(1, 1, 16, 16))


SPACES = {
    "layer": SearchSpace((2, 3, 4, 8), (2, 4, 8)),
    "layer-pairs": SearchSpace(pairs=((2, 2), (4, 4), (8, 8))),
    "layer-float": SearchSpace((2, 4, 32), (2, 4, 32)),
    "filter-pruning": SearchSpace((0, 2, 4, 8), (2, 4, 8), granularity="filter"),
    "filter-joint": SearchSpace((0, 2, 4), (2, 4), granularity="filter", joint=True),
}


@pytest.mark.parametrize("amounts", [{"bops": "w4a4"}, {"bops": "w3a3", "size": "w4a4"}, {"size": "w3a3"}, {"macs": "60%"}], ids=str)
@pytest.mark.parametrize("space", SPACES)
def test_spending_what_is_left(space: str, amounts: dict[str, Any]) -> None:
    """Gates that prefer few bits leave much of the budget: it is spent on more bits, never beyond the limits, and never on pruning."""
    mixed, budget = searched("resnet8", SPACES[space]), Budget(**amounts)
    random_gates(mixed, 0, spread=0.3)
    for name, gate in gates(mixed):
        if not name.endswith(".prune"):
            gate.logits.data[..., : gate.logits.size(-1) // 2] += 4
    try:
        plain = allocate(mixed, budget)
    except InfeasibleBudgetError:
        assert "macs" in amounts, "layers cannot lose multiplications, but every other budget can be met"
        return
    spent = allocate(mixed, budget, spend=True)
    assert allocate(mixed, budget, spend=True) == spent
    geometry = geometry_of(mixed)
    limits = budget.limits(geometry, {"conv1": LayerBits(8, 8), "fc": LayerBits(8, 8)})
    for measure, limit in limits.items():
        assert float(getattr(cost(plain), measure)) <= float(getattr(cost(spent), measure)) <= limit
    for name, layer in geometry.layers.items():
        before, after = plain.bits(name), spent.bits(name)
        assert after.a_bits >= before.a_bits
        rows = list(zip(before.per_filter(layer.filters), after.per_filter(layer.filters)))
        assert all(new >= old and (new == 0) == (old == 0) for old, new in rows)
        if name not in ("conv1", "fc"):
            assert all((new, after.a_bits) in SPACES[space].candidates for _, new in rows)
    if "bops" in limits and space != "filter-joint":
        used = max(float(getattr(cost(spent), measure)) / limit for measure, limit in limits.items())
        assert used > 0.9, f"only {used:.3f} of the budget is used; without spending {float(cost(plain).bops) / limits['bops']:.3f}"
    if "macs" in limits:
        assert spent == plain


def test_float_is_the_last_thing_that_is_bought() -> None:
    mixed = searched("resnet8", SPACES["layer-float"])
    for _, gate in gates(mixed):
        gate.logits.data[..., 0] += 4
    searched_layers = [n for n in geometry_of(mixed).layers if n not in ("conv1", "fc")]
    some = allocate(mixed, Budget(bops="w4a4"), spend=True)
    assert {some.bits(n) for n in searched_layers} == {LayerBits(4, 4)}
    more = allocate(mixed, Budget(bops="20%"), spend=True)
    kinds = {b for n in searched_layers for b in (more.bits(n).w_bits, more.bits(n).a_bits)}
    assert 32 in kinds
    assert 2 not in kinds


def test_search_spends() -> None:
    mixed = searched("resnet8", SPACES["layer"])
    random_gates(mixed, 3)
    budget = Budget(bops="w4a4")
    assert Search(mixed, budget).policy() == allocate(mixed, budget, spend=True)


@pytest.mark.parametrize("name", ["resnet8", "mobilenet"])
def test_layers_never_die(name: str) -> None:
    """Gates that want everything pruned: one filter remains wherever the signal needs it, and the result converts and passes gradients."""
    space = SearchSpace((0, 2, 4), (0, 4), granularity="filter")
    mixed = prepare(models.get(name)(in_channels=1), space, example_inputs=torch.randn(1, 1, 16, 16))
    for _, gate in gates(mixed):
        gate.logits.data[..., 0] += 8
    policy = allocate(mixed, Budget(bops="w2a4"))
    final = convert(mixed, policy).train()
    x = torch.randn(4, 1, 16, 16, requires_grad=True)
    final(x).square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    least = allocate(mixed, Budget(bops=float(cost(policy).bops)))
    assert float(cost(least).bops) <= float(cost(policy).bops)


def test_scores_are_the_likelihood_without_noise() -> None:
    mixed = network("layer-joint")
    random_gates(mixed, 0)
    policy = everything("layer-joint")[0][100]
    expected = 0.0
    for name, gate in gates(mixed):
        bits = policy.bits(name.removesuffix(".weight_gate"))
        chosen = CASES["layer-joint"][1].candidates.index((bits.w_bits, bits.a_bits))
        expected += float(gate.logits.detach().double().log_softmax(0)[chosen])
    assert likelihood(policy, gate_scores(mixed)) == pytest.approx(expected, rel=1e-5)
    budget = Budget(bops="1%")
    first = allocate(mixed, budget)
    sample_gates(mixed)
    set_gates(mixed, mode="sampled")
    noise = [gate.noise.clone() for _, gate in gates(mixed)]
    assert allocate(mixed, budget) == first
    assert {gate.mode for _, gate in gates(mixed)} == {"sampled"}
    assert all(torch.equal(gate.noise, old) for (_, gate), old in zip(gates(mixed), noise))
    set_gates(mixed, mode="relaxed")
    for _, gate in gates(mixed):
        gate.noise.zero_()


@pytest.mark.parametrize("case", ["layer", "layer-joint", "filter-pruning"])
def test_decided_gates_still_give_way_to_the_budget(case: str) -> None:
    """A probability that has become zero is the last choice, not an impossible one."""
    mixed = network(case)
    random_gates(mixed, 0)
    for _, gate in gates(mixed):
        gate.logits.data[..., -1] = 1e4
    policy = allocate(mixed, Budget(bops="1.5%"))
    assert float(cost(policy).bops) <= Budget(bops="1.5%").limits(geometry_of(mixed))["bops"]


@pytest.mark.parametrize("convention", ["zur", "uniq"])
def test_other_conventions(convention: str) -> None:
    mixed = searched("resnet8", SPACES["filter-pruning"])
    random_gates(mixed, 0)
    limit = Budget(bops="w3a3").limits(geometry_of(mixed), {"conv1": LayerBits(8, 8), "fc": LayerBits(8, 8)}, convention)["bops"]
    used = float(cost(allocate(mixed, Budget(bops="w3a3"), convention=convention, spend=True), convention=convention).bops)
    assert 0.98 * limit < used <= limit


def test_thousands_of_filters() -> None:
    """ResNet-18 with a choice for every filter: greedy moves end, also where sums over a thousand rows differ by rounding."""
    geometry, space = resnet18(), SearchSpace((0, 2, 3, 4, 8), (2, 4, 8), granularity="filter")
    net, random = nn.Module(), np.random.default_rng(0)
    attach(net, Record(geometry))
    scores = {n: LayerScores(space, random.normal(size=(layer.filters, 5)), random.normal(size=3)) for n, layer in geometry.layers.items()}
    limit = Budget(bops="w3a3").limits(geometry)["bops"]
    used = float(cost(allocate(net, Budget(bops="w3a3"), scores, spend=True)).bops)
    assert 0.9999 * limit < used <= limit


def test_knapsack() -> None:
    items = [Choices(np.array([0.0, 1.0, 3.0]), np.array([[1.0], [2.0], [3.0]])), Choices(np.array([0.0, 2.5]), np.array([[1.0], [3.0]]))]
    assert solve(items, np.array([4.0])) == [2, 0]
    assert solve(items, np.array([6.0])) == [2, 1]
    assert solve(items, np.array([1.9])) is None
    assert solve(items, np.array([-1.0])) is None
    assert solve([], np.array([1.0])) == []
    random = np.random.default_rng(0)
    for _ in range(20):
        items = [Choices(random.normal(size=4), random.integers(0, 50, size=(4, 2)).astype(float)) for _ in range(5)]
        combos = list(itertools.product(range(4), repeat=5))
        costs = np.array([sum(item.cost[k] for item, k in zip(items, combo)) for combo in combos])
        scores = np.array([sum(item.score[k] for item, k in zip(items, combo)) for combo in combos])
        limits = np.quantile(costs, 0.2, axis=0)
        picks = solve(items, limits)
        assert picks is not None
        cost_of = sum(item.cost[k] for item, k in zip(items, picks))
        assert (cost_of <= limits).all()
        assert math.isclose(sum(item.score[k] for item, k in zip(items, picks)), scores[(costs <= limits).all(1)].max(), rel_tol=1e-4)

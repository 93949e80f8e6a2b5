"""Filters that are pruned together: which, the gates they share, what that costs, and that it can be removed."""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from qprune import Budget, Policy, Search, SearchSpace, arch_parameters, convert, cost, prepare, sample_gates, set_gates
from qprune.conventions import CONVENTIONS
from qprune.cost import evaluate, geometry_of, policy_choices
from qprune.gates import Constant, Gate, TiedGate, gates, probabilities
from qprune.geometry import ChannelGroup, Geometry, LayerGeometry
from qprune.nn.mixing import Mixing
from qprune.nn.premix import Premix
from qprune.search.allocate import allocate, gate_scores
from qprune.search.expected import ExpectedCost
from qprune.ties import Tie, filterwise, not_removable, tied_channels

SPACE = SearchSpace((0, 2, 4), (2, 4), granularity="filter")
IMAGE = torch.randn(2, 2, 6, 6)


class Stage(nn.Module):
    """a, b and c make the same channels; b and d read what a made, c what a and b made."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(2, width, 1), nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 1)
        self.bn, self.d, self.fc = nn.BatchNorm2d(width), nn.Conv2d(width, 2, 1), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.a(x)))
        x = torch.relu(x + self.b(x))
        x = torch.relu(x + self.c(x))
        y: Tensor = self.fc(torch.relu(self.d(x)).mean((2, 3)))
        return y


class Inverted(nn.Module):
    """An inverted residual with a gate that multiplies its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.expand, self.depthwise = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.reduce, self.excite, self.project, self.fc = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1), nn.Conv2d(4, 2, 1), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = torch.relu(self.depthwise(torch.relu(self.expand(x))))
        y = y * torch.sigmoid(self.excite(torch.relu(self.reduce(y.mean((2, 3), keepdim=True)))))
        z: Tensor = self.fc((x + self.project(y)).mean((2, 3)))
        return z


class Joined(nn.Module):
    """c makes the channels of a and those of b."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 1, 1), nn.Conv2d(2, 3, 1), nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.d(torch.relu(torch.cat([self.a(x), self.b(x)], 1) + self.c(x)))
        return y


class JoinedGroups(nn.Module):
    """The two groups of c read what a made, and what b made."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.d(torch.relu(self.c(torch.relu(torch.cat([self.a(x), self.b(x)], 1)))))
        return y


def grouped() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(), nn.Conv2d(6, 2, 1))


def multiplied() -> nn.Module:
    """A depthwise layer of two filters per channel."""
    return nn.Sequential(nn.Conv2d(2, 3, 1), nn.ReLU(), nn.Conv2d(3, 6, 3, groups=3), nn.ReLU(), nn.Conv2d(6, 2, 1))


def prepared(build: Callable[[], nn.Module] = Stage, space: SearchSpace = SPACE, **rules: SearchSpace | None) -> nn.Module:
    model = prepare(build(), space, rules, example_inputs=IMAGE)
    for p in arch_parameters(model):
        nn.init.normal_(p)
    return model


def layers_of(model: nn.Module) -> dict[str, Mixing]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Mixing)}


def ties_of(model: nn.Module) -> list[dict[str, tuple[int, ...]]]:
    return [tie.channels for tie in tied_channels(geometry_of(model), {n for n, m in layers_of(model).items() if filterwise(m)})]


FIXED = SearchSpace.fixed(4, 4)
KNOWN: dict[str, tuple[Callable[[], nn.Module], dict[str, SearchSpace | None], list[dict[str, tuple[int, ...]]]]] = {
    "residual": (Stage, {}, [{"a": (0, 1, 2), "b": (0, 1, 2), "c": (0, 1, 2)}]),
    "residual of a layer that stays": (Stage, {"a": FIXED}, []),
    "residual, the last layer stays": (Stage, {"c": None}, [{"a": (0, 1, 2), "b": (0, 1, 2)}]),
    "residual, one layer is pruned as a whole": (Stage, {"b": SearchSpace((0, 2), (4,))}, []),
    "depthwise, excitation stays": (
        Inverted,
        {"excite": FIXED},
        [{"stem": (0, 1), "project": (0, 1)}, {"expand": (0, 1, 2, 3), "depthwise": (0, 1, 2, 3)}],
    ),
    "depthwise and excitation": (
        Inverted,
        {},
        [
            {"stem": (0, 1), "project": (0, 1)},
            {"expand": (0, 1, 2, 3), "depthwise": (0, 1, 2, 3), "excite": (0, 1, 2, 3)},
        ],
    ),
    "concatenation added": (Joined, {}, [{"a": (0, 1), "b": (2,), "c": (0, 1, 2)}]),
    "concatenation, one part stays": (Joined, {"b": FIXED}, [{"a": (0, 1), "c": (0, 1, 2)}]),
    "groups": (grouped, {}, [{"0": (0, 1, 0, 1)}, {"2": (0, 1, 2, 0, 1, 2)}]),
    "groups that read two layers": (JoinedGroups, {}, [{"a": (0, 1), "b": (0, 1)}, {"c": (0, 1, 0, 1)}]),
    "depthwise with a multiplier": (multiplied, {}, [{"0": (0, 1, 2), "2": (0, 0, 1, 1, 2, 2)}]),
    "chain": (lambda: nn.Sequential(nn.Conv2d(2, 3, 1), nn.ReLU(), nn.Conv2d(3, 2, 1)), {}, []),
}


@pytest.mark.parametrize("case", KNOWN)
def test_what_is_tied(case: str) -> None:
    build, rules, expected = KNOWN[case]
    model = prepare(build(), SPACE, rules, example_inputs=IMAGE)
    assert ties_of(model) == expected
    for name, layer in layers_of(model).items():
        tie = next((tie for tie in expected if name in tie), None)
        assert isinstance(layer.weight_gate, TiedGate) == (tie is not None), name
        if tie is not None and isinstance(layer.weight_gate, TiedGate):
            assert layer.weight_gate.channels == tie[name]
    prunes = {layer.weight_gate.prune for layer in layers_of(model).values() if isinstance(layer.weight_gate, TiedGate)}
    assert len(prunes) == len(expected) and prunes <= {gate for _, gate in gates(model)}


def test_without_example_inputs_nothing_is_tied() -> None:
    assert not any(isinstance(gate, TiedGate) for _, gate in gates(prepare(Stage(), SPACE)))


def test_channels_that_nobody_is_known_to_read_are_not_tied() -> None:
    layers = {n: LayerGeometry(n, "Conv2d", 2, 2, 1, 1, 4) for n in "abc"}
    together = {"a": (0, 1), "b": (1, 0)}
    read = Geometry(layers, (ChannelGroup(2, together, {"c": ((0, 0), (1, 1))}),))
    assert tied_channels(read, "abc") == (Tie(2, {"a": (0, 1), "b": (1, 0)}),)
    assert tied_channels(Geometry(layers, (ChannelGroup(2, together, {}),)), "abc") == ()
    half = tied_channels(Geometry(layers, (ChannelGroup(2, together, {"c": ((0, 1),)}),)), "abc")
    assert half == (Tie(3, {"a": (0, 1), "b": (1, 2)}),), "only channel 1, of filters a1 and b0"


def test_what_cannot_be_removed_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "qprune"):
        model = prepare(Stage(), SPACE, {"a": FIXED}, example_inputs=IMAGE)
    reasons = not_removable(geometry_of(model), {"b", "c", "d", "fc"})
    assert list(reasons) == ["b", "c", "fc"]
    assert reasons["b"] == reasons["c"] == "its channels are those of a too, which cannot be pruned per filter"
    assert reasons["fc"] == "no layer is known to read its channels"
    (line,) = [record.message for record in caplog.records if "go on reading" in record.message]
    assert all(f"{name} ({reason})" in line for name, reason in reasons.items())
    caplog.clear()
    with caplog.at_level(logging.INFO, "qprune"):
        prepare(Stage(), SPACE, {"fc": None}, example_inputs=IMAGE)
    assert not [record for record in caplog.records if "go on reading" in record.message]


SPACES = {
    "factorised": SPACE,
    "joint": SearchSpace((0, 2, 4), (2, 4), granularity="filter", joint=True),
    "pairs": SearchSpace(pairs=((2, 4), (0, 4), (4, 2)), granularity="filter"),
}


@pytest.mark.parametrize("space", SPACES)
def test_starts_with_every_candidate_equally_likely(space: str) -> None:
    for layer in layers_of(prepare(Stage(), SPACES[space], example_inputs=IMAGE)).values():
        p = layer.weight_gate()
        torch.testing.assert_close(p, torch.full_like(p, 1 / p.size(1)))


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("mode", ["relaxed", "sampled"])
def test_shared_probability(space: str, mode: str) -> None:
    """p0 is the shared gate's; the rest is split as the layer's own logits say; draws agree on what is pruned."""
    model = prepared(space=SPACES[space])
    set_gates(model, mode, temperature=0.7)
    if mode == "sampled":
        sample_gates(model, torch.Generator().manual_seed(1))
        model.a.weight_gate.prune.noise.copy_(torch.tensor([[99.0, 0.0], [0.0, 99.0], [99.0, 0.0]]))
    layers = layers_of(model)
    gone = []
    for name in "abc":
        gate = layers[name].weight_gate
        assert isinstance(gate, TiedGate)
        p, zero = gate(), torch.tensor(gate.columns)
        torch.testing.assert_close(p.sum(1), torch.ones(3))
        gone.append(p[:, zero].sum(1))
        torch.testing.assert_close(gone[-1], gate.prune()[:, 0])
        if mode == "relaxed":
            own = (gate.logits / 0.7).masked_fill(zero, -torch.inf).softmax(1)[:, ~zero]
            torch.testing.assert_close(p[:, ~zero], own * (1 - gone[-1]).unsqueeze(1))
        else:
            assert set(p.detach().flatten().tolist()) <= {0.0, 1.0}
    torch.testing.assert_close(gone[1:], [gone[0], gone[0]])
    if mode == "sampled":
        assert gone[0].tolist() == [1, 0, 1]


@pytest.mark.parametrize("mode", ["relaxed", "sampled", "fixed"])
def test_many_at_once(mode: str) -> None:
    model = prepared()
    set_gates(model, mode, temperature=0.5)
    sample_gates(model)
    if mode == "sampled":
        layers_of(model)["d"].weight_gate.mode = "relaxed"  # type: ignore[union-attr]
    members = [layer.weight_gate for layer in layers_of(model).values()] + [Constant(3), Gate(2)]
    alone = [gate() if gate().dim() == 2 else gate().unsqueeze(0) for gate in members]
    for a, b in zip(probabilities(members), alone, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("mode", ["relaxed", "sampled", "fixed"])
@pytest.mark.parametrize("premix", [False, True])
def test_every_parameter_gets_a_gradient(mode: str, premix: bool) -> None:
    model = prepared().train()
    set_gates(model, mode)
    sample_gates(model)
    with Premix(model) if premix else torch.enable_grad():
        (model(IMAGE).square().sum() + cost(model).bops * 1e-6).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
        if name.endswith(".prune.logits") and mode != "fixed":
            assert p.grad.abs().sum() > 0


def test_pruned_layers_agree_in_the_forward_pass() -> None:
    """A channel that is drawn as pruned is zero behind the sum, whatever the image."""
    model = prepared().eval()
    for layer in ("a", "b", "c"):
        nn.init.zeros_(getattr(model, layer).bias)
    set_gates(model, "sampled")
    model.a.weight_gate.prune.noise.copy_(torch.tensor([[1e3, 0.0], [0.0, 1e3], [1e3, 0.0]]))
    seen: list[Tensor] = []
    model.d.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(IMAGE)
    assert not seen[0][:, [0, 2]].any() and seen[0][:, 1].any()


def policies(model: nn.Module) -> list[Policy]:
    """Every policy in which tied filters are pruned together, by the hand-written ties of Stage: filter f of a, b and c."""
    geometry = geometry_of(model)
    names = list(layers_of(model))
    rows = [itertools.product((0, 2, 4), repeat=geometry.layers[name].filters) for name in names]
    found = []
    for combo in itertools.product(*rows):
        layers = dict(zip(names, combo, strict=True))
        if all((layers["a"][f] == 0) == (layers[o][f] == 0) for f in range(len(layers["a"])) for o in ("b", "c")):
            found.append(Policy({name: (bits, 4) for name, bits in layers.items()}, geometry))
    return found


def log_likelihood(model: nn.Module, policy: Policy) -> Tensor:
    """Of the weights' bits, from the logits."""
    total = torch.zeros(())
    bits = {name: torch.tensor(policy.bits(name).per_filter(layer.weight.size(0))) for name, layer in layers_of(model).items()}
    total = total + model.a.weight_gate.prune.logits.log_softmax(1)[range(len(bits["a"])), (bits["a"] > 0).long()].sum()
    for name, layer in layers_of(model).items():
        if isinstance(layer.weight_gate, Gate):
            tied = isinstance(layer.weight_gate, TiedGate)
            log_p = layer.weight_gate.logits[:, int(tied) :].log_softmax(1)
            for row, b in zip(log_p, bits[name].tolist(), strict=True):
                total = total + (row[(0, 2, 4).index(b) - int(tied)] if b or not tied else 0.0)
    return total


def narrow_stage() -> nn.Module:
    net = Stage(2)
    net.d, net.fc = nn.Conv2d(2, 1, 1), nn.Linear(1, 1)
    return net


def test_expected_cost_and_its_gradient_are_those_of_all_policies() -> None:
    model = prepared(narrow_stage, SearchSpace((0, 2, 4), (4,), granularity="filter"), fc=None)
    geometry, logits = geometry_of(model), arch_parameters(model)
    mean, total = torch.zeros(3, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for policy in policies(model):
        chance = log_likelihood(model, policy).double().exp()
        one = evaluate(geometry, policy_choices(geometry, policy), CONVENTIONS["product"])
        mean, total = mean + chance * torch.stack([one.bops, one.macs, one.size_bits]), total + chance
    assert float(total.detach()) == pytest.approx(1.0)
    for found in (cost(model), ExpectedCost(model, "product")()):
        values = torch.stack([found.bops, found.macs, found.size_bits])
        torch.testing.assert_close(values, mean, rtol=1e-6, atol=0)
        for value, exact in zip(values, mean, strict=True):
            pairs = zip(*(torch.autograd.grad(v / exact.detach(), logits, retain_graph=True, allow_unused=True) for v in (value, exact)))
            for got, expected in pairs:
                zero = torch.zeros(())
                torch.testing.assert_close(zero if got is None else got, zero if expected is None else expected, rtol=1e-4, atol=2e-6)


def test_untied_zeros_are_legal() -> None:
    """A policy of one's own may prune one filter of three that make a channel: its own cost is saved, its readers' is not."""
    model = prepared()
    geometry = geometry_of(model)
    whole = dict.fromkeys(geometry.layers, (4, 4))
    one = Policy({**whole, "b": ((0, 4, 4), 4)}, geometry)
    all_three = Policy({**whole, **dict.fromkeys("abc", ((0, 4, 4), 4))}, geometry)
    full, less, least = (cost(p) for p in (Policy(whole, geometry), one, all_three))
    rows = [{row.name: float(row.macs) for row in found.rows} for found in (full, less, least)]
    assert [row["b"] for row in rows] == [36 * 81, 36 * 54, 36 * 36]
    assert [row["d"] for row in rows] == [36 * 6, 36 * 6, 36 * 4]
    set_gates(model, "fixed")
    for name, layer in layers_of(model).items():
        bits = one.bits(name).per_filter(layer.weight.size(0))
        layer.weight_gate.choice.copy_(torch.tensor([(0, 2, 4).index(b) for b in bits]))  # type: ignore[union-attr, operator]
        layer.input_gate.choice.fill_(1)  # type: ignore[union-attr, operator]
    assert float(cost(model).bops.detach()) == float(less.bops)
    final = convert(model, one)
    assert final(IMAGE).isfinite().all()


def two_steps(model: nn.Module, policy: Policy) -> float:
    """log p of what is pruned and what is kept, and of the kept filters' bits relative to their likeliest; from the logits."""
    total = 0.0
    for name, layer in layers_of(model).items():
        gate = layer.weight_gate
        if not isinstance(gate, Gate):
            continue
        p = gate.logits.detach().double().softmax(1)
        for row, b in zip(p, policy.bits(name).per_filter(len(p)), strict=True):
            kept = row[1:]
            total += float((kept[(2, 4).index(b)] / kept.max()).log()) if b else 0.0
            if not isinstance(gate, TiedGate):
                total += float((kept.sum() if b else row[0]).log())
    shared = model.a.weight_gate.prune.logits.detach().double().log_softmax(1)
    return total + sum(float(row[int(b > 0)]) for row, b in zip(shared, policy.bits("a").per_filter(len(shared)), strict=True))


def test_scores_count_a_shared_choice_once() -> None:
    model = prepared(narrow_stage, SearchSpace((0, 2, 4), (4,), granularity="filter"), fc=None)
    torch.manual_seed(1)
    for logits in arch_parameters(model):
        nn.init.normal_(logits)
    scores = gate_scores(model)
    for policy in policies(model)[::37]:
        total = 0.0
        for name, table in scores.items():
            k = [table.space.w_bits.index(b) for b in policy.bits(name).per_filter(len(table.weight))]
            total += table.weight[range(len(k)), k].sum() + table.input[0]
        assert total == pytest.approx(two_steps(model, policy), rel=1e-5)


def test_filling_a_budget_prunes_fewer_and_those_that_are_least_wanted() -> None:
    model = prepare(Stage(8), SearchSpace((0, 2, 4), (4,), granularity="filter"), example_inputs=IMAGE)
    prune = layers_of(model)["a"].weight_gate.prune
    odds = torch.linspace(2, 6, prune.logits.size(0))
    prune.logits.data[:, 0] = odds  # the last are the least wanted
    budget = Budget(bops="w2a4")
    limit = budget.limits(geometry_of(model))["bops"]
    sparse, filled = (allocate(model, budget, spend=True, fill=fill) for fill in (False, True))
    rows = [[b == 0 for b in policy.bits("a").per_filter(8)] for policy in (sparse, filled)]
    assert sum(rows[0]) > sum(rows[1]) and rows[1] == sorted(rows[1])
    assert float(cost(sparse).bops) < 0.9 * limit <= float(cost(filled).bops) <= limit


def test_undecided_gates_prune_nothing_that_the_budget_leaves() -> None:
    """Keeping a filter is one choice, however many widths it could then have and however many filters share it."""
    torch.manual_seed(0)
    model = prepare(Stage(4), SearchSpace((0, 2, 4, 8), (8,), granularity="filter"), example_inputs=IMAGE)
    policy = allocate(model, Budget(bops="w8a8"))
    assert not policy.pruned()
    tight = allocate(model, Budget(bops="w2a8"), spend=True)
    limit = Budget(bops="w2a8").limits(geometry_of(model))["bops"]
    assert 0.9 * limit < float(cost(tight).bops) <= limit


def test_copies_and_state_keep_the_tie() -> None:
    model = prepared()
    twin = copy.deepcopy(model)
    assert twin.a.weight_gate.prune is twin.b.weight_gate.prune is not model.a.weight_gate.prune
    assert len(arch_parameters(twin)) == len(arch_parameters(model)) == len({id(p) for p in arch_parameters(model)})
    other = prepare(Stage(), SPACE, example_inputs=IMAGE)
    assert not torch.equal(other.c.weight_gate(), model.c.weight_gate())
    other.load_state_dict(model.state_dict(), strict=True)
    assert all(torch.equal(a.weight_gate(), b.weight_gate()) for a, b in zip(layers_of(other).values(), layers_of(model).values()))
    other.load_state_dict(Stage().state_dict(), strict=True)
    half = copy.deepcopy(model).bfloat16()
    assert half(IMAGE.bfloat16()).isfinite().all()


def test_preparing_again() -> None:
    """Gates stay where the tie does; a layer that no longer can be pruned unties the others, with the probabilities they had."""
    model = prepared()
    before = {name: layer.weight_gate().detach() for name, layer in layers_of(model).items()}
    again = prepare(model, SPACE, example_inputs=IMAGE)
    assert again.a.weight_gate.prune is again.c.weight_gate.prune
    assert all(torch.equal(layer.weight_gate(), before[name]) for name, layer in layers_of(again).items())
    for untied in (prepare(model, SPACE, {"a": FIXED}, example_inputs=IMAGE), prepare(model, SPACE)):
        assert not any(isinstance(gate, TiedGate) for _, gate in gates(untied))
        for name in "bc":
            torch.testing.assert_close(getattr(untied, name).weight_gate(), before[name])
    retied = prepare(untied, SPACE, example_inputs=IMAGE)
    for name in "abc":
        torch.testing.assert_close(getattr(retied, name).weight_gate(), before[name])


def test_other_pruning_methods_keep_their_own_gates() -> None:
    """sbs prunes by gates of its own: no tied gate is left behind, and none is learned."""
    space = SearchSpace((0, 2, 4, 8), (2, 4, 8))
    model = prepare(Stage(4), space, example_inputs=IMAGE)
    Search(model, Budget(bops="w3a3"), method="sbs")
    assert not any(isinstance(gate, TiedGate) for _, gate in gates(model))


def test_layers_compile_in_one_graph() -> None:
    model = prepared(narrow_stage).eval()
    expected = model(IMAGE)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(IMAGE), expected)


@pytest.mark.parametrize("build", [Stage, Inverted, grouped, JoinedGroups, multiplied])
def test_what_a_search_prunes_can_be_removed(build: Callable[[], nn.Module]) -> None:
    """A few steps towards pruning; the policy prunes together, and the converted network costs what the policy says."""
    model = prepare(build(), SPACE, example_inputs=IMAGE)
    for name, gate in gates(model):
        if name.endswith(".prune"):
            gate.logits.data[::2, 0] += 4
    search = Search(model, Budget(bops="w2a2"), method="edmips")
    for _ in range(2):
        search.step(lambda m: m(IMAGE).square().mean())
    policy = allocate(model, Budget(bops="w4a4"), spend=True)
    pruned = {n: [b == 0 for b in policy.bits(n).per_filter(m.weight.size(0))] for n, m in layers_of(model).items()}
    for tie in ties_of(model):
        for (one, first), (other, second) in itertools.combinations(tie.items(), 2):
            decided = dict(zip(first, pruned[one], strict=True))
            assert all(decided.get(c, gone) == gone for c, gone in zip(second, pruned[other], strict=True)), (one, other)
        for name, channels in tie.items():
            assert len({(c, gone) for c, gone in zip(channels, pruned[name], strict=True)}) == len(set(channels))
    assert any(any(rows) for rows in pruned.values())
    final, masked = convert(model, policy).eval(), convert(model, policy, remove=False).eval()
    torch.testing.assert_close(final(IMAGE), masked(IMAGE), atol=1e-5, rtol=1e-5)
    assert float(cost(final).bops) == pytest.approx(float(cost(policy).bops))
    assert sum(p.numel() for p in final.parameters()) < sum(p.numel() for p in masked.parameters())

"""The search with single-path bit sharing: its loss, its steps, its policies, and what they are converted to."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from unit_models import batches, block_net

import qprune
from qprune.errors import InfeasibleBudgetError, InputError, NonFiniteError, SpaceError
from qprune.geometry import Geometry, trace_geometry
from qprune.nn.bitgates import BitGate
from qprune.nn.nested import NestedConv2d, nest
from qprune.nn.premix import Premix
from qprune.policy import LayerBits
from qprune.record import record_of
from qprune.search import driver, graph
from qprune.search.sbs import Sbs
from qprune.search.sbs_policy import Allocation, candidate_scores, gated_chains, nested_layers, remaining
from qprune.silence import silence
from qprune.tasks.mobilenet import mobilenet
from qprune.tasks.resnet import resnet20

EDGE = qprune.SearchSpace.fixed(8, 8)
PRUNING = qprune.SearchSpace((0, 2, 4, 8), (2, 4, 8))


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(driver.METHODS, "sbs", Sbs)


def task(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def prepared(space: qprune.SearchSpace = PRUNING, width: int = 8) -> nn.Module:
    torch.manual_seed(0)
    return qprune.prepare(block_net(width), space, {"0": EDGE, "7": EDGE}, batches(1)[0][0])


def search_on(model: nn.Module, budget: str = "w3a3", **options: Any) -> tuple[qprune.Search, Sbs]:
    search = qprune.Search(model, qprune.Budget.parse(budget), "sbs", **options)
    assert isinstance(search.method, Sbs)
    return search, search.method


def steps(search: qprune.Search, count: int, start: int = 0) -> list[float]:
    return [search.step(task, batch=batch).loss for batch in batches(start + count)[start:]]


def bit_gates(model: nn.Module) -> list[BitGate]:
    return [module for module in model.modules() if isinstance(module, BitGate)]


def test_learns_within_budget() -> None:
    model = prepared()
    search, _ = search_on(model, weight_lr=0.05, threshold_rate=0.3, dual_rate=0.1)
    start = float(qprune.cost(model).bops.detach()) / search.limits["bops"]
    history = search.fit(batches(8), epochs=8)
    assert history[-1]["loss"] < 0.3 * history[0]["loss"]
    assert history[-1]["cost_ratio"] < 1.1 < 5 < start
    policy = search.policy()
    assert 0.9 * search.limits["bops"] < float(qprune.cost(policy).bops) <= search.limits["bops"]
    assert {b.a_bits for b in policy.layers.values()} <= {2, 4, 8}
    final = silence(qprune.convert(model, policy), policy, batches(1)[0][0])
    assert float(qprune.cost(final).bops) == pytest.approx(float(qprune.cost(policy).bops))
    for x, y in batches(4):
        assert math.isfinite(float(task(final.train(), x, y).detach()))
    hits = sum(int((final.eval()(x).argmax(1) == y).sum()) for x, y in batches(4, seed=2))
    assert hits > 0.7 * 64


@pytest.mark.parametrize("closed, printed", [(False, "2612.4"), (True, "190.2")])
def test_soft_cost_of_open_and_closed_gates(closed: bool, printed: str) -> None:
    """The network of the paper's table, 41798.6 M float and 674.6 M at 4/4 bits: at 8/8 a sixteenth of the float network, with first and
    last layer at 8 bits too."""
    net = resnet20(100, preactivation=True)
    x = torch.randn(1, 3, 32, 32)
    space = qprune.SearchSpace((2, 4, 8), (2, 4, 8))
    model = qprune.prepare(net, space, {"conv1": EDGE, "fc": EDGE}, x)
    _, method = search_on(model, "w4a4")
    record = record_of(model)
    assert record is not None and record.geometry is not None
    for gate in bit_gates(model):
        gate.thresholds.data.fill_(2.0 if closed else 0.0)
    found = float(method.expected_cost().bops.detach())
    bits = 2 if closed else 8
    uniform = qprune.Policy.uniform(record.geometry, bits, bits, {"conv1": LayerBits(8, 8), "fc": LayerBits(8, 8)})
    assert found == float(qprune.cost(uniform).bops)
    assert f"{found / 1e6:.1f}" == printed


def test_soft_cost_is_the_papers_formula() -> None:
    """Σ k² C_in C_out H W b_w b_a with soft counts of filters and bits, and its gradient."""
    model = prepared()
    _, method = search_on(model)
    g = torch.Generator().manual_seed(1)
    for gate in bit_gates(model):
        gate.errors.copy_(torch.rand(2, generator=g))
        gate.thresholds.data = torch.rand(2, generator=g)
    for chain in method.chains:
        margins = chain.pruning.gate.importance(chain.pruning.weight).detach()
        chain.pruning.gate.thresholds.data.fill_(float(margins.min()))
    method.expected_cost().bops.backward()
    own = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    record = record_of(model)
    assert record is not None and record.geometry is not None
    total: Any = 0
    for name, layer in record.geometry.layers.items():
        nested = method.layers.get(name)
        if nested is None:
            total = total + layer.macs * 64
            continue
        out = layer.filters if nested.pruned_out is None else nested.pruned_out().sum()
        inputs = layer.inputs if nested.pruned_in is None else nested.pruned_in().sum()
        total = total + layer.positions * layer.kernel * out * inputs * soft_bits(nested.weight_gate.bits) * soft_bits(nested.input_gate)
    total.backward()
    assert float(method.expected_cost().bops.detach()) == pytest.approx(float(total.detach()), rel=1e-6)
    theirs = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert own.keys() == theirs.keys() and any("filter_gate" in name for name in own)
    for name, gradient in theirs.items():
        torch.testing.assert_close(own[name], gradient, rtol=1e-4, atol=1e-2)


def soft_bits(gate: BitGate) -> Tensor:
    first, second = _straight(gate).unbind()
    return 2 + 2 * first + 4 * first * second


def _straight(gate: BitGate) -> Tensor:
    margin = gate.statistic() - gate.thresholds
    return (margin > 0).float() + margin.sigmoid() - margin.sigmoid().detach()


def test_thresholds_alternate_and_never_decay() -> None:
    model = prepared()
    search, method = search_on(model, weight_decay=0.5)
    moved = []
    for batch in batches(4):
        before = [g.thresholds.detach().clone() for g in (*method.weight_gates, *method.input_gates)]
        search.step(task, batch=batch)
        now = [g.thresholds for g in (*method.weight_gates, *method.input_gates)]
        changed = [not torch.equal(a, b) for a, b in zip(before, now, strict=True)]
        half = len(method.weight_gates)
        moved.append((any(changed[:half]), any(changed[half:])))
    assert moved == [(True, False), (False, True)] * 2
    group = next(
        g for g in search.method.optimizers.weights.param_groups if any(p is method.weight_gates[0].thresholds for p in g["params"])
    )
    assert group["weight_decay"] == 0
    together = [p for g in search.method.optimizers.weights.param_groups for p in g["params"]]
    assert len({id(p) for p in together}) == len(together)


def test_every_parameter_has_one_optimizer() -> None:
    model = prepared()
    _, method = search_on(model)
    owned = [id(p) for o in method.optimizers._all().values() for g in o.param_groups for p in g["params"]]
    present = {id(p) for p in model.parameters()}
    assert present <= set(owned) and all(owned.count(p) == 1 for p in present)


def test_thresholds_stay_between_zero_and_their_bound() -> None:
    model = prepared()
    search, method = search_on(model, "w3a3", lmbda=50.0, threshold_rate=20.0)
    steps(search, 8)
    assert all(bool((g.thresholds >= 0).all()) for g in bit_gates(model))
    for chain in method.chains:
        groups = (chain.pruning() @ chain.pruning.gate.members > 0).float()
        assert 0 < float((1 - groups).sum()) <= chain.pruning.gate.closable
    assert method.summary()["kept"] == 0.5


def test_one_step_of_constant_lambda_is_sgd_on_the_papers_loss() -> None:
    model = prepared(qprune.SearchSpace())
    search, method = search_on(model, "w3a3", lmbda=0.7, weight_lr=0.01, momentum=0.0, weight_decay=0.0)
    (batch,) = batches(1)
    twin = copy.deepcopy(model)
    search.step(task, batch=batch)
    loss = task(twin.train(), *batch) + 0.7 * qprune.cost(twin).bops.log()
    loss.backward()
    for mine, layer in zip(method.layers.values(), nested_layers(twin).values(), strict=True):
        before, after = layer.weight_gate.bits.thresholds, mine.weight_gate.bits.thresholds
        torch.testing.assert_close(after, (before - 0.01 * before.grad).clamp_min(0))
        torch.testing.assert_close(mine.weight, layer.weight - 0.01 * layer.weight.grad)


class NoReadBack(TorchDispatchMode):
    """Refuses to give a tensor's value to the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a value was read back"
        return func(*args, **(kwargs or {}))


def test_forward_and_cost_read_nothing_back() -> None:
    model = prepared()
    _, method = search_on(model)
    (x, y), *_ = batches(1)
    with NoReadBack():
        loss = task(model.train(), x, y)
        slack = method.constraint.slack(method.expected_cost())
        (loss + method.constraint.penalty(slack)).backward()
        method._clamp()
    assert model.get_parameter("4.conv1.filter_gate.thresholds").grad is not None


def trained(budget: str = "w3a3", **options: Any) -> tuple[nn.Module, qprune.Search, Sbs]:
    model = prepared()
    search, method = search_on(model, budget, weight_lr=0.05, **options)
    steps(search, 10)
    return model, search, method


def test_converted_network_computes_what_the_gates_did() -> None:
    """A policy that is what the gates say: no change in the output, to rounding; also after saving and loading."""
    model, _, method = trained(lmbda=3.0)
    policy = read_off(model, method)
    assert policy.pruned() and len({str(b) for b in policy.layers.values()}) > 3
    x = batches(1, seed=5)[0][0]
    model.eval()
    final = silence(qprune.convert(model, policy), policy, x).eval()
    torch.testing.assert_close(final(x), model(x), rtol=1e-4, atol=1e-4)
    filters, seen = policy.pruned()["4.conv1"], []
    final.get_submodule("4.conv2").register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    final(x)
    assert not seen[0][:, filters].any()
    final.train()(x).square().sum().backward()
    weight = final.get_parameter("4.bn1.bias")
    assert weight.grad is not None and not weight.grad[filters].any()


def read_off(model: nn.Module, method: Sbs) -> qprune.Policy:
    """The gates as they are, whatever that costs."""
    record = record_of(model)
    assert record is not None and record.geometry is not None
    layers: dict[str, LayerBits] = {name: bits for name, bits in record.fixed.items() if bits is not None}
    for name, layer in method.layers.items():
        p = layer.weight_gate().detach()
        w = [layer.space.w_bits[k] for k in (p if p.dim() == 2 else p[None]).argmax(1).tolist()]
        layers[name] = LayerBits(tuple(w) if len(w) > 1 else w[0], layer.space.a_bits[int(layer.input_gate().argmax())])
    return qprune.Policy(layers, record.geometry)


def test_save_and_load(tmp_path: Any) -> None:
    model, search, _ = trained()
    policy = search.policy()
    x = batches(1, seed=5)[0][0]
    final = silence(qprune.convert(model, policy), policy, x).eval()
    qprune.save(final, tmp_path / "net.safetensors")
    again = qprune.load(tmp_path / "net.safetensors", lambda: block_net(8)).eval()
    assert torch.equal(again(x), final(x))


@pytest.mark.parametrize("options", [{}, {"mode": "two-stage", "switch": 3}], ids=["joint", "two-stage"])
def test_resumes_bit_for_bit(options: dict[str, Any]) -> None:
    model = prepared()
    search, _ = search_on(model, weight_lr=0.05, **options)
    steps(search, 5)
    saved = copy.deepcopy((model.state_dict(), search.state_dict()))
    expected = steps(search, 4, start=5)
    again = prepared()
    resumed, _ = search_on(again, weight_lr=0.05, **options)
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    assert steps(resumed, 4, start=5) == expected
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_a_nested_model_can_be_searched_again() -> None:
    model, _, _ = trained()
    layer = model.get_submodule("3.conv1")
    search, method = search_on(model)
    assert model.get_submodule("3.conv1") is layer
    before = method.weight_gates[0].thresholds.detach().clone()
    steps(search, 2)
    assert not torch.equal(before, method.weight_gates[0].thresholds)
    test_every_parameter_has_one_optimizer()


def test_quantization_only_prunes_nothing() -> None:
    model = prepared()
    search, method = search_on(model, mode="quantization")
    assert not method.chains and not any(0 in layer.space.w_bits for layer in method.layers.values())
    steps(search, 4)
    assert not search.policy().pruned()


def test_pruning_only_keeps_the_widest_bits() -> None:
    model = prepared()
    search, method = search_on(model, "5%", mode="pruning", lmbda=3.0, threshold_rate=3.0)
    steps(search, 6)
    assert all(not gate.thresholds.any() and gate.errors.tolist() == [1.0, 1.0] for gate in bit_gates(model))
    policy = search.policy()
    assert policy.pruned()
    assert {b for bits in policy.layers.values() for b in bits.per_filter(1)} <= {0, 8} and {b.a_bits for b in policy.layers.values()} == {
        8
    }
    assert method.summary()["kept"] < 1


def test_two_stages() -> None:
    model = prepared()
    search, method = search_on(model, mode="two-stage", switch=6, lmbda=3.0, threshold_rate=3.0)
    steps(search, 6)
    assert not any(gate.thresholds.any() for gate in bit_gates(model))
    kept = [chain.pruning().detach() for chain in method.chains]
    assert any(not k.all() for k in kept)
    thresholds = [chain.pruning.gate.thresholds.detach().clone() for chain in method.chains]
    steps(search, 6, start=6)
    assert any(gate.thresholds.any() for gate in bit_gates(model))
    for chain, before, threshold in zip(method.chains, kept, thresholds, strict=True):
        assert torch.equal(chain.pruning(), before) and bool((chain.pruning.gate.thresholds <= threshold).all())


def test_scores_follow_the_margins() -> None:
    gate = BitGate(3)
    gate.observe(torch.tensor([1 / 12, 1 / 60]))
    assert candidate_scores(gate, (2, 4, 8), False).argmax() == 2
    gate.thresholds.data = torch.tensor([0.0, 0.05])
    assert candidate_scores(gate, (2, 4, 8), False).argmax() == 1
    gate.thresholds.data = torch.tensor([0.2, 0.0])
    scores = candidate_scores(gate, (2, 4, 8), False)
    p = 1 / (1 + math.exp(-12 * (1 / 12 - 0.2)))
    q = 1 / (1 + math.exp(-1))
    assert scores.tolist() == pytest.approx([math.log(1 - p), math.log(p * (1 - q)), math.log(p * q)], rel=1e-5)
    assert candidate_scores(gate, (2, 4, 8), True).tolist() == [-math.inf, -math.inf, 0.0]


@pytest.mark.parametrize("build", [lambda: block_net(8), mobilenet], ids=["blocks", "inverted residuals"])
def test_reduced_geometry_costs_what_the_policy_does(build: Any) -> None:
    net = build()
    x = torch.randn(1, 1 if isinstance(net, nn.Sequential) else 3, 16, 16)
    model = qprune.prepare(net, PRUNING, example_inputs=x)
    record = record_of(model)
    assert record is not None and record.geometry is not None
    nest(model, record.geometry, group_size=2)
    chains = gated_chains(model)
    assert len(chains) == (2 if isinstance(net, nn.Sequential) else 6)
    assert all(isinstance(model.get_submodule(name), NestedConv2d) for chain in chains for name in chain.producers)
    for chain in chains:
        gate = chain.pruning.gate
        gate.thresholds.data.fill_(9.0)
        gate.clamp(chain.pruning.weight)
    found = Allocation(model, {"bops": math.inf, "size_bits": math.inf, "macs": math.inf}, "product")
    kept = found.kept()
    policy = qprune.Policy(
        {name: LayerBits(tuple(4 if k else 0 for k in kept[name]) if name in kept else 4, 2) for name in record.geometry.layers},
        record.geometry,
    )
    small = remaining(record.geometry, kept)
    exact, reduced = qprune.cost(policy), qprune.cost(qprune.Policy.uniform(small, 4, 2))
    for field in ("bops", "macs", "size_bits"):
        assert (
            float(getattr(exact, field))
            == float(getattr(reduced, field))
            < float(getattr(qprune.cost(qprune.Policy.uniform(record.geometry, 4, 2)), field))
        )


def test_more_filters_go_where_bits_alone_do_not_fit() -> None:
    model = prepared()
    least = float(qprune.cost(qprune.Policy.uniform(geometry_of(model), 2, 2, {"0": LayerBits(8, 8), "7": LayerBits(8, 8)})).bops)
    search, _ = search_on(model, f"bops={0.9 * least}")
    policy = search.policy()
    assert policy.pruned() and float(qprune.cost(policy).bops) <= 0.9 * least
    with pytest.raises(InfeasibleBudgetError, match="let more filters be pruned"):
        search_on(prepared(), f"bops={0.9 * least}", mode="quantization")
    with pytest.raises(InfeasibleBudgetError):
        search_on(prepared(), f"bops={0.2 * least}")


def geometry_of(model: nn.Module) -> Geometry:
    record = record_of(model)
    assert record is not None and record.geometry is not None
    return record.geometry


def test_depthwise_chain_is_gated_once() -> None:
    """The expanded width is pruned in the expanding, the depthwise and the projecting layer; closed channels reach nobody."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16)
    model = qprune.prepare(mobilenet(), PRUNING, {"conv1": EDGE, "fc": EDGE}, x)
    nest(model, geometry_of(model))
    project = model.get_submodule("layer2.0.project")
    assert isinstance(project, NestedConv2d) and project.pruned_in is not None
    gate = project.pruned_in.gate
    gate.thresholds.data.fill_(9.0)
    gate.clamp(project.pruned_in.weight)
    closed = (project.pruned_in() == 0).nonzero().flatten()
    assert len(closed) == 32 and project.pruned_in.source is model.get_submodule("layer2.0.depthwise")
    model.train()(x)
    before = model.eval()(x)
    with torch.no_grad():
        for name in ("expand", "depthwise"):
            model.get_parameter(f"layer2.0.{name}.weight")[closed] *= -1
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)


def test_converted_inverted_residuals_compute_what_the_gates_did() -> None:
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(8, 3, 16, 16, generator=g)
    model = qprune.prepare(mobilenet(), PRUNING, {"conv1": EDGE, "fc": EDGE}, x)
    search, method = search_on(model, lmbda=2.0, threshold_rate=2.0)
    for _ in range(2):
        search.step(lambda m: F.cross_entropy(m(x), torch.arange(8)))
    for chain in method.chains:
        chain.pruning.gate.thresholds.data.fill_(9.0)
        chain.pruning.gate.clamp(chain.pruning.weight)
    for gate in bit_gates(model)[::3]:
        gate.thresholds.data[1] = 1.0
    for _ in range(2):
        model.train()(x)
    policy = read_off(model, method)
    pruned = policy.pruned()
    assert {name.rpartition(".")[2] for name in pruned} == {"expand", "depthwise"}
    assert all(pruned[name] == pruned[name.replace("expand", "depthwise")] for name in pruned)
    final = silence(qprune.convert(model, policy), policy, x).eval()
    torch.testing.assert_close(final(x), model.eval()(x), rtol=1e-3, atol=1e-3)
    assert float(qprune.cost(model).bops.detach()) == pytest.approx(float(qprune.cost(final).bops), rel=1e-6)


def test_refusals() -> None:
    for space, message in [
        (qprune.SearchSpace((2, 3), (2, 4)), r"w_bits: 3 bits behind 2 are not nested, since 2 does not divide 3"),
        (qprune.SearchSpace((2, 4), (4, 6)), r"a_bits: 6 bits behind 4"),
        (qprune.SearchSpace((2, 4, 32), (2, 4)), "w_bits: nested weights have 2 to 8 bits"),
        (qprune.SearchSpace((2, 4), (4, 32)), r"a_bits: 32 \(float\)"),
        (qprune.SearchSpace((2, 4), (0, 4)), "a_bits: 0 is no nested candidate"),
        (qprune.SearchSpace((1, 2, 4), (2, 4)), "2 to 8 bits"),
        (qprune.SearchSpace((2, 4), (2, 4), granularity="filter"), "granularity 'filter'"),
        (qprune.SearchSpace(pairs=((2, 2), (4, 4))), "chosen apart"),
    ]:
        with pytest.raises(SpaceError, match=message):
            search_on(prepared(space), "w8a8")
    for options, wrong in [
        ({"mode": "both"}, "unknown mode"),
        ({"mode": "two-stage"}, "takes switch"),
        ({"switch": 3}, "takes switch"),
        ({"lmbda": -1.0}, "lmbda"),
        ({"clips": "two"}, "clips"),
        ({"group_size": 0}, "group_size"),
        ({"max_pruning": 1.0}, "max_pruning"),
    ]:
        with pytest.raises(InputError, match=wrong):
            search_on(prepared(), **options)
    with pytest.raises(InputError, match="nothing to search"):
        search_on(prepared(EDGE), "w8a8")
    with pytest.raises(InputError, match="needs 0 in w_bits"):
        search_on(prepared(qprune.SearchSpace()), "w8a8", mode="pruning")


def test_order_of_candidates_does_not_matter() -> None:
    one, two = prepared(qprune.SearchSpace((8, 2, 4), (4, 8, 2))), prepared(qprune.SearchSpace())
    losses = [steps(search_on(model)[0], 3) for model in (one, two)]
    assert losses[0] == losses[1]


def test_nan_changes_nothing() -> None:
    model = prepared()
    search, _ = search_on(model)
    steps(search, 2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    (x, y), *_ = batches(1)
    with pytest.raises(NonFiniteError):
        search.step(task, batch=(x * float("nan"), y))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(math.isfinite(loss) for loss in steps(search, 2))


def with_rules(**rules: qprune.SearchSpace) -> nn.Module:
    torch.manual_seed(0)
    named = {name.replace("_", "."): space for name, space in rules.items()}
    return qprune.prepare(block_net(8), PRUNING, {"0": EDGE, "7": EDGE, **named}, batches(1)[0][0])


@pytest.mark.parametrize("bits", [8, 32], ids=["fixed", "float input"])
def test_a_reader_that_is_not_searched_reads_closed_channels_as_zero(bits: int) -> None:
    model = with_rules(**{"4_conv2": qprune.SearchSpace((8,) if bits == 8 else (4, 8), (bits,))})
    search, method = search_on(model, "w8a8", lmbda=3.0, threshold_rate=3.0)
    steps(search, 4)
    reader = model.get_submodule("4.conv2")
    assert isinstance(reader, NestedConv2d) and reader.pruned_in is not None
    closed = (reader.pruned_in() == 0).nonzero().flatten()
    assert len(closed) > 0
    x = torch.rand(2, 16, 4, 4)
    other = x.clone()
    other[:, closed] += 1.0
    assert torch.equal(reader.eval()(x), reader(other))
    policy = search.policy()
    assert policy.layers["4.conv2"].a_bits == bits
    image = batches(1, seed=5)[0][0]
    policy = read_off(model, method)
    final = silence(qprune.convert(model, policy), policy, image).eval()
    torch.testing.assert_close(final(image), model.eval()(image), rtol=1e-4, atol=1e-4)


def test_a_choice_between_0_bits_and_one_width() -> None:
    """In a layer whose filters cannot be pruned the width remains, and the policy has it."""
    model = with_rules(**{"3_conv2": qprune.SearchSpace((0, 4), (4,))})
    search, method = search_on(model)
    steps(search, 2)
    assert method.layers["3.conv2"].space.w_bits == (4,)
    assert search.policy().layers["3.conv2"] == LayerBits(4, 4)


def test_premix_leaves_a_nested_network_alone() -> None:
    model = prepared().train()
    nest(model, geometry_of(model))
    x = batches(1)[0][0]
    alone = model(x)
    with Premix(model):
        assert torch.equal(model(x), alone)


def test_all_candidates_share_one_clip_in_the_kernels() -> None:
    """A column that is repeated with stride 0: the kernels then clip once for all candidates."""
    model = prepared()
    _, method = search_on(model)
    layer = method.layers["4.conv2"]
    w = layer.weight_quantizer.candidates(layer.weight, torch.ones(3))
    a = layer.input_quantizer.candidates(torch.rand(2, 16, 4, 4), torch.ones(16, 3))
    for found in (w, a):
        assert found.range.stride(1) == found.offset.stride(1) == 0
        assert len({z / n for n, z in zip(found.steps, found.zero_point, strict=True)}) == 1
    assert a.range.shape == (16, 3)


def test_a_bad_batch_leaves_no_trace_in_the_gates() -> None:
    model = prepared()
    search, method = search_on(model)
    steps(search, 2)
    before = [gate.errors.clone() for gate in bit_gates(model)]
    with pytest.raises(NonFiniteError):
        search.step(task, batch=(torch.full((4, 1, 8, 8), math.nan), torch.zeros(4, dtype=torch.int64)))
    assert all(bool(gate.errors.isfinite().all()) for gate in bit_gates(model))
    assert all(torch.equal(gate.errors, b) for gate, b in zip(method.input_gates, before[1::2], strict=True))
    assert float(qprune.cost(search.policy()).bops) <= search.limits["bops"]


class StandIn(graph.Recorder):
    """A recorder for the CPU: a record is the update with its static batch, run anew at every replay."""

    def __init__(self, device: torch.device, warmup: int = 3) -> None:
        self.warmup, self.calls, self.records = warmup, {}, {}

    def aside(self, run: Callable[[], Tensor]) -> Tensor:
        return run()

    def record(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return run


def test_a_recorded_search_is_the_same_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "Recorder", StandIn)
    losses, models = [], []
    for recorded in (False, True):
        model = prepared().train()
        search, method = search_on(model, weight_lr=0.05, cuda_graph=recorded)
        losses.append(steps(search, 12))
        models.append(model.state_dict())
    assert len(method.recorder.records) == 2  # type: ignore[union-attr]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for a, b in zip(models[0].values(), models[1].values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_mixing_inputs_again_in_the_backward_pass_changes_nothing() -> None:
    losses = [steps(search_on(prepared(), recompute=recompute, threshold_rate=3.0, lmbda=3.0)[0], 6) for recompute in (False, True)]
    assert losses[0] == losses[1]


def test_gates_under_autocast_are_those_without() -> None:
    model = prepared().train()
    _, method = search_on(model)
    x = batches(1)[0][0]
    for chain in method.chains:
        chain.pruning.gate.thresholds.data.fill_(9.0)
        chain.pruning.gate.clamp(chain.pruning.weight)
    model(x)
    plain = [(gate.errors.clone(), gate().detach()) for gate in bit_gates(model)]
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
        assert all(torch.equal(chain.pruning(), again) for chain, again in zip(method.chains, kept_now(method), strict=True))
    for gate, (errors, p) in zip(bit_gates(model), plain, strict=True):
        torch.testing.assert_close(gate.errors, errors, rtol=0.03, atol=1e-4)
        assert torch.equal(gate(), p)


def kept_now(method: Sbs) -> list[Tensor]:
    with torch.autocast("cpu", enabled=False):
        return [chain.pruning() for chain in method.chains]


@pytest.mark.parametrize("clips, largest", [("one", 1.0), ("fitted", None)])
def test_where_clips_start(clips: str, largest: float | None) -> None:
    model = prepared()
    x = 4 * batches(1)[0][0].abs()
    if clips == "fitted":
        qprune.calibrate(model, [x])
    before = model.get_submodule("4.conv1.input_quantizer").get_parameter("log_range").detach().exp()
    nest(model, geometry_of(model), clips)
    layer = model.get_submodule("4.conv1")
    assert isinstance(layer, NestedConv2d)
    clip = float(layer.input_quantizer.learned_range()[0, 0].detach())
    assert clip == pytest.approx(float(before[0, 1]) if largest is None else largest)
    assert layer.weight_quantizer.log_clip.exp().item() == pytest.approx(1.0 if clips == "one" else 2.514, rel=1e-2)


def test_uncalibrated_fitted_clips_start_from_the_first_batch() -> None:
    model = prepared()
    nest(model, geometry_of(model), "fitted")
    layer = model.get_submodule("4.conv1")
    assert isinstance(layer, NestedConv2d) and not layer.input_quantizer.calibrated
    model.train()(batches(1)[0][0])
    assert layer.input_quantizer.calibrated and layer.input_quantizer.learned_range()[0, 0] != 1.0


def test_trace_geometry_of_a_nested_model_is_that_of_the_network() -> None:
    model = prepared()
    x = batches(1)[0][0]
    before = geometry_of(model)
    nest(model, before)
    assert trace_geometry(model, x) == before.layers

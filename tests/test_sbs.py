"""The search with single-path bit sharing: its loss and its steps."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sbs_cases import EDGE, bit_gates, geometry_of, prepared, search_on, steps, task, trained
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from unit_models import batches

import qprune
from qprune.errors import InputError, NonFiniteError, SpaceError
from qprune.geometry import trace_geometry
from qprune.nn.bitgates import BitGate
from qprune.nn.nested import NestedConv2d, nest
from qprune.nn.premix import Premix
from qprune.policy import LayerBits
from qprune.record import record_of
from qprune.search import driver, graph
from qprune.search.sbs import Sbs
from qprune.search.sbs_policy import nested_layers
from qprune.tasks.resnet import resnet20


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(driver.METHODS, "sbs", Sbs)


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
    final = qprune.convert(model, policy)
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


def one_optimizer_each(model: nn.Module, method: Sbs) -> None:
    owned = [id(p) for o in method.optimizers._all().values() for g in o.param_groups for p in g["params"]]
    present = {id(p) for p in model.parameters()}
    assert present <= set(owned) and all(owned.count(p) == 1 for p in present)


def test_every_parameter_has_one_optimizer() -> None:
    model = prepared()
    _, method = search_on(model)
    one_optimizer_each(model, method)


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
    one_optimizer_each(model, method)


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


def test_premix_leaves_a_nested_network_alone() -> None:
    model = prepared().train()
    nest(model, geometry_of(model))
    x = batches(1)[0][0]
    alone = model(x)
    with Premix(model):
        assert torch.equal(model(x), alone)


def test_only_layers_of_the_model_are_mixed_together() -> None:
    """Not those that were nested, nor nested ones, which need their input."""
    model = prepared()
    _, method = search_on(model)
    assert set(method.premix.layers) <= set(model.modules()) - set(method.layers.values())


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

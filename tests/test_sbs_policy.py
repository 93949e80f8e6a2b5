"""What a search with single-path bit sharing chooses, and what that is converted to."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sbs_cases import EDGE, PRUNING, bit_gates, geometry_of, prepared, read_off, search_on, steps, trained, with_rules
from torch import nn
from unit_models import batches, block_net

import qprune
from qprune.errors import InfeasibleBudgetError
from qprune.nn.bitgates import BitGate
from qprune.nn.nested import NestedConv2d, nest
from qprune.policy import LayerBits
from qprune.record import record_of
from qprune.search import driver
from qprune.search.sbs import Sbs
from qprune.search.sbs_policy import Allocation, candidate_scores, gated_chains, remaining
from qprune.tasks.mobilenet import mobilenet


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(driver.METHODS, "sbs", Sbs)


def test_converted_network_computes_what_the_gates_did() -> None:
    """A policy that is what the gates say: no change in the output, to rounding; also after saving and loading."""
    model, _, method = trained(lmbda=3.0)
    policy = read_off(model, method)
    assert policy.pruned() and len({str(b) for b in policy.layers.values()}) > 3
    x = batches(1, seed=5)[0][0]
    model.eval()
    torch.testing.assert_close(qprune.convert(model, policy).eval()(x), model(x), rtol=1e-4, atol=1e-4)
    final = qprune.convert(model, policy, remove=False).eval()
    torch.testing.assert_close(final(x), model(x), rtol=1e-4, atol=1e-4)
    filters, seen = policy.pruned()["4.conv1"], []
    final.get_submodule("4.conv2").register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    final(x)
    assert not seen[0][:, filters].any()
    final.train()(x).square().sum().backward()
    weight = final.get_parameter("4.bn1.bias")
    assert weight.grad is not None and not weight.grad[filters].any()


def test_save_and_load(tmp_path: Any) -> None:
    model, search, _ = trained()
    policy = search.policy()
    x = batches(1, seed=5)[0][0]
    final = qprune.convert(model, policy).eval()
    qprune.save(final, tmp_path / "net.safetensors")
    again = qprune.load(tmp_path / "net.safetensors", lambda: block_net(8)).eval()
    assert torch.equal(again(x), final(x))


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
    final = qprune.convert(model, policy).eval()
    torch.testing.assert_close(final(x), model.eval()(x), rtol=1e-3, atol=1e-3)
    assert float(qprune.cost(model).bops.detach()) == pytest.approx(float(qprune.cost(final).bops), rel=1e-6)


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
    final = qprune.convert(model, policy).eval()
    torch.testing.assert_close(final(image), model.eval()(image), rtol=1e-4, atol=1e-4)


def test_a_choice_between_0_bits_and_one_width() -> None:
    """In a layer whose filters cannot be pruned the width remains, and the policy has it."""
    model = with_rules(**{"3_conv2": qprune.SearchSpace((0, 4), (4,))})
    search, method = search_on(model)
    steps(search, 2)
    assert method.layers["3.conv2"].space.w_bits == (4,)
    assert search.policy().layers["3.conv2"] == LayerBits(4, 4)

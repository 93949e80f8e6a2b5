"""Gates: the three modes, their gradients, and who draws what."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import qprune
from qprune.errors import QPruneError
from qprune.gates import Constant, FilterGate, Gate, gates, make_gate, probabilities, sample_gates, set_gates

SHAPES = pytest.mark.parametrize("rows", [None, 5], ids=["layer", "filter"])
MODES = pytest.mark.parametrize("mode", ["relaxed", "sampled", "fixed"])


def random_gate(rows: int | None, mode: str = "relaxed", candidates: int = 4) -> Gate:
    gate = Gate(candidates, rows)
    with torch.no_grad():
        gate.logits.normal_()
    gate.mode = mode
    return gate


@SHAPES
@MODES
def test_rows_sum_to_one(rows: int | None, mode: str) -> None:
    gate = random_gate(rows, mode)
    gate.sample()
    p = gate()
    assert p.shape == gate.logits.shape and p.dtype == torch.float32
    torch.testing.assert_close(p.sum(-1), torch.ones(p.shape[:-1]))
    if mode != "relaxed":
        assert set(p.detach().flatten().tolist()) == {0.0, 1.0}


@SHAPES
def test_starts_indifferent(rows: int | None) -> None:
    torch.testing.assert_close(Gate(4, rows)(), torch.full((4,) if rows is None else (rows, 4), 0.25))


@SHAPES
def test_relaxed_is_a_softmax_with_temperature(rows: int | None) -> None:
    gate = random_gate(rows)
    set_gates(gate, temperature=0.3)
    torch.testing.assert_close(gate(), (gate.logits / 0.3).softmax(-1))


@pytest.mark.parametrize(("temperature", "largest"), [(1e-3, 1.0), (1e4, 0.25)], ids=["cold", "hot"])
def test_temperature_limits(temperature: float, largest: float) -> None:
    gate = Gate(4)
    gate.logits.data = torch.tensor([0.0, 1.0, 3.0, 2.0])
    set_gates(gate, temperature=temperature)
    torch.testing.assert_close(gate().max().item(), largest, atol=1e-3, rtol=0)


@SHAPES
def test_sampled_is_the_argmax_with_the_gradient_of_the_softmax(rows: int | None) -> None:
    gate = random_gate(rows, "sampled")
    gate.sample()
    soft = gate.logits.detach().clone().requires_grad_()
    p, q = gate(), (soft + gate.noise).softmax(-1)
    assert torch.equal(p.argmax(-1), q.argmax(-1))
    direction = torch.randn_like(q)
    (p * direction).sum().backward()
    (q * direction).sum().backward()
    assert gate.logits.grad is not None and soft.grad is not None
    torch.testing.assert_close(gate.logits.grad, soft.grad)
    assert soft.grad.abs().max() > 0


@SHAPES
def test_fixed_is_the_choice_with_zero_gradient(rows: int | None) -> None:
    gate = random_gate(rows, "fixed")
    gate.choice.fill_(2)
    p = gate()
    assert torch.equal(p, torch.eye(4)[2].expand_as(p))
    (p * torch.randn_like(p)).sum().backward()
    assert gate.logits.grad is not None and not gate.logits.grad.any()
    gate.logits.data.fill_(math.inf)
    assert torch.equal(gate(), p)


def test_same_generator_same_draw() -> None:
    first, second = random_gate(6), random_gate(6)
    first.sample(torch.Generator().manual_seed(7))
    second.sample(torch.Generator().manual_seed(7))
    assert torch.equal(first.noise, second.noise)
    second.sample(torch.Generator().manual_seed(8))
    assert not torch.equal(first.noise, second.noise)


def test_sampling_does_not_touch_the_global_generator() -> None:
    state = torch.get_rng_state()
    Gate(3).sample(torch.Generator().manual_seed(1))
    assert torch.equal(state, torch.get_rng_state())


def test_forward_draws_nothing() -> None:
    gate = random_gate(4, "sampled")
    gate.sample()
    assert torch.equal(gate(), gate())


def test_sampling_follows_the_softmax() -> None:
    """The argmax of logits plus Gumbel noise is k with the softmax's probability."""
    gate = Gate(3, 20000)
    gate.logits.data = torch.tensor([0.1, 0.2, 0.7]).log().expand(20000, 3).clone()
    gate.mode = "sampled"
    gate.sample(torch.Generator().manual_seed(0))
    torch.testing.assert_close(gate().mean(0), torch.tensor([0.1, 0.2, 0.7]), atol=0.012, rtol=0)
    assert gate.noise.isfinite().all()


def test_constant_gate() -> None:
    gate = make_gate(1, 3)
    assert isinstance(gate, Constant)
    assert torch.equal(gate(), torch.ones(3, 1)) and torch.equal(make_gate(1)(), torch.ones(1))
    assert not list(gate.parameters()) and not gate.state_dict()
    assert isinstance(make_gate(2), Gate)


def mixed_model() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    return qprune.prepare(net, qprune.SearchSpace((2, 4), (4, 8), granularity="filter"), rules={"0": qprune.SearchSpace.fixed(8, 8)})


def test_set_gates_reaches_every_gate() -> None:
    model = mixed_model()
    names = [name for name, _ in gates(model)]
    assert names == ["2.weight_gate", "2.input_gate", "4.weight_gate", "4.input_gate"]
    set_gates(model, "sampled", 0.5)
    assert all(gate.mode == "sampled" and gate.temperature == 0.5 for _, gate in gates(model))
    set_gates(model, temperature=2)
    assert all(gate.mode == "sampled" and gate.temperature == 2 for _, gate in gates(model))
    set_gates(model, "fixed")
    assert all(gate.mode == "fixed" and gate.temperature == 2 for _, gate in gates(model))


def test_sample_gates_is_reproducible_and_independent() -> None:
    first, second = mixed_model(), mixed_model()
    qprune.sample_gates(first, torch.Generator().manual_seed(3))
    sample_gates(second, torch.Generator().manual_seed(3))
    draws = [gate.noise for _, gate in gates(first)]
    assert all(torch.equal(a, b.noise) for a, (_, b) in zip(draws, gates(second), strict=True))
    assert not torch.equal(draws[1], draws[3])


@pytest.mark.parametrize("temperature", [0, -1.0, math.nan, math.inf])
def test_refuses_temperature(temperature: float) -> None:
    with pytest.raises(QPruneError, match=r"^temperature: expected a positive number, got "):
        set_gates(mixed_model(), temperature=temperature)


def test_refuses_mode() -> None:
    model = mixed_model()
    with pytest.raises(QPruneError, match=r"^unknown gate mode 'soft': expected one of relaxed, sampled, fixed$"):
        set_gates(model, "soft", temperature=3)
    assert all(gate.mode == "relaxed" and gate.temperature == 1 for _, gate in gates(model))


@SHAPES
@MODES
def test_half_precision_gate(rows: int | None, mode: str) -> None:
    gate = random_gate(rows, mode).half()
    gate.sample()
    p = gate()
    assert p.dtype == torch.float32 and gate.choice.dtype == torch.int64
    p.square().sum().backward()
    assert gate.logits.grad is not None and gate.logits.grad.isfinite().all()


def test_state() -> None:
    gate = random_gate(3)
    gate.choice.fill_(2)
    other = Gate(4, 3)
    other.load_state_dict(gate.state_dict(), strict=True)
    assert torch.equal(other.logits, gate.logits) and torch.equal(other.choice, gate.choice)
    assert set(gate.state_dict()) == {"logits", "choice"}
    with pytest.raises(RuntimeError, match="size mismatch for logits"):
        Gate(4, 2).load_state_dict(gate.state_dict())


def filter_gate(mode: str = "fixed", together: bool = False) -> FilterGate:
    gate = FilterGate([(2, 2), (2, 4), (3, 3), (8, 8)], 6, together)
    with torch.no_grad():
        gate.logits.copy_(torch.tensor([0.3, -0.2, 1.0, 0.1]))
    gate.mode = mode
    return gate


@pytest.mark.parametrize(
    ("candidates", "expected"),
    [
        ([(2, 2), (2, 4), (3, 3), (8, 8)], [2 / 7, 2 / 7, 2 / 7, 1 / 7]),
        ([(2, 32), (3, 32), (8, 32)], [2 / 5, 2 / 5, 1 / 5]),
        ([(2, 2), (8, 4)], [1 / 2, 1 / 2]),
    ],
)
def test_filters_start_with_half_the_odds_for_eight_bits(candidates: list[tuple[int, int]], expected: list[float]) -> None:
    assert FilterGate(candidates, 3).distribution().tolist() == pytest.approx(expected)


def test_filters_share_logits_and_draw_for_themselves() -> None:
    gate = filter_gate("sampled")
    torch.manual_seed(3)
    gate.sample()
    p = gate()
    assert p.shape == (6, 4) and gate.logits.shape == (4,) and len(p.argmax(1).unique()) > 1
    p[:, 0].sum().backward()
    assert gate.logits.grad is not None and gate.logits.grad.abs().sum() > 0


def test_all_filters_draw_together() -> None:
    gate = filter_gate("sampled", together=True)
    gate.sample()
    assert gate.noise.shape == (1, 4) and gate().shape == (6, 4) and len(gate().argmax(1).unique()) == 1


def test_draws_of_filters_follow_the_distribution() -> None:
    gate = FilterGate([(2, 2), (4, 4), (8, 8)], 20000)
    gate.mode = "sampled"
    gate.temperature.fill_(0.1)
    gate.sample(torch.Generator().manual_seed(0))
    torch.testing.assert_close(gate().mean(0), gate.distribution(), atol=0.012, rtol=0)


def test_relaxed_filters_have_the_same_row_without_noise() -> None:
    gate = filter_gate("relaxed")
    gate.sample()
    gate.temperature.fill_(0.5)
    torch.testing.assert_close(gate(), (gate.logits / 0.5).softmax(0).expand(6, 4))
    torch.testing.assert_close(gate.distribution(), (gate.logits / 0.5).softmax(0))


def test_fixed_filters_take_their_choice_with_zero_gradient() -> None:
    gate = filter_gate("fixed")
    gate.choice.copy_(torch.tensor([0, 1, 2, 3, 3, 0]))
    p = gate()
    assert p.argmax(1).tolist() == [0, 1, 2, 3, 3, 0]
    (p * torch.randn(6, 4)).sum().backward()
    assert gate.logits.grad is not None and not gate.logits.grad.any()
    torch.testing.assert_close(gate.distribution(), gate.logits.softmax(0))


@MODES
def test_probabilities_of_filter_gates_among_others(mode: str) -> None:
    members = [filter_gate(mode), random_gate(None, mode), Constant(3)]
    sample_gates(members[0])
    found = probabilities(members)
    assert torch.equal(found[0], members[0]()) and [tuple(p.shape) for p in found] == [(6, 4), (1, 4), (3, 1)]

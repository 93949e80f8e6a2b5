"""Budgets: every form that is accepted, every form that is not, and the numbers they mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from qprune import Budget, Policy, QPruneError, SearchSpace, prepare
from qprune.cost import cost, geometry_of
from qprune.errors import BudgetError
from qprune.geometry import Geometry, trace_geometry
from qprune.policy import LayerBits
from qprune.record import record_of


def geometry() -> Geometry:
    """First layer 3·4·9 weights at 36 positions, then 4·5 at 36, then a linear one of 5·2."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 2))
    return Geometry(trace_geometry(net, torch.zeros(1, 3, 8, 8)))


MACS, WEIGHTS = 36 * 108 + 36 * 20 + 10, 138


@pytest.mark.parametrize(
    "amount, limit",
    [
        (1.5e9, 1.5e9),
        (7, 7.0),
        ("1500", 1500.0),
        ("1.5e9", 1.5e9),
        ("1.5E+9", 1.5e9),
        ("1e-2G", 1e7),
        ("2k", 2e3),
        ("2 M", 2e6),
        ("1.5G", 1.5e9),
        ("3t", 3e12),
        (" 40 ", 40.0),
        ("2%", 0.02 * 1024 * MACS),
        ("0.5 %", 0.005 * 1024 * MACS),
        ("100%", 1024.0 * MACS),
        ("w4a4", 16.0 * MACS),
        ("W4A8", 32.0 * MACS),
        ("w32a32", 1024.0 * MACS),
        ("w1a2", 2.0 * MACS),
    ],
    ids=str,
)
def test_bops(amount: Any, limit: float) -> None:
    assert Budget(bops=amount).limits(geometry()) == {"bops": pytest.approx(limit, rel=1e-12)}


@pytest.mark.parametrize(
    "amount, limit",
    [("300B", 2400.0), ("300kB", 2.4e6), ("1.5 MB", 1.2e7), ("300k", 3e5), ("25%", 8.0 * WEIGHTS), ("w3a8", 3.0 * WEIGHTS), (10, 10.0)],
    ids=str,
)
def test_size(amount: Any, limit: float) -> None:
    """In bits, or bytes with a capital B."""
    assert Budget(size=amount).limits(geometry()) == {"size_bits": pytest.approx(limit, rel=1e-12)}


def test_macs_and_several_limits() -> None:
    limits = Budget(bops="w4a4", size="10%", macs="50%").limits(geometry())
    assert limits == {"bops": 16.0 * MACS, "size_bits": pytest.approx(3.2 * WEIGHTS), "macs": MACS / 2}


TEXTS = ["", "w4", "a4", "w4a4%", "w9a4", "w4a16", "w0a4", "w4a0", "-3", "0", "0%", "-1%", "1.2.3", "nan", "inf", "2%%", "2k%", "ten"]
OTHERS = [0, -1, 0.0, float("nan"), float("inf"), True, False, [4], (4, 4), {}]


@pytest.mark.parametrize("amount", [*TEXTS, *OTHERS], ids=repr)
@pytest.mark.parametrize("measure", ["bops", "size", "macs"])
def test_refused_amounts(measure: str, amount: Any) -> None:
    with pytest.raises(BudgetError, match=f"Budget: {measure}=") as caught:
        Budget(**{measure: amount})
    assert isinstance(caught.value, QPruneError | ValueError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("measure, amount", [("bops", "300B"), ("macs", "300kB"), ("size", "300b"), ("size", "300kb"), ("size", "1B%")])
def test_bytes_are_for_size_and_bits_have_no_unit(measure: str, amount: str) -> None:
    with pytest.raises(BudgetError, match="is not a budget"):
        Budget(**{measure: amount})


def test_messages_say_what_to_do() -> None:
    with pytest.raises(BudgetError, match=r"give at least one of bops, size, macs, for example Budget\(bops='w4a4'\)"):
        Budget()
    with pytest.raises(BudgetError, match=r"expected a number like 1.5e9, a share like '2%', or a network like 'w4a4'"):
        Budget(bops="fast")
    with pytest.raises(BudgetError, match=r"bops='w9a4': .* got 9"):
        Budget(bops="w9a4")
    with pytest.raises(BudgetError, match="a network without weights or activations"):
        Budget(bops="w0a4")
    with pytest.raises(TypeError):
        Budget(flops="1%")  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("w3a3", Budget(bops="w3a3")),
        ("2%", Budget(bops="2%")),
        ("1.5e9", Budget(bops="1.5e9")),
        ("bops=w4a4,size=20%", Budget(bops="w4a4", size="20%")),
        (" size = 300kB , macs = 50% ", Budget(size="300kB", macs="50%")),
        ("w4a4,size=10%", Budget(bops="w4a4", size="10%")),
    ],
)
def test_parse(text: str, expected: Budget) -> None:
    assert Budget.parse(text) == expected


@pytest.mark.parametrize(
    "text, problem",
    [
        ("", "give at least one"),
        ("flops=3", "unknown measure 'flops'; expected one of bops, size, macs"),
        ("=3", "unknown measure ''"),
        ("bops=", "bops='' is not a budget"),
        ("size=w4a4,size=2%", "limits one measure twice"),
        ("w4a4,bops=2%", "limits one measure twice"),
        ("cheap", "bops='cheap' is not a budget"),
    ],
)
def test_parse_refuses(text: str, problem: str) -> None:
    with pytest.raises(BudgetError, match=problem):
        Budget.parse(text)


def test_uniform_budget_keeps_fixed_and_float_layers() -> None:
    fixed = {"0": LayerBits(8, 8), "4": None}
    limits = Budget(bops="w4a4", size="w4a4").limits(geometry(), fixed)
    assert limits == {"bops": 64.0 * 36 * 108 + 16 * 36 * 20 + 1024 * 10, "size_bits": 8.0 * 108 + 4 * 20 + 32 * 10}
    assert Budget(bops="50%").limits(geometry(), fixed) == {"bops": 512.0 * MACS}
    assert Budget(macs="w4a4").limits(geometry(), fixed) == {"macs": MACS}


def test_uniform_budget_of_a_prepared_model() -> None:
    """It is exactly the cost of the uniform policy with the same rules, in every convention."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 1), nn.Conv2d(5, 6, 1), nn.Conv2d(6, 2, 1))
    rules = {"0": SearchSpace.fixed(8, 8), "3": None}
    mixed = prepare(net, SearchSpace((2, 4), (2, 4)), rules, example_inputs=torch.zeros(1, 3, 8, 8))
    record = record_of(mixed)
    assert record is not None
    policy = Policy.uniform(geometry_of(mixed), 3, 3, record.fixed)
    assert dict(policy.layers) == {"0": LayerBits(8, 8), "1": LayerBits(3, 3), "2": LayerBits(3, 3)}
    for convention in ("product", "zur", "uniq"):
        limit = Budget(bops="w3a3").limits(geometry_of(mixed), record.fixed, convention)["bops"]
        assert limit == float(cost(policy, convention=convention).bops)

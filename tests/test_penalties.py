"""Shapes of the cost term: values, limits and derivatives."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qprune.errors import InputError
from qprune.search.penalties import PENALTIES, Tanh, penalty

EXPECTED = {
    # name: {r: f(r)}
    "square": {0.0: 0.0, 0.5: 0.25, 1.0: 1.0, 1.5: 2.25},
    "linear": {0.0: 0.0, 0.5: 0.5, 1.0: 1.0, 1.5: 1.5},
    "hinge": {0.0: 0.0, 0.5: 0.5, 1.0: 1.0, 1.5: 7.5},
    "leaky": {0.0: -0.1, 0.5: -0.05, 1.0: 0.0, 1.5: 0.5},
    "tanh-2.5": {0.0: 0.0, 1.0: 2.5 * (math.tanh(-1.1) + 1), 1.055: 2.5, 3.0: 5.0},
    "tanh": {-1.0: 0.0, 1.0: 0.2, 3.0: 5.0},
    "tanh-0.5": {-3.0: 0.0, 1.0: 0.02, 5.0: 0.5},
}


def test_every_shape_is_tested() -> None:
    assert set(EXPECTED) == set(PENALTIES)


@pytest.mark.parametrize("name", PENALTIES)
def test_values(name: str) -> None:
    r = torch.tensor(list(EXPECTED[name]), dtype=torch.float64)
    expected = torch.tensor(list(EXPECTED[name].values()), dtype=torch.float64)
    torch.testing.assert_close(PENALTIES[name](r), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", PENALTIES)
def test_shape_dtype_and_order(name: str) -> None:
    r = torch.linspace(-0.5, 2.5, 300).view(3, 100)
    y = PENALTIES[name](r)
    assert y.shape == r.shape and y.dtype == r.dtype
    if name != "square":
        assert (y.flatten().diff() >= 0).all()


@pytest.mark.parametrize("name", PENALTIES)
def test_derivative(name: str) -> None:
    r = torch.tensor([0.35, 0.9, 0.98, 1.03, 1.2], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(PENALTIES[name], r)
    (slope,) = torch.autograd.grad(PENALTIES[name](r).sum(), r)
    assert (slope > 0).all()


@given(y_max=st.floats(0.1, 50), share=st.floats(0.001, 0.999), steepness=st.floats(0.5, 60))
def test_tanh_meets_its_point_and_limits(y_max: float, share: float, steepness: float) -> None:
    f = Tanh(share * y_max, y_max, steepness)
    far = 30 / steepness
    low, one, high = f(torch.tensor([1 - far, 1.0, 1 + far], dtype=torch.float64)).tolist()
    assert one == pytest.approx(share * y_max, rel=1e-9)
    assert low == pytest.approx(0, abs=1e-9 * y_max) and high == pytest.approx(y_max, rel=1e-9)


@pytest.mark.parametrize("arguments", [(0.0, 5.0, 20.0), (5.0, 5.0, 20.0), (0.2, 5.0, 0.0), (0.2, 5.0, -8.0), (-0.2, 5.0, 8.0)])
def test_tanh_refuses_impossible_shapes(arguments: tuple[float, float, float]) -> None:
    with pytest.raises(InputError, match="0 < y1 < y_max and steepness > 0"):
        Tanh(*arguments)


def test_by_name() -> None:
    assert penalty("square") is PENALTIES["square"]
    with pytest.raises(InputError, match="unknown penalty 'cube'; expected one of square, linear"):
        penalty("cube")

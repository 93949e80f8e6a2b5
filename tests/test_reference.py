"""The reference against an independent straight-through formulation in float64, and the properties that define a quantizer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CASES, DOREFA, LSQ, PARAMS, SYMMETRIC, UNSIGNED, WITH_SPECIAL, Case, problem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qprune.functional import mix_quantize
from qprune.kernels import backend, reference

quick = settings(deadline=None, max_examples=25, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def _reference() -> Any:
    with backend("reference"):
        yield


def straight_through(
    x: Tensor, offset: Tensor, range: Tensor, p: Tensor, case: Case, noise: Tensor | None
) -> Tensor:  # written from the definition, with autograd doing the derivatives
    view = [1] * x.dim()
    if case.rows:
        view[case.axis] = -1
    parts: dict[int, Tensor] = {}
    for k, (n, z) in enumerate(zip(*case.grid, strict=True)):
        b, r, weight = (t[..., k].reshape(view) for t in (offset, range, p))
        source = x.detach() if case.pass_through else x
        if n == 0:
            value = torch.zeros_like(x)
        elif n == math.inf:
            value = x
        else:
            u = (source - b) * (1 / r) + z / n
            if noise is None:
                exact = u.clamp(0, 1) * n
                code = exact + (exact.round() - exact).detach()
            else:
                code = (u + noise / n).clamp(0, 1) * n
            value = b + (code - z) * (r / n)
            if case.pass_through:
                value = value + (x - source)
        m = case.groups[k] if case.groups else 0
        parts[m] = parts.get(m, torch.zeros_like(x)) + weight * value
    return torch.stack([parts[m] for m in sorted(parts)]) if case.groups else parts[0]


@pytest.mark.parametrize("case", [p for p in PARAMS if p.id not in ("nan", "inf")])
def test_gradients_are_those_of_autograd(case: Case) -> None:
    made = problem(case)
    want = {name: getattr(made, name).double().requires_grad_() for name in ("x", "offset", "range", "p")}
    noise = None
    if made.seed is not None:
        noise = reference.philox_uniform(made.seed, reference._storage_index(made.x)).double() - 0.5
    y = straight_through(*want.values(), case, noise)
    y.backward(made.grad.double())
    got = made.run("reference", double=True)
    torch.testing.assert_close(got["y"], y.detach(), rtol=1e-10, atol=1e-10)
    for name, leaf in want.items():
        torch.testing.assert_close(got[name], leaf.grad, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[6]], ids=lambda case: case.name)
def test_output_is_linear_in_p(case: Case) -> None:
    made = problem(case)
    x, offset, range_ = (t.double() for t in (made.x, made.offset, made.range))

    def of(p: Tensor) -> Tensor:
        return mix_quantize(x, offset, range_, p, *case.grid, axis=case.axis, groups=case.groups)

    assert torch.autograd.gradcheck(of, made.p.double().requires_grad_(), fast_mode=True)


def test_noise_makes_every_gradient_exact() -> None:
    # without rounding nothing is straight-through, so finite differences see all four gradients
    made = problem(Case("noise", (5, 3, 2, 2), SYMMETRIC, noise=True))

    def of(*tensors: Tensor) -> Tensor:
        return mix_quantize(*tensors, *made.case.grid, seed=made.seed)

    leaves = [t.double().requires_grad_() for t in (made.x, made.offset, made.range, made.p)]
    assert torch.autograd.gradcheck(of, leaves, eps=1e-7, atol=1e-5)


def test_philox_known_answers() -> None:
    # first word for counter 0 and key 0, from the test vectors of Random123
    first = reference.philox_uniform(torch.tensor([0]), torch.tensor([0]))
    assert first.item() == (0x6627E8D5 >> 8) * 2.0**-24
    many = reference.philox_uniform(torch.tensor([-7]), torch.arange(2**32 - 5000, 2**32 + 5000))
    assert many.min() >= 0 and many.max() < 1
    assert abs(many.mean().item() - 0.5) < 0.02
    assert abs(many.var().item() - 1 / 12) < 0.005
    assert many.unique().numel() > 9900


def test_noise_follows_the_storage_not_the_view() -> None:
    x = torch.randn(4, 6, 5, 5).contiguous(memory_format=torch.channels_last)
    seed, one = torch.tensor([3]), torch.ones(1)
    y = mix_quantize(x, 0 * one, 100 * one, one, [200], [100], axis=1, seed=seed)
    stored = x.permute(0, 2, 3, 1).contiguous()
    assert torch.equal(y.permute(0, 2, 3, 1), mix_quantize(stored, 0 * one, 100 * one, one, [200], [100], seed=seed))
    assert not torch.equal(y, mix_quantize(x, 0 * one, 100 * one, one, [200], [100], axis=1, seed=seed + 1))
    assert (y - x).abs().max() <= 0.25 + 1e-5


@pytest.mark.parametrize("grid", [LSQ, SYMMETRIC, UNSIGNED, WITH_SPECIAL], ids=["lsq", "symmetric", "unsigned", "special"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_zero_stays_exactly_zero(grid: tuple[list[float], list[float]], dtype: torch.dtype) -> None:
    k = len(grid[0])
    y = mix_quantize(torch.zeros(50, 7, dtype=dtype), torch.zeros(50, k), 3 * torch.rand(50, k) + 1e-3, torch.rand(50, k), *grid)
    assert torch.equal(y, torch.zeros(50, 7, dtype=dtype))


def test_offset_is_exact_on_the_grid() -> None:
    offset = torch.randn(64, 1)
    y = mix_quantize(offset, offset, torch.rand(64, 1) + 0.1, torch.ones(1), [15], [8])
    assert torch.equal(y, offset)


def test_range_limits() -> None:
    x = torch.tensor([-math.inf, -1e30, -1.01, 1.01, 1e30, math.inf])
    one = torch.ones(1)
    y = mix_quantize(x, 0 * one, 2 * one, one, [8], [4])
    assert y.tolist() == [-1, -1, -1, 1, 1, 1]
    tiny = mix_quantize(x, 0 * one, 1e-30 * one, one, [255], [0])
    assert (tiny[:3] == 0).all()
    torch.testing.assert_close(tiny[3:], torch.full((3,), 1e-30), rtol=1e-6, atol=0)


def test_nan_reaches_output_and_gradients() -> None:
    x = torch.randn(4, 6)
    x[1, 2] = math.nan
    for steps, zero_point in (([3.0, 15.0], [2.0, 8.0]), ([0.0, 0.0], [0.0, 0.0]), ([math.inf, 3.0], [0.0, 2.0])):
        leaves = [t.requires_grad_() for t in (x.clone(), torch.zeros(4, 2), torch.ones(4, 2), torch.rand(4, 2))]
        y = mix_quantize(*leaves, steps, zero_point)
        assert torch.equal(y.isnan(), x.isnan())
        y.sum().backward()
        assert torch.equal(leaves[0].grad.isnan(), x.isnan())
        for leaf in leaves[1:]:
            touched = leaf.grad.isnan().any(dim=1)
            assert not touched[[0, 2, 3]].any()
        if steps[-1] == 15:
            assert all(leaf.grad[1].isnan().all() for leaf in leaves[1:])


floats = st.floats(-8, 8, width=32)
vectors = st.lists(floats, min_size=1, max_size=40).map(torch.tensor)
grids = st.sampled_from([(n, z) for steps, zeros in (LSQ, SYMMETRIC, DOREFA, UNSIGNED) for n, z in zip(steps, zeros, strict=True)])


def one(x: Tensor, offset: float, range: float, grid: tuple[float, float]) -> Tensor:
    """A single candidate with weight 1."""
    return mix_quantize(x, torch.tensor([offset]), torch.tensor([range]), torch.ones(1), [grid[0]], [grid[1]])


@quick
@given(x=vectors, offset=st.floats(-1, 1, width=32), range=st.floats(0.125, 8, width=32), grid=grids)
def test_quantizer_properties(x: Tensor, offset: float, range: float, grid: tuple[float, float]) -> None:
    n, z = grid
    y = one(x, offset, range, grid)
    assert torch.equal(one(y, offset, range, grid), y), "idempotent"
    order = x.argsort()
    assert (y[order].diff() >= 0).all(), "monotone"
    d = range / n
    assert (y >= offset - z * d - 1e-5).all() and (y <= offset + (n - z) * d + 1e-5).all(), "inside the range"
    levels = (y.double() - offset) / d + z
    assert (levels - levels.round()).abs().max() < 1e-2, "on the grid"


@quick
@given(x=vectors, range=st.floats(0.125, 8, width=32), bits=st.integers(2, 8))
def test_one_candidate_is_the_fixed_quantizer(x: Tensor, range: float, bits: int) -> None:
    n, z = 2**bits - 1, 2 ** (bits - 1)
    d = torch.tensor(range) / n
    want = torch.fake_quantize_per_tensor_affine(x, d.item(), z, 0, n)
    close = ((x.double() / d.double()).frac().abs() - 0.5).abs() < 1e-3
    assert ((one(x, 0, range, (n, z)) - want).abs()[~close] <= 1e-5).all()


@quick
@given(data=st.data())
def test_orders_do_not_matter(data: Any) -> None:
    candidates, filters = data.draw(st.permutations([0, 1, 2, 3])), data.draw(st.permutations([0, 1, 2, 3, 4]))
    made = problem(Case("orders", (5, 3, 2, 2), LSQ), seed=data.draw(st.integers(0, 99)))
    steps, zero_point = made.case.grid
    y = mix_quantize(made.x, made.offset, made.range, made.p, steps, zero_point)
    tensors = [t[:, candidates] for t in (made.offset, made.range, made.p)]
    reordered = mix_quantize(made.x, *tensors, [steps[k] for k in candidates], [zero_point[k] for k in candidates])
    torch.testing.assert_close(reordered, y)
    permuted = mix_quantize(*(t[filters] for t in (made.x, made.offset, made.range, made.p)), steps, zero_point)
    assert torch.equal(permuted, y[filters])


@pytest.mark.parametrize("make", [torch.zeros, torch.ones], ids=["weights-0", "weights-1"])
def test_one_hot_weights_pick_a_candidate(make: Callable[..., Tensor]) -> None:
    made = problem(Case("pick", (6, 20), LSQ))
    p = torch.zeros(6, 4)
    p[:, 2] = make(6)
    y = mix_quantize(made.x, made.offset, made.range, p, *made.case.grid)
    alone = mix_quantize(made.x, made.offset[:, 2:3], made.range[:, 2:3], p[:, 2:3], [15], [8])
    assert torch.equal(y, alone)

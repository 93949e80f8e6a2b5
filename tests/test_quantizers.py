"""Weight and input quantizers: what their grids are, where their ranges start, and what holds for every input."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qprune.grids import gaussian_range, input_grid, weight_grid
from qprune.quantizers import InputQuantizer, WeightQuantizer, sample_values

KINDS = pytest.mark.parametrize("kind", ["lsq", "symmetric", "dorefa"])
INPUTS = pytest.mark.parametrize("kind", ["pact", "lsq+"])
BITS = pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
ONE = torch.ones(1)
few = settings(max_examples=25, deadline=None, derandomize=True)
numbers = st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=24)


def weight_quantizer(kind: str, bits: int, clip: float, rows: int = 1) -> WeightQuantizer:
    quantizer = WeightQuantizer(kind, (bits,), rows)
    quantizer.log_range.data.fill_(math.log(clip))
    return quantizer


def input_quantizer(bits: int, clip: float, signed: bool) -> InputQuantizer:
    quantizer = InputQuantizer("pact", (bits,)).eval()
    quantizer.log_range.data.fill_(math.log(clip))
    quantizer.signed.fill_(float(signed))
    return quantizer


def row(values: list[float]) -> Tensor:
    return torch.tensor(values).reshape(1, -1)


@KINDS
@pytest.mark.parametrize("bits", range(1, 9))
def test_levels(kind: str, bits: int) -> None:
    """What core quantizers promise: number of levels, which of them is zero, and their spread around it."""
    n, z = weight_grid(kind, bits)
    levels = (torch.arange(n + 1) - z).tolist()
    if bits == 1:
        assert levels == [-0.5, 0.5]
    elif kind == "symmetric":
        assert len(levels) == 2**bits - 1 and levels == [-level for level in reversed(levels)] and 0 in levels
    elif kind == "lsq":
        assert len(levels) == 2**bits and levels[0] == -(2 ** (bits - 1)) and levels[-1] == 2 ** (bits - 1) - 1 and 0 in levels
    else:
        assert len(levels) == 2**bits and levels == [-level for level in reversed(levels)] and 0 not in levels
    assert input_grid(bits) == (2**bits - 1, 0)


@KINDS
@BITS
@few
@given(values=numbers, clip=st.floats(0.01, 50))
def test_weight_properties(kind: str, bits: int, values: list[float], clip: float) -> None:
    quantizer, x = weight_quantizer(kind, bits, clip), row(sorted(values))
    n, z = weight_grid(kind, bits)
    step = quantizer.learned_range().item() / n
    q = quantizer(x, ONE)
    assert torch.equal(quantizer(q, ONE), q), "idempotent"
    assert (q.diff() >= 0).all(), "monotone"
    codes = q / step + z
    torch.testing.assert_close(codes, codes.round(), atol=1e-3, rtol=0)
    assert codes.min() > -0.5 and codes.max() < n + 0.5 and n + 1 <= 2**bits
    inside = (x > -z * step) & (x < (n - z) * step)
    assert ((q - x).abs()[inside] <= step * 0.501).all(), "half a step at most"


@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
@BITS
@few
@given(values=numbers, clip=st.floats(0.01, 50))
def test_input_properties(signed: bool, bits: int, values: list[float], clip: float) -> None:
    quantizer = input_quantizer(bits, clip, signed)
    x = row(sorted(values))
    q = quantizer(x, ONE)
    assert (q.diff() >= 0).all(), "monotone"
    assert q.unique().numel() <= 2**bits
    step = quantizer.learned_range().item() / (2**bits - 1)
    torch.testing.assert_close(quantizer(q, ONE), q, atol=step * 1e-3, rtol=1e-5)
    low = -step * 2 ** (bits - 1) if signed else 0.0
    assert q.min() >= low - step * 1e-3 and q.max() <= low + quantizer.learned_range().item() + step * 1e-3


@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
@BITS
@few
@given(clip=st.floats(1e-4, 1e4))
def test_zero_stays_zero(signed: bool, bits: int, clip: float) -> None:
    """Padding and what a ReLU cut off must not become noise."""
    zero = input_quantizer(bits, clip, signed)(torch.zeros(1, 3), ONE)
    assert zero.abs().max() <= 1e-6 * clip
    assert signed or not zero.any()


@KINDS
def test_one_bit_is_the_sign_times_the_mean(kind: str) -> None:
    w = torch.randn(4, 3, 3, 3, requires_grad=True)
    direction = torch.randn_like(w)
    quantized = WeightQuantizer(kind, (1,), 4)(w, ONE)
    torch.testing.assert_close(quantized, w.sign() * w.abs().mean((1, 2, 3), keepdim=True))
    quantized.backward(direction)
    torch.testing.assert_close(w.grad, direction)
    one_scale = WeightQuantizer(kind, (1,), 1)(w, ONE)
    torch.testing.assert_close(one_scale, w.sign() * w.abs().mean())


@KINDS
def test_float_and_pruned(kind: str) -> None:
    w = torch.randn(4, 5)
    quantizer = WeightQuantizer(kind, (0, 32), 4)
    assert torch.equal(quantizer(w, torch.tensor([0.0, 1.0])), w)
    assert not quantizer(w, torch.tensor([1.0, 0.0])).any()
    torch.testing.assert_close(quantizer(w, torch.tensor([0.25, 0.75])), 0.75 * w)


def test_only_used_ranges_are_parameters() -> None:
    for bits in [(0,), (32,), (1,), (0, 1, 32)]:
        assert not list(WeightQuantizer("lsq", bits, 4).parameters())
        assert "log_range" in WeightQuantizer("lsq", bits, 4).state_dict()
    assert not list(InputQuantizer("lsq+", (0, 32)).parameters())
    assert len(list(InputQuantizer("lsq+", (1, 32)).parameters())) == 2


def best_error(x: Tensor, n: float, z: float, negative: float = 0.0, density: Tensor | None = None) -> float:
    """The least mean squared error over all ranges r, the offset being −r · negative: by brute force, coarse then fine, in float64.

    density  the weight of every x, all alike if not given
    """
    x = x.double().reshape(1, -1)
    density = torch.ones_like(x) if density is None else density

    def errors(r: Tensor) -> Tensor:
        beta, step = -r * negative, r / n
        q = ((x - beta) / step + z).round().clamp(0, n)
        return (density * ((q - z) * step + beta - x).square()).sum(1) / density.sum()

    coarse = 2.5 * x.abs().max() * torch.linspace(0.01, 1, 100, dtype=torch.float64).reshape(-1, 1)
    fine = coarse[errors(coarse).argmin()] * torch.linspace(0.95, 1.05, 31, dtype=torch.float64).reshape(-1, 1)
    return errors(fine).min().item()


@KINDS
@BITS
def test_weights_start_near_the_optimum(kind: str, bits: int) -> None:
    """Judged on the Gaussian itself, since the largest weight of a sample is chance."""
    quantizer = WeightQuantizer(kind, (bits,), 1)
    quantizer.start(0.03 * torch.special.ndtri((torch.arange(65536) + 0.5) / 65536).reshape(1, -1))
    x = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    density = (-x.square() / 2).exp()
    q = quantizer((0.03 * x).reshape(1, -1), ONE) / 0.03
    error = (density * (q - x).square()).sum() / density.sum()
    assert error.item() < 1.02 * best_error(x, *weight_grid(kind, bits), density=density)


def test_published_optimum() -> None:
    """Max (1960), table II: the uniform quantizer of a Gaussian. 4 levels: step 0.9957; 16 levels: 0.3352; 32 levels: 0.1881."""
    for levels, step in [(4, 0.9957), (8, 0.5860), (16, 0.3352), (32, 0.1881)]:
        assert gaussian_range(levels - 1, (levels - 1) / 2) / (levels - 1) == pytest.approx(step, rel=2e-3)


def half_normal(count: int) -> Tensor:
    return torch.randn(count).abs()


def after_relu(count: int) -> Tensor:
    return torch.randn(count).relu()


@pytest.mark.parametrize("distribution", [half_normal, after_relu, torch.randn, torch.rand], ids=lambda d: d.__name__)
@pytest.mark.parametrize("scale", [0.05, 30.0])
@INPUTS
@BITS
def test_inputs_start_near_the_optimum(kind: str, bits: int, scale: float, distribution: Callable[[int], Tensor]) -> None:
    x = scale * distribution(2048).reshape(1, -1)
    quantizer = InputQuantizer(kind, (bits,))
    quantizer.calibrate(x)
    n, signed = 2**bits - 1, bool(x.min() < 0)
    best = best_error(x, n, 0, 2 ** (bits - 1) / n if signed else 0.0)
    error = (quantizer(x, ONE) - x).square().mean().item()
    # an offset that only shrinks the interval [low, high] is one more thing to choose, and not chosen as finely
    assert error < (1.05 if kind == "pact" or not signed else 1.25) * best
    assert quantizer.calibrated and bool(quantizer.signed) == signed


@INPUTS
def test_inputs_far_from_zero_are_reached(kind: str) -> None:
    x = 5 + torch.rand(1, 2000)
    quantizer = InputQuantizer(kind, (8,))
    quantizer.calibrate(x)
    assert (quantizer(x, ONE) - x).abs().max() < 0.03


def test_calibration_meets_every_column() -> None:
    """65,536 of 2^22 values, at a fixed stride, would all come from the first column of the images."""
    x = torch.zeros(4, 64, 128, 128)
    x[..., 1:] = torch.rand(127)
    values = sample_values(x)
    assert values.numel() == 65536
    assert 0.003 < (values == 0).float().mean() < 0.02
    assert torch.equal(sample_values(x[0, :4]), x[0, :4].reshape(-1))


@INPUTS
def test_silence_teaches_nothing(kind: str) -> None:
    quantizer = InputQuantizer(kind, (2, 8))
    before = quantizer.log_range.clone()
    quantizer.calibrate(torch.zeros(2, 3, 4, 4))
    torch.testing.assert_close(quantizer.log_range, before)
    quantizer = InputQuantizer(kind, (2, 8))
    quantizer.calibrate(torch.zeros(0, 3, 4, 4))
    assert not quantizer.calibrated and torch.equal(quantizer.log_range, before)


def test_sign_is_remembered() -> None:
    quantizer = InputQuantizer("pact", (4,))
    quantizer.observe_sign(torch.rand(1, 9) - 0.5)
    quantizer.observe_sign(torch.rand(1, 9))
    assert quantizer.signed == 1


@KINDS
def test_zero_filter(kind: str) -> None:
    """A filter of zeros gives zeros (DoReFa has no zero level: as good as zero), and can leave zero again."""
    w = torch.randn(3, 2, 3, 3)
    w[1] = 0
    w.requires_grad_()
    quantizer = WeightQuantizer(kind, (2, 8), 3)
    quantizer.start(w)
    out = quantizer(w, torch.tensor([0.5, 0.5]))
    assert out[1].abs().max() <= (1e-8 if kind == "dorefa" else 0)
    out.sum().backward()
    assert w.grad is not None and (w.grad[1] == 1).all()
    zeros = WeightQuantizer(kind, (2, 8), 3)
    zeros.start(torch.zeros(3, 2, 3, 3))
    assert zeros(torch.zeros(3, 2, 3, 3), torch.tensor([0.5, 0.5])).abs().max() <= (1e-8 if kind == "dorefa" else 0)
    assert zeros.log_range.isfinite().all()


@pytest.mark.parametrize("log_range", [-1e4, -500, -50, 50, 500, 1e4])
def test_absurd_updates_keep_scales_positive(log_range: float) -> None:
    x = torch.randn(4, 5).requires_grad_()
    weights, inputs = WeightQuantizer("lsq", (2, 8), 4), InputQuantizer("pact", (2, 8)).eval()
    for quantizer in (weights, inputs):
        quantizer.log_range.data.fill_(log_range)
        r = quantizer.learned_range()
        assert (r > 0).all() and r.isfinite().all() and (1 / r).isfinite().all()
        y = quantizer(x, torch.tensor([0.5, 0.5]))
        assert y.isfinite().all()
        y.sum().backward()
        assert quantizer.log_range.grad is not None and quantizer.log_range.grad.isfinite().all()
    assert x.grad is not None and x.grad.isfinite().all()

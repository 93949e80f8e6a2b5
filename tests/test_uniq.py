"""UNIQ weights: equally likely levels of the weight's own Gaussian, noise inside a cell, the straight-through gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import norm
from torch import Tensor

from qprune.nn import QuantConv2d
from qprune.quantizers import UniqWeightQuantizer, make_weight_quantizer

BITS = pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
ONE = torch.ones(1)


def weight(*shape: int) -> Tensor:
    return 0.1 + 0.4 * torch.randn(shape, generator=torch.Generator().manual_seed(11))


def gaussian(w: Tensor) -> tuple[np.ndarray, float, float]:
    values = w.double().numpy()
    return values, float(values.mean()), float(values.std(ddof=1))


def staged(stage: str, *bits: int, seed: int = 0) -> UniqWeightQuantizer:
    quantizer = UniqWeightQuantizer(bits)
    quantizer.stage = stage
    quantizer.renew(torch.Generator().manual_seed(seed))
    return quantizer


@BITS
def test_levels_are_the_centres_of_equally_likely_cells(bits: int) -> None:
    w = weight(128, 100)
    values, mean, deviation = gaussian(w)
    k = 2**bits
    q = UniqWeightQuantizer((bits,))(w, ONE)
    levels = norm.ppf((np.arange(k) + 0.5) / k, mean, deviation)
    assert q.unique().numel() == k
    np.testing.assert_allclose(q.unique().numpy(), levels, rtol=1e-5, atol=1e-6)
    cell = np.minimum((norm.cdf(values, mean, deviation) * k).astype(int), k - 1)
    decided = np.abs(norm.cdf(values, mean, deviation) * k - np.round(norm.cdf(values, mean, deviation) * k)) > 1e-4
    np.testing.assert_allclose(q.numpy()[decided], levels[cell][decided], rtol=1e-5, atol=1e-6)
    share = np.bincount(cell.ravel(), minlength=k) / cell.size
    assert np.abs(share - 1 / k).max() < 6 * np.sqrt(1 / k / cell.size)


def test_by_hand() -> None:
    """μ = 1, σ = 2: Φ is 0.16, 0.5 and 0.84 at one deviation, so the outer values go to the centres of the outer quarters; the middle one
    lies between two cells, and the even one of −1/2 + 2 = 1.5 is 2."""
    q = UniqWeightQuantizer((2,))(torch.tensor([[-1.0, 1.0, 3.0]]), ONE)
    outer = 2 * norm.ppf(0.875)
    torch.testing.assert_close(q, torch.tensor([[1 - outer, 1 + 2 * norm.ppf(0.625), 1 + outer]], dtype=torch.float32))


@pytest.mark.parametrize("w", [torch.full((2, 3), 0.7), torch.zeros(1, 1), torch.zeros(0, 4)], ids=["constant", "one value", "empty"])
def test_weights_without_spread(w: Tensor) -> None:
    """The deviation counts as 1e-5."""
    for stage in ("quantized", "noisy"):
        q = staged(stage, 1, 4)(w, torch.tensor([0.5, 0.5]))
        assert q.shape == w.shape and (q - w).abs().le(5e-5).all()


@BITS
def test_noise_stays_within_half_a_cell(bits: int) -> None:
    w = weight(64, 200)
    values, mean, deviation = gaussian(w)
    mixed = staged("noisy", bits)(w, ONE).double().numpy()
    assert (mixed != values).mean() > 0.99, "all weights are noisy"
    u = norm.cdf(mixed, mean, deviation) - norm.cdf(values, mean, deviation)
    assert np.abs(u).max() < 0.5 / 2**bits + 2e-5
    inner = np.abs(norm.cdf(values, mean, deviation) - 0.5) < 0.5 - 0.5 / 2**bits
    u = u[inner] * 2**bits
    assert abs(u.mean()) < 5 / np.sqrt(12 * u.size) and u.var() == pytest.approx(1 / 12, rel=0.1)
    assert norm.cdf(mixed.min(), mean, deviation) > 0.9e-5 and norm.sf(mixed.max(), mean, deviation) > 0.9e-5


def test_noise_is_a_function_of_the_seed() -> None:
    w = weight(5, 6)
    assert torch.equal(staged("noisy", 2, seed=3)(w, ONE), staged("noisy", 2, seed=3)(w, ONE))
    assert not torch.equal(staged("noisy", 2, seed=3)(w, ONE), staged("noisy", 2, seed=4)(w, ONE))


def test_stages() -> None:
    w = weight(5, 6)
    quantized = UniqWeightQuantizer((2,))(w, ONE)
    assert torch.equal(staged("float", 2)(w, ONE), w)
    for stage in ("noisy", "float"):
        assert torch.equal(staged(stage, 2).eval()(w, ONE), quantized)


def test_mixture_of_candidates() -> None:
    w, p = weight(6, 4, 3, 3), torch.rand(6, 4).softmax(1)
    each = [UniqWeightQuantizer((b,))(w, ONE) for b in (1, 4, 32)]
    assert torch.equal(each[2], w)
    want = sum(p[:, k].view(6, 1, 1, 1) * q for k, q in enumerate(each))
    torch.testing.assert_close(UniqWeightQuantizer((1, 4, 32, 0))(w, p), want)
    torch.testing.assert_close(UniqWeightQuantizer((1, 4))(w, torch.tensor([0.25, 0.75])), 0.25 * each[0] + 0.75 * each[1])


@pytest.mark.parametrize("stage", ["quantized", "noisy", "float"])
def test_gradients(stage: str) -> None:
    """dL/dw = g Σ_k p_k without the pruned candidate, dL/dp_k = Σ g Q_k(w)."""
    w, p, g = weight(3, 50).requires_grad_(), torch.rand(3, 4).softmax(1).requires_grad_(), torch.randn(3, 50)
    quantizer = staged(stage, 2, 8, 0, 32)
    quantizer(w, p).backward(g)
    torch.testing.assert_close(w.grad, g * (1 - p.detach()[:, 2:3]))
    values = [quantizer(w.detach(), row) for row in torch.eye(4)]
    torch.testing.assert_close(p.grad, torch.stack([(g * v).sum(1) for v in values], 1), atol=1e-5, rtol=1e-5)
    assert not p.grad[:, 2].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    w = weight(4, 30)
    q = UniqWeightQuantizer((3,))(w.to(dtype), ONE)
    assert q.dtype == dtype
    assert ((q - UniqWeightQuantizer((3,))(w, ONE)).abs() < 0.01).float().mean() > (0.95 if dtype == torch.bfloat16 else 0.99)


def test_nothing_to_learn_or_store() -> None:
    quantizer = make_weight_quantizer("uniq", (2, 4), 8)
    assert isinstance(quantizer, UniqWeightQuantizer)
    assert not list(quantizer.parameters()) and not quantizer.state_dict()


def test_layer_with_fixed_bits() -> None:
    conv = QuantConv2d(3, 4, 3, bias=False, w_bits=(2, 4, 2, 4), a_bits=32, weight_quantizer="uniq", placement="output")
    x = torch.randn(2, 3, 6, 6)
    rows = F.one_hot(torch.tensor([0, 1, 0, 1])).float()
    torch.testing.assert_close(conv(x), F.conv2d(x, UniqWeightQuantizer((2, 4))(conv.weight, rows)))
    other = QuantConv2d(3, 4, 3, bias=False, w_bits=(2, 4, 2, 4), a_bits=32, weight_quantizer="uniq", placement="output")
    other.load_state_dict(conv.state_dict())
    assert torch.equal(other(x), conv(x))

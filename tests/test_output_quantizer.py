"""Activations quantized where they are produced: levels, edges, the clip's gradient, stages, statistics, and the bits of each channel."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import norm
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from qprune.errors import QPruneError
from qprune.quantizers import OutputQuantizer

BITS = pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
KINDS = pytest.mark.parametrize("kind", ["nice", "pact", "uniq"])
ONE = torch.ones(1)


def pre_activation(*shape: int) -> Tensor:
    return 0.3 + torch.randn(shape, generator=torch.Generator().manual_seed(5))


def clipped_at(clip: float, *bits: int, kind: str = "pact", own: bool = False) -> OutputQuantizer:
    quantizer = OutputQuantizer(kind, bits, own)
    quantizer.calibrate(pre_activation(2, 3))
    quantizer.log_range.data.fill_(math.log(clip))
    return quantizer


@BITS
def test_levels(bits: int) -> None:
    x = pre_activation(4, 8, 30, 30)
    y = clipped_at(1.5, bits, kind="nice")(x, ONE)
    n = 2**bits - 1
    assert y.unique().numel() == n + 1 and y.min() == 0 and y.max().item() == pytest.approx(1.5)
    exact = x.double().clamp(0, 1.5) / 1.5 * n
    decided = (exact.remainder(1) - 0.5).abs() > 1e-5 * n
    assert decided.float().mean() > 0.99
    torch.testing.assert_close(y[decided], (exact.round() * 1.5 / n).float()[decided])


def test_ties_go_to_the_even_level() -> None:
    """With clip 1 one half is 0.5, 1.5, 3.5 and 7.5 steps."""
    quantizers = [clipped_at(1.0, bits) for bits in (1, 2, 3, 4)]
    half = torch.full((1, 1), 0.5)
    assert [round(q(half, ONE).item() * n) for q, n in zip(quantizers, (1, 3, 7, 15), strict=True)] == [0, 2, 4, 8]


@pytest.mark.parametrize("stage", ["quantized", "clamped"])
@pytest.mark.parametrize("clip", [1.0, 0.1, 0.7, 3.3, 5.9])
def test_gradient_at_the_edges(clip: float, stage: str) -> None:
    """1 for 0 < x ≤ c: not at zero, where PACT's own rule has 1, but at c."""
    quantizer = clipped_at(clip, 3)
    quantizer.stage = stage
    c = quantizer.learned_range().item()
    tiny = float(np.finfo(np.float32).tiny)
    above = np.nextafter(np.nextafter(np.float32(c), np.float32(9)), np.float32(9)).item()
    x = torch.tensor([[-1.0, -tiny, 0.0, tiny, c / 2, c, above, 9.0]], requires_grad=True)
    y = quantizer(x, ONE)
    y.backward(torch.arange(1.0, 9).view(1, -1))
    assert x.grad.tolist() == [[0, 0, 0, 4, 5, 6, 0, 0]]
    assert y[0, :3].tolist() == [0, 0, 0] and y[0, -1].item() == pytest.approx(c)


@BITS
@pytest.mark.parametrize("stage", ["quantized", "clamped"])
def test_gradient_of_the_clip(bits: int, stage: str) -> None:
    quantizer = clipped_at(0.8, bits)
    quantizer.stage = stage
    x, g = pre_activation(2, 3, 10, 10), torch.randn(2, 3, 10, 10)
    y = quantizer(x, ONE)
    y.backward(g)
    c = quantizer.learned_range().item()
    inside = 0.0 if stage == "clamped" else (x > 0) * (y.detach() - x.clamp(0, c)) / c
    want = (g * ((x > c) + inside)).double().sum()
    assert quantizer.log_range.grad is not None
    torch.testing.assert_close(quantizer.log_range.grad.sum() / c, want.float(), rtol=1e-4, atol=1e-4)


def test_clamped_without_rounding() -> None:
    quantizer = clipped_at(0.7, 2, 3)
    quantizer.stage = "clamped"
    x = pre_activation(3, 4, 5, 5)
    c = quantizer.learned_range().item()
    assert torch.equal(quantizer(x, torch.tensor([0.25, 0.75])), x.clamp(0, c)), "exactly c above c"
    rounded = clipped_at(0.7, 2, 3).eval()(x, torch.tensor([0.25, 0.75]))
    assert torch.equal(quantizer.eval()(x, torch.tensor([0.25, 0.75])), rounded), "eval mode quantizes"
    with pytest.raises(QPruneError, match=r"^stage: OutputQuantizer knows quantized, clamped, got 'noisy'$"):
        quantizer.stage = "noisy"


@KINDS
def test_what_is_learned_and_stored(kind: str) -> None:
    for own, columns in ((False, 1), (True, 3)):
        quantizer = OutputQuantizer(kind, (2, 4, 4), own)
        assert [name for name, _ in quantizer.named_parameters()] == (["log_range"] if kind == "pact" else [])
        assert set(quantizer.state_dict()) == {"log_range", "average", "started"} and quantizer.log_range.shape == (1, columns)
        quantizer.calibrate(pre_activation(4, 3))
        other = OutputQuantizer(kind, (2, 4, 4), own)
        other.load_state_dict(quantizer.state_dict())
        assert other.calibrated
        x = pre_activation(5, 3, 2, 2)
        assert torch.equal(other.eval()(x, torch.eye(3)), quantizer.eval()(x, torch.eye(3)))


@KINDS
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("stage", ["quantized", "clamped"])
def test_bits_per_channel(kind: str, own: bool, stage: str) -> None:
    """Every channel gets the candidate that its row names, and a mixture is the sum over candidates. Bits repeat."""
    bits, x = (2, 4, 2, 32), pre_activation(3, 6, 4, 4)
    quantizer = OutputQuantizer(kind, bits, own)
    quantizer.calibrate(x)
    if own:
        quantizer.log_range.data.copy_(torch.tensor([0.5, 0.9, 1.3, 7.0]).log())
    quantizer.stage = stage
    choice = torch.tensor([0, 1, 2, 3, 1, 0])
    y = quantizer(x, F.one_hot(choice, 4).float())
    each = torch.stack([quantizer.candidate(x, k) for k in range(4)])
    for channel, k in enumerate(choice.tolist()):
        torch.testing.assert_close(y[:, channel], each[k, :, channel])
    torch.testing.assert_close(each[3], x.relu())
    assert torch.equal(each[0], each[2]) == (not own or kind == "uniq")
    p = torch.rand(6, 4).softmax(1)
    torch.testing.assert_close(quantizer(x, p), torch.einsum("knchw,ck->nchw", each, p))
    torch.testing.assert_close(quantizer(x, p[0]), torch.einsum("knchw,k->nchw", each, p[0]))


@KINDS
@pytest.mark.parametrize("own", [False, True])
def test_gradients_of_a_mixture(kind: str, own: bool) -> None:
    x, p, g = pre_activation(2, 3, 4, 4), torch.rand(3, 3).softmax(1), torch.randn(2, 3, 4, 4)
    quantizer = OutputQuantizer(kind, (1, 3, 32), own)
    quantizer.calibrate(x)
    quantizer.log_range.data.copy_(torch.tensor([0.4, 0.9, 5.0] if own else [0.7]).log())
    clip = quantizer.learned_range().detach().expand(1, 3)[0]
    x.requires_grad_(), p.requires_grad_()
    quantizer(x, p).backward(g)
    assert x.grad is not None and p.grad is not None
    value = x.detach()
    passes = [value >= 0, value >= 0, value >= 0] if kind == "uniq" else [(value > 0) & (value <= c) for c in clip[:2]] + [value > 0]
    shares = p.detach().unbind(1)
    torch.testing.assert_close(x.grad, sum(g * s.view(3, 1, 1) * m for s, m in zip(shares, passes, strict=True)))
    each = torch.stack([quantizer.candidate(value, k).detach() for k in range(3)])
    torch.testing.assert_close(p.grad, torch.einsum("nchw,knchw->ck", g, each), rtol=1e-4, atol=1e-4)


def test_stacked_configurations() -> None:
    """S·C channels with S·C rows: the configurations side by side give what each gives alone."""
    quantizer = clipped_at(1.2, 2, 3, 8, kind="nice").eval()
    x, choices = pre_activation(2, 4 * 5, 3, 3), torch.randint(3, (4, 5))
    together = quantizer(x, F.one_hot(choices.flatten(), 3).float())
    alone = [quantizer(part, F.one_hot(choice, 3).float()) for part, choice in zip(x.chunk(4, 1), choices, strict=True)]
    assert torch.equal(together, torch.cat(alone, 1))


@KINDS
@pytest.mark.parametrize("stage", ["quantized", "clamped"])
def test_layout_and_dtype_are_kept(kind: str, stage: str) -> None:
    quantizer = OutputQuantizer(kind, (2, 32))
    quantizer.stage = stage
    x = pre_activation(2, 3, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    y = quantizer(x, torch.rand(3, 2).softmax(1))
    y.sum().backward()
    for t in (y, x.grad):
        assert t is not None and t.is_contiguous(memory_format=torch.channels_last)
    assert quantizer(x.detach().bfloat16(), torch.tensor([0.5, 0.5])).dtype == torch.bfloat16


def test_nan_is_not_hidden() -> None:
    x = torch.tensor([[[math.nan, 1.0]]])
    for kind in ("nice", "pact", "uniq"):
        quantizer = OutputQuantizer(kind, (4,))
        quantizer.calibrate(pre_activation(2, 1, 2))
        for stage in ("quantized", "clamped"):
            quantizer.stage = stage
            assert quantizer.train(kind != "uniq")(x, ONE)[0, 0].isnan().tolist() == [True, False], (kind, stage)


@pytest.mark.parametrize("deviations", [3.0, 5.0])
def test_clip_is_mean_plus_deviations(deviations: float) -> None:
    """Moving averages of momentum 0.9 from zero, corrected for their start: after one batch they are that batch's."""
    batches = [pre_activation(4, 3, 5) * scale for scale in (1.0, 2.0, 0.5)]
    quantizer = OutputQuantizer("nice", (2, 4))
    mean = deviation = 0.0
    for t, x in enumerate(batches, 1):
        quantizer.observe(x, deviations)
        values = x.double().numpy()
        mean, deviation = 0.9 * mean + 0.1 * values.mean(), 0.9 * deviation + 0.1 * values.std(ddof=1)
        clip = (mean + deviations * deviation) / (1 - 0.9**t)
        torch.testing.assert_close(quantizer.learned_range(), torch.full((1, 1), clip))
        if t == 1:
            assert clip == pytest.approx(values.mean() + deviations * values.std(ddof=1))
    quantizer.calibrate(batches[1], deviations)
    fresh = OutputQuantizer("nice", (2, 4))
    fresh.observe(batches[1], deviations)
    assert torch.equal(quantizer.log_range, fresh.log_range)


@pytest.mark.parametrize("kind", ["nice", "pact"])
def test_the_first_training_batch_calibrates(kind: str) -> None:
    x, later = pre_activation(4, 3, 5, 5), 3 * pre_activation(4, 3, 5, 5)
    quantizer, wanted = OutputQuantizer(kind, (2,)), OutputQuantizer(kind, (2,))
    torch.testing.assert_close(quantizer.learned_range(), torch.full((1, 1), 5.0))
    wanted.calibrate(x)
    quantizer.eval()(later, ONE)
    assert not quantizer.calibrated
    quantizer.train()(x, ONE)
    quantizer(later, ONE)
    assert quantizer.calibrated and torch.equal(quantizer.log_range, wanted.log_range)
    quantizer.restart()
    assert not quantizer.calibrated and not quantizer.average.any()
    quantizer(later, ONE)
    assert quantizer.learned_range() > 2 * wanted.learned_range()


def test_data_that_teach_nothing() -> None:
    quantizer = clipped_at(0.6, 2)
    for x in (torch.zeros(0, 3), torch.full((4, 3), -2.0), torch.full((1, 1), -2.0)):
        quantizer.calibrate(x)
        assert quantizer.learned_range().item() == pytest.approx(0.6)
    plain = OutputQuantizer("nice", (32, 32))
    assert plain.calibrated and torch.equal(plain(pre_activation(2, 3), torch.tensor([0.5, 0.5])), pre_activation(2, 3).relu())


def quantile(x: np.ndarray, mean: float, deviation: float, bits: int) -> np.ndarray:
    """UNIQ's activation written out for one value after the other."""
    n, edge = 2**bits - 1, 0.5 ** (bits + 1)
    zero = norm.cdf(0, mean, 3 * deviation)
    out = []
    for value in x.ravel():
        m = (norm.cdf(value, mean, 3 * deviation) - zero) / (1 - zero)
        t = zero if value < 0 else (round(m * n - 0.5) + 0.5) / n * (1 - zero) + zero
        out.append(norm.ppf(min(max(t, edge), 1 - edge), mean, 3 * deviation))
    return np.array(out).reshape(x.shape)


@BITS
@pytest.mark.parametrize("shift", [-0.5, 0.0, 1.0, 6.0])
def test_quantiles(bits: int, shift: float) -> None:
    """Far above zero (6) negative values have so little of the distribution that they go to its edge."""
    x = shift + torch.randn(3, 40)
    values = x.double().numpy()
    mean, deviation = values.mean(), values.std(ddof=1)
    y = OutputQuantizer("uniq", (bits,))(x, ONE).double().numpy()
    want = quantile(values, mean, deviation, bits)
    m = (norm.cdf(values, mean, 3 * deviation) - norm.cdf(0, mean, 3 * deviation)) / norm.sf(0, mean, 3 * deviation) * (2**bits - 1)
    decided = (np.abs(m - np.round(m)) > 1e-3) | (values < 0)
    assert decided.mean() > 0.95
    np.testing.assert_allclose(y[decided], want[decided], rtol=1e-4, atol=1e-5)
    if shift < 1:
        assert not y[values < 0].any(), "exactly zero"


def test_quantiles_of_batch_and_of_average() -> None:
    batches = [pre_activation(4, 3, 6, 6), 2 * pre_activation(4, 3, 6, 6) - 1]
    quantizer = OutputQuantizer("uniq", (3,))
    for x in batches:
        alone = OutputQuantizer("uniq", (3,))
        assert torch.equal(quantizer(x, ONE), alone(x, ONE)), "training: the batch's own statistics"
    assert quantizer.calibrated
    mean, deviation = quantizer.statistics()
    (a, b), (c, d) = ((x.mean(), x.std()) for x in batches)
    torch.testing.assert_close(mean, (0.09 * a + 0.1 * c) / 0.19)
    torch.testing.assert_close(deviation, (0.09 * b + 0.1 * d) / 0.19)
    before = copy.deepcopy(quantizer.state_dict())
    quantizer.eval()
    x = torch.linspace(-2, 5, 50).view(1, 1, -1)
    y = quantizer(x, ONE)
    np.testing.assert_allclose(y.numpy(), quantile(x.double().numpy(), mean.item(), deviation.item(), 3), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(quantizer(x[:, :, :9], ONE), y[:, :, :9], msg="eval: nothing depends on the batch")
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("stage", ["quantized", "clamped"])
@pytest.mark.parametrize("own", [False, True])
@KINDS
def test_no_value_is_read_back(kind: str, own: bool, stage: str, training: bool) -> None:
    """Reading one would raise: these tensors have none."""
    with FakeTensorMode():
        quantizer = OutputQuantizer(kind, (2, 4, 32), own).train(training)
        quantizer.stage = stage
        x = torch.randn(2, 5, 3, 3, requires_grad=True)
        y = quantizer(x, torch.randn(5, 3))
        y.sum().backward()
        assert y.shape == x.shape and x.grad is not None


@KINDS
def test_compiles_as_one_graph(kind: str) -> None:
    quantizer = OutputQuantizer(kind, (2, 4))
    x, p = pre_activation(2, 3, 4, 4), torch.rand(3, 2).softmax(1)
    quantizer.calibrate(x)
    quantizer.eval()
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, p), quantizer(x, p))

"""NICE weights: one clip that nothing moves, zero-centred levels, the straight-through gradient, and noise in place of rounding."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from qprune import Policy, SearchSpace, convert, prepare
from qprune.errors import QPruneError
from qprune.nn import MixedConv2d, QuantConv2d, integer
from qprune.nn.premix import Premix
from qprune.quantizers import WeightQuantizer, make_weight_quantizer
from qprune.record import record_of
from qprune.tasks.models import resnet8

BITS = pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
ONE = torch.ones(1)


def weight(*shape: int, shift: float = 0.02, scale: float = 0.3) -> Tensor:
    return shift + scale * torch.randn(shape, generator=torch.Generator().manual_seed(3))


def nice(w: Tensor, *bits: int) -> WeightQuantizer:
    quantizer = WeightQuantizer("nice", bits, w.size(0))
    quantizer.start(w)
    return quantizer


def clip_of(w: Tensor) -> float:
    values = w.double().numpy()
    return float(abs(values.mean()) + 3.45 * values.std(ddof=1))


def step_of(w: Tensor, bits: int) -> float:
    return clip_of(w) / (2 ** (bits - 1) - 1)


@pytest.mark.parametrize("shift", [0.0, 0.4, -0.4])
def test_clip(shift: float) -> None:
    """|μ| + 3.45 σ with the unbiased σ, one for all filters and candidates. Four values tell N − 1 from N."""
    w = torch.tensor([[-1.0, 0.5], [0.25, 0.25]]) + shift
    assert clip_of(w) == pytest.approx(abs(shift) + 3.45 * math.sqrt((1 + 0.25 + 2 * 0.0625) / 3))
    r = nice(w, 2, 8).learned_range()
    assert r.shape == (1, 2)
    torch.testing.assert_close(r, torch.full((1, 2), 2 * clip_of(w)))


@BITS
def test_levels(bits: int) -> None:
    w = weight(16, 8, 3, 3, scale=0.1)
    w[0, 0, 0] = torch.tensor([-9.0, 9.0, 0.0])  # beyond the clip on both sides
    m, step = 2 ** (bits - 1) - 1, step_of(w, bits)
    q = nice(w, bits)(w, ONE)
    codes = q / step
    torch.testing.assert_close(codes, codes.round(), atol=1e-4, rtol=0)
    assert codes.max() == pytest.approx(m) and codes.min() == pytest.approx(-m)
    assert codes.round().unique().numel() <= 2**bits - 1 == 2 * m + 1
    assert q[0, 0, 0, 2] == 0
    exact = (w.double() / step).clamp(-m, m)
    decided = (exact.remainder(1) - 0.5).abs() > 1e-5 * m
    assert decided.float().mean() > 0.99
    torch.testing.assert_close(q[decided], (step * exact.round()).float()[decided])


def test_ternary_has_all_its_levels() -> None:
    assert nice(weight(64, 32), 2)(weight(64, 32), ONE).unique().numel() == 3


@pytest.mark.parametrize("w", [torch.zeros(2, 3), torch.full((1, 1), -0.5), torch.zeros(0, 3)], ids=["zeros", "one value", "empty"])
def test_weights_without_spread(w: Tensor) -> None:
    quantizer = nice(w, 2, 4)
    assert quantizer.learned_range().isfinite().all()
    torch.testing.assert_close(quantizer(w, torch.tensor([0.5, 0.5])), w)


def test_the_clip_is_neither_learned_nor_moved() -> None:
    w = weight(4, 3, 3, 3).requires_grad_()
    quantizer = nice(w, 2, 4)
    assert not list(quantizer.parameters()) and list(quantizer.state_dict()) == ["log_range"]
    before = quantizer.log_range.clone()
    quantizer.train()(w, torch.tensor([0.5, 0.5])).square().sum().backward()
    with torch.no_grad():
        w.sub_(w.grad)
        quantizer(5 * w, torch.tensor([0.5, 0.5]))
    assert torch.equal(quantizer.log_range, before)
    other = nice(3 * w.detach(), 2, 4)
    other.load_state_dict(quantizer.state_dict())
    assert torch.equal(other.log_range, before)


@pytest.mark.parametrize("stage", ["quantized", "noisy", "float"])
def test_the_gradient_passes_everywhere(stage: str) -> None:
    w = weight(5, 40)
    w[0, :2] = torch.tensor([50.0, -50.0])
    w.requires_grad_()
    quantizer = nice(weight(5, 40), 2, 3)
    quantizer.stage = stage
    g = torch.randn(5, 40)
    quantizer(w, F.one_hot(torch.tensor([0, 1, 0, 1, 1]), 2).float()).backward(g)
    assert torch.equal(w.grad, g)


def test_stages() -> None:
    w, p = weight(6, 20), torch.tensor([1.0, 0.0])
    quantizer = nice(w, 2, 4)
    quantized = quantizer(w, p)
    for stage in ("noisy", "float", "quantized"):
        quantizer.stage = stage
        assert torch.equal(quantizer.eval()(w, p), quantized), "eval mode quantizes"
        assert torch.equal(quantizer.train()(w, p), quantized) == (stage == "quantized")
    quantizer.stage = "float"
    assert torch.equal(quantizer(w, p), w)
    with pytest.raises(QPruneError, match=r"^stage: WeightQuantizer knows quantized, noisy, float, got 'clamped'$"):
        quantizer.stage = "clamped"
    assert "stage" not in quantizer.state_dict() and "seed" not in quantizer.state_dict()


def noisy(w: Tensor, p: Tensor, seed: int, *bits: int, kind: str = "nice") -> Tensor:
    quantizer = WeightQuantizer(kind, bits, w.size(0))
    quantizer.start(w)
    quantizer.stage = "noisy"
    quantizer.renew(torch.Generator().manual_seed(seed))
    return quantizer(w, p)


@BITS
def test_noise(bits: int) -> None:
    """A twentieth of the weights is noisy: within half a step of the weight, within the clip, spread evenly."""
    w = weight(64, 64, 3, 3)
    c, step, n = clip_of(w), step_of(w, bits), w.numel()
    mixed, quantized = noisy(w, ONE, 1, bits), nice(w, bits)(w, ONE)
    there = (mixed - quantized).abs() > 1e-6 * c
    assert abs(there.float().mean() - 0.05) < 5 * math.sqrt(0.05 * 0.95 / n)
    assert mixed.abs().max() <= c * (1 + 1e-6)
    u = (mixed - w)[there & (w.abs() <= c - step / 2)] / step
    assert u.numel() > 500 and u.abs().max() <= 0.5 + 1e-4
    deviation = math.sqrt(1 / 12 / u.numel())
    assert abs(u.mean()) < 5 * deviation
    assert u.var() == pytest.approx(1 / 12, rel=0.1)
    assert u.min() < -0.48 and u.max() > 0.48
    clipped = w.abs() > c
    assert clipped.any() and (mixed[clipped].abs() >= c - step / 2 - 1e-6).all()


def test_every_element_has_the_step_of_its_own_candidate() -> None:
    w = weight(2, 40_000, scale=0.1)
    mixed, quantized = noisy(w, torch.eye(2), 5, 2, 5), nice(w, 2, 5)(w, torch.eye(2))
    for row, bits in enumerate((2, 5)):
        there = (mixed - quantized)[row].abs() > 1e-6
        u = (mixed - w)[row][there & (w[row].abs() < clip_of(w) - step_of(w, bits) / 2)].abs().max().item()
        assert 0.48 * step_of(w, bits) < u < 0.501 * step_of(w, bits)


def test_noise_is_a_function_of_the_seed() -> None:
    w = weight(8, 30)
    assert torch.equal(noisy(w, ONE, 7, 3), noisy(w, ONE, 7, 3))
    quantizer, generator = nice(w, 3), torch.Generator().manual_seed(7)
    quantizer.stage = "noisy"
    draws = []
    for _ in range(3):
        quantizer.renew(generator)
        draws.append(quantizer(w, ONE))
        assert torch.equal(quantizer(w, ONE), draws[-1]), "the same until the next step"
    assert torch.equal(draws[0], noisy(w, ONE, 7, 3)) and not torch.equal(draws[0], draws[1]) and not torch.equal(draws[1], draws[2])


def test_mask_and_noise_are_drawn_apart() -> None:
    """Were the mask made of the noise's own draw, only its lowest twentieth would be seen."""
    w = weight(50, 400)
    mixed, quantized = noisy(w, ONE, 2, 2), nice(w, 2)(w, ONE)
    u = ((mixed - w) / step_of(w, 2))[((mixed - quantized).abs() > 1e-6) & (w.abs() < clip_of(w) - step_of(w, 2) / 2)]
    share = [((u >= low) & (u < low + 0.25)).float().mean().item() for low in (-0.5, -0.25, 0.0, 0.25)]
    assert all(0.18 < s < 0.32 for s in share)


@pytest.mark.parametrize("kind", ["lsq", "symmetric", "dorefa"])
def test_other_grids_have_stages_too(kind: str) -> None:
    w = weight(4, 2000)
    plain = WeightQuantizer(kind, (3,), 4)
    plain.start(w)
    mixed = noisy(w, ONE, 1, 3, kind=kind)
    share = ((mixed - plain(w, ONE)).abs() > 1e-6).float().mean()
    assert 0.03 < share < 0.07
    assert ((mixed - w).abs() <= plain.learned_range() / plain.steps[0] * 0.501)[w.abs() < plain.learned_range() / 4].all()


def test_groups_are_noisy_at_the_same_places() -> None:
    w, quantizer = weight(3, 50), nice(weight(3, 50), 2, 4)
    quantizer.stage = "noisy"
    p, picks, groups = torch.tensor([0.3, 0.7]), [0, 1], [0, 1]
    both = quantizer(w, p, picks, groups)
    quantized = quantizer.eval()(w, p, picks, groups)
    first, second = (((both - quantized).abs() > 1e-6)[:, i : i + 50] for i in (0, 50))
    assert both.shape == (3, 100) and first.any() and torch.equal(first, second)


@pytest.mark.parametrize("joint", [False, True])
def test_layer_uses_the_noisy_weight_in_both_passes(joint: bool) -> None:
    space = SearchSpace((2, 4), (32,), weight_quantizer="nice", granularity="filter", joint=joint)
    layer = MixedConv2d(8, 6, 3, bias=False, space=space)
    layer.weight_quantizer.stage = "noisy"
    x = torch.randn(2, 8, 7, 7, requires_grad=True)
    used = layer.weight_quantizer(layer.weight, layer.weight_gate()).detach()
    assert not torch.equal(used, layer.weight_quantizer.eval()(layer.weight, layer.weight_gate()))
    layer.weight_quantizer.train()
    y = layer(x)
    torch.testing.assert_close(y, F.conv2d(x, used))
    g = torch.randn_like(y)
    y.backward(g)
    torch.testing.assert_close(x.grad, torch.nn.grad.conv2d_input(x.shape, used, g))
    torch.testing.assert_close(layer.weight.grad, torch.nn.grad.conv2d_weight(x.detach(), used.shape, g))


def test_depthwise_layer_is_noisy_too() -> None:
    layer = MixedConv2d(16, 16, 3, groups=16, bias=False, space=SearchSpace((2,), (4,), weight_quantizer="nice"))
    layer.weight_quantizer.stage = "noisy"
    x = torch.rand(2, 16, 6, 6)
    layer(x)
    seen = layer.input_quantizer(x, ONE)
    torch.testing.assert_close(layer(x), F.conv2d(seen, layer.weight_quantizer(layer.weight, ONE), groups=16))


SPACES = {
    "factorised": SearchSpace((2, 3, 8), (4, 8), weight_quantizer="nice", granularity="filter"),
    "pairs": SearchSpace(pairs=((2, 4), (3, 4), (8, 8)), weight_quantizer="nice", granularity="filter"),
}


@pytest.mark.parametrize("stage", ["quantized", "noisy", "float"])
@pytest.mark.parametrize("name", SPACES)
def test_whole_network_at_once(name: str, stage: str) -> None:
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    model = prepare(resnet8(), SPACES[name], example_inputs=x)
    model(x)
    for module in model.modules():
        if isinstance(module, WeightQuantizer):
            assert module.log_range.shape == (1, len(module.bits))
            module.stage = stage
            module.renew(torch.Generator().manual_seed(4))
    found = []
    for together in (False, True):
        copied = copy.deepcopy(model)
        with Premix(copied) if together else torch.enable_grad():
            loss = copied(x).square().sum()
        loss.backward()
        found.append([loss, *(p.grad for p in copied.parameters())])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_conversion_keeps_the_clip() -> None:
    x = torch.rand(2, 3, 8, 8)
    model = prepare(resnet8(), SearchSpace.fixed(3, 8, weight_quantizer="nice"), example_inputs=x)
    model(x)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.3)
    record = record_of(model)
    assert record is not None and record.geometry is not None
    final = convert(model, Policy.uniform(record.geometry, 3, 8))
    clips = {name: module.log_range for name, module in model.named_modules() if isinstance(module, WeightQuantizer)}
    assert len(clips) == 10
    for name, log_range in clips.items():
        assert torch.equal(final.get_submodule(name).log_range, log_range)
    torch.testing.assert_close(final.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["nice", "uniq"])
def test_integer_codes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """NICE's codes are those of the symmetric grid; UNIQ has none, and stays on the float path."""
    calls, original = [], integer.quant_conv2d_int8
    monkeypatch.setattr(integer, "quant_conv2d_int8", lambda *args: (calls.append(1), original(*args))[1])
    layer = QuantConv2d(16, 8, 3, w_bits=(2, 3, 4, 8) * 2, a_bits=4, weight_quantizer=kind, placement="output")
    x = torch.rand(2, 16, 5, 5)
    layer.input_quantizer.calibrate(x)
    with torch.no_grad():
        want = layer.eval()(x)
        with integer.enabled():
            got = layer(x)
    assert len(calls) == (kind == "nice")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stage", ["quantized", "noisy", "float"])
@pytest.mark.parametrize("kind", ["nice", "uniq"])
def test_no_value_is_read_back(kind: str, stage: str) -> None:
    """Reading one would raise: these tensors have none."""
    with FakeTensorMode():
        quantizer = make_weight_quantizer(kind, (2, 4, 32), 4)
        w, p = torch.randn(4, 3, 3, 3), torch.randn(4, 3)
        quantizer.start(w)
        quantizer.stage = stage
        assert quantizer(w, p).shape == w.shape

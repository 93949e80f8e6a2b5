"""Mixed and fixed layers: their values and gradients against the sum over branches."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from qprune.gates import set_gates
from qprune.nn import MixedActivation, MixedConv2d, MixedLinear, QuantConv2d, QuantLinear
from qprune.space import SearchSpace

WIDE = SearchSpace((0, 1, 2, 4, 8, 32), (2, 4, 8, 32), granularity="filter")
PAIRS = SearchSpace(pairs=((2, 2), (4, 2), (8, 8), (0, 8), (32, 32)), granularity="filter")
CONVS: dict[str, tuple[int, int, Any, dict[str, Any]]] = {
    "plain": (3, 5, 3, {}),
    "no-bias": (3, 5, 3, {"bias": False}),
    "strided": (3, 5, 3, {"stride": (2, 1), "padding": (1, 2)}),
    "same": (3, 4, 3, {"padding": "same"}),
    "same-dilated": (3, 4, (3, 5), {"padding": "same", "dilation": 2}),
    "valid": (3, 4, (3, 1), {"padding": "valid"}),
    "dilated": (3, 4, 3, {"dilation": (1, 2), "padding": 2}),
    "pointwise": (6, 4, 1, {}),
    "groups": (6, 4, 3, {"groups": 2, "padding": 1}),
    "depthwise": (4, 4, 3, {"groups": 4, "padding": 1}),
    "multiplier": (3, 6, 3, {"groups": 3}),
    "reflect": (3, 4, 3, {"padding": (1, 2), "padding_mode": "reflect"}),
    "replicate": (3, 4, 3, {"padding": 1, "padding_mode": "replicate"}),
    "circular-same": (4, 4, 3, {"padding": "same", "padding_mode": "circular", "groups": 2}),
}
SPACES = {
    "layer": SearchSpace((2, 4, 8), (2, 4, 8)),
    "filter": WIDE,
    "joint-layer": SearchSpace((2, 8), (4, 8), joint=True),
    "joint-filter": SearchSpace((0, 2, 4), (2, 8, 32), joint=True, granularity="filter"),
    "pairs": PAIRS,
    "symmetric": SearchSpace((2, 3, 8), (3, 8), weight_quantizer="symmetric", scales="layer"),
    "dorefa": SearchSpace((1, 2, 5), (1, 6), weight_quantizer="dorefa", granularity="filter"),
    "lsq+": SearchSpace((1, 4), (2, 8), input_quantizer="lsq+", scales="layer"),
    "lsq+-joint": SearchSpace((2, 4), (1, 4), input_quantizer="lsq+", joint=True),
    "one-candidate": SearchSpace.fixed(4, 8),
    "pruned": SearchSpace.fixed(0, 0),
    "float": SearchSpace.fixed(32, 32),
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tensors this small are not worth waking other threads for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def quantize(x: Tensor, beta: Tensor | float, r: Tensor, n: float, z: float) -> Tensor:
    """The candidate's definition, with rounding straight through; autograd does the rest."""
    scaled = ((x - beta) / r + z / n).clamp(0, 1) * n
    return beta + (scaled + (scaled.round() - scaled).detach() - z) * (r / n)


def expected(layer: Any, x: Tensor, leaf: dict[str, Tensor]) -> Tensor:
    """Σ p[f, w, a] · layer(A_a(x), Q_w(W[f])) + bias[f], branch by branch in float64, from the layer's own parameters."""
    space, weight = layer.space, leaf["weight"]
    shape = [-1] + [1] * (weight.dim() - 1)
    ranges = {side: leaf[f"{side}_quantizer.log_range"].float().exp().double() for side in ("weight", "input")}
    if isinstance(layer, nn.Conv2d):
        settings = {k: getattr(layer, k) for k in ("stride", "padding", "dilation", "groups", "padding_mode")}
        plain: nn.Module = nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size, bias=False, dtype=torch.float64, **settings)
    else:
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False, dtype=torch.float64)

    def weights(k: int, bits: int) -> Tensor:
        if bits in (0, 32):
            return weight if bits else 0 * weight
        if bits == 1:
            dims = tuple(range(1, weight.dim())) if space.scales == "filter" else tuple(range(weight.dim()))
            sign = weight.detach().sign() * weight.detach().abs().mean(dims, keepdim=True)
            return sign + weight - weight.detach()
        n = 2 * (2 ** (bits - 1) - 1) if space.weight_quantizer == "symmetric" else 2**bits - 1
        z = 2 ** (bits - 1) if space.weight_quantizer == "lsq" else n / 2
        return quantize(weight, 0.0, ranges["weight"][:, k].reshape(shape), n, z)

    def inputs(k: int, bits: int) -> Tensor:
        if bits in (0, 32):
            return x if bits else 0 * x
        r, n = ranges["input"][0, k], 2**bits - 1
        beta: Any = -r * (0.5 if bits == 1 else 2 ** (bits - 1) / n) if layer.input_quantizer.signed else 0.0
        return quantize(x, leaf["input_quantizer.offset"][0, k] if space.input_quantizer == "lsq+" else beta, r, n, 0)

    def coefficients(gate: str, count: int) -> Tensor:
        logits = leaf.get(f"{gate}.logits")
        return torch.ones(count, dtype=torch.float64) if logits is None else logits.float().softmax(-1).double()

    total: Any = 0.0
    if space.joint:
        p = coefficients("weight_gate", len(space.candidates))
        branches = [(p[..., i], space.w_bits.index(w), space.a_bits.index(a)) for i, (w, a) in enumerate(space.candidates)]
    else:
        p, q = coefficients("weight_gate", len(space.w_bits)), coefficients("input_gate", len(space.a_bits))
        branches = [(p[..., i] * q[j], i, j) for i in range(len(space.w_bits)) for j in range(len(space.a_bits))]
    spread = [-1, 1, 1] if isinstance(layer, nn.Conv2d) else [-1]
    for share, w, a in branches:
        branch = functional_call(plain, {"weight": weights(w, space.w_bits[w])}, (inputs(a, space.a_bits[a]),))
        total = total + share.reshape(spread) * branch
    return total if layer.bias is None else total + leaf["bias"].reshape(spread)


def ready(layer: Any, x: Tensor) -> Any:
    """The layer in float64, calibrated on x, with every other parameter moved off its start."""
    layer(x.to(layer.weight.dtype))
    with torch.no_grad():
        for name, value in layer.named_parameters():
            if name.endswith("logits"):
                value.normal_()
            elif "quantizer" in name:
                value.add_(0.1 * torch.randn_like(value))
    layer.zero_grad()
    return layer.double().eval()


def compare(layer: Any, x: Tensor) -> None:
    layer = ready(layer, x)
    x, own = x.double().requires_grad_(), x.double().requires_grad_()
    leaf = {
        name: value.detach().clone().requires_grad_(isinstance(value, nn.Parameter))
        for name, value in layer.state_dict(keep_vars=True).items()
        if value.is_floating_point()
    }
    want, got = expected(layer, x, leaf), layer(own)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    direction = torch.randn_like(want)
    want.backward(direction)
    got.backward(direction)
    torch.testing.assert_close(own.grad, x.grad, rtol=1e-5, atol=1e-6)
    for name, value in layer.named_parameters():
        wanted = torch.zeros_like(value) if leaf[name].grad is None else leaf[name].grad
        torch.testing.assert_close(value.grad, wanted, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
@pytest.mark.parametrize("space", SPACES)
def test_convolution_is_the_sum_over_branches(space: str, signed: bool) -> None:
    x = torch.randn(2, 4, 7, 6)
    layer = MixedConv2d(4, 6, 3, padding=1, groups=2, space=SPACES[space])
    compare(layer, x if signed else x.relu())
    assert bool(layer.input_quantizer.signed) == (signed and not set(layer.space.a_bits) <= {0, 32})


@pytest.mark.parametrize("space", [WIDE, PAIRS], ids=["factorised", "joint"])
@pytest.mark.parametrize("conv", CONVS)
def test_every_argument_of_conv2d(conv: str, space: SearchSpace) -> None:
    channels, filters, kernel, options = CONVS[conv]
    compare(MixedConv2d(channels, filters, kernel, space=space, **options), torch.randn(2, channels, 8, 9))


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 6), (6,)], ids=str)
def test_linear_is_the_sum_over_branches(space: str, shape: tuple[int, ...]) -> None:
    compare(MixedLinear(6, 4, space=SPACES[space], bias=len(shape) != 3), torch.randn(shape))


@pytest.mark.parametrize("space", ["filter", "joint-filter"])
def test_float32_agrees_with_float64(space: str) -> None:
    layer, x = MixedConv2d(16, 8, 3, space=SPACES[space]), torch.randn(2, 16, 9, 9).relu()
    layer(x)
    error = (layer(x) - copy.deepcopy(layer).double()(x.double())).abs()
    assert error.mean() < 1e-4 and error.max() < 0.05, "rounding, and at most a step of a code that lies on a boundary"


@pytest.mark.parametrize("channels", [None, 3], ids=["tensor", "channel"])
@pytest.mark.parametrize("kind", ["pact", "lsq+"])
def test_activation(channels: int | None, kind: str) -> None:
    layer, x = MixedActivation((0, 2, 4, 32), channels, kind), torch.randn(2, 3, 5, 5)
    layer(x)
    layer.gate.logits.data.normal_()
    r, p = layer.quantizer.log_range.exp()[0], layer.gate.logits.softmax(-1).expand(3, 4)
    beta = layer.quantizer.offset[0] if kind == "lsq+" else [0, -r[1] * 2 / 3, -r[2] * 8 / 15]
    branches = [0 * x, quantize(x, beta[1], r[1], 3, 0), quantize(x, beta[2], r[2], 15, 0), x]
    want = sum(p[:, k].reshape(3, 1, 1) * branch for k, branch in enumerate(branches))
    torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("w_bits", [4, (0, 2, 8, 2), (32, 32, 1, 0)], ids=str)
@pytest.mark.parametrize("a_bits", [2, 32])
@pytest.mark.parametrize("linear", [False, True], ids=["conv", "linear"])
def test_fixed_layer_is_the_mixed_one_with_its_choice(w_bits: Any, a_bits: int, linear: bool) -> None:
    space = SearchSpace((0, 1, 2, 4, 8, 32), (2, 8, 32), granularity="filter")
    fixed: Any = QuantLinear(6, 4, w_bits=w_bits, a_bits=a_bits) if linear else QuantConv2d(3, 4, 3, w_bits=w_bits, a_bits=a_bits)
    mixed: Any = MixedLinear(6, 4, space=space) if linear else MixedConv2d(3, 4, 3, space=space)
    mixed.load_state_dict({"weight": fixed.weight, "bias": fixed.bias}, strict=True)
    set_gates(mixed, "fixed")
    per_filter = (w_bits,) * 4 if isinstance(w_bits, int) else w_bits
    mixed.weight_gate.choice.copy_(torch.tensor([space.w_bits.index(b) for b in per_filter]))
    mixed.input_gate.choice.fill_(space.a_bits.index(a_bits))
    x = torch.randn(5, 6) if linear else torch.randn(2, 3, 6, 6)
    y = fixed(x)
    assert torch.equal(mixed(x), y) and fixed.w_bits == per_filter
    bias = fixed.bias.reshape([-1] if linear else [-1, 1, 1])
    pruned = [f for f, b in enumerate(per_filter) if b == 0]
    assert torch.equal(y[:, pruned], bias[pruned].expand_as(y[:, pruned]))

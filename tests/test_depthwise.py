"""The depthwise mixed convolution: its definition against plain autograd, and the Triton kernels against the definition in float64.

Inputs are drawn so that no û·n lies near a rounding boundary and no û near a clip edge. Every backend then picks the same codes, and the
tolerances are those of float32 sums: nothing is set aside for flipped codes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from interpreter import DEVICE, GPU, interpret  # noqa: F401
from torch import Tensor

from qprune.kernels import IDENTITY, QPruneError, backend, launch
from qprune.kernels.depthwise_ops import mixed_depthwise

pytestmark = pytest.mark.gpu

Grid = tuple[list[float], list[float], list[int]]

SHARED: Grid = ([3.0, 15.0, 255.0], [0.0, 0.0, 0.0], [0, 0, 0])
JOINT: Grid = ([3.0, 7.0, 255.0], [0.0, 0.0, 0.0], [0, 1, 2])
SPECIAL: Grid = ([0.0, 7.0, IDENTITY], [0.0, 0.0, 0.0], [0, 0, 0])
WEIGHTS: Grid = ([0.0, 3.0, 15.0, IDENTITY], [0.0, 2.0, 7.5, 0.0], [0, 0, 0, 0])
WEIGHTS_JOINT: Grid = ([3.0, 15.0, 3.0, 7.0, 15.0], [2.0, 8.0, 2.0, 4.0, 8.0], [0, 0, 1, 2, 1])
MIXED: Grid = ([IDENTITY], [0.0], [0])
MIXED_JOINT: Grid = ([IDENTITY] * 3, [0.0] * 3, [0, 1, 2])


@dataclass(frozen=True)
class Case:
    name: str
    shape: tuple[int, ...] = (2, 5, 7, 6)
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    activations: Grid = SHARED
    weights: Grid = WEIGHTS
    signed: bool = False
    rows: bool = True
    layout: str = "channels_last"
    dtype: torch.dtype = torch.float32
    w_dtype: torch.dtype = torch.float32

    @property
    def window(self) -> tuple[list[int], list[int], list[int]]:
        return list(self.stride), list(self.padding), list(self.dilation)


CASES = [
    Case("3x3"),
    Case("3x3-stride-2", (2, 16, 8, 8), stride=(2, 2)),
    Case("3x3-stride-2-odd", (1, 8, 7, 9), stride=(2, 2), signed=True),
    Case("3x3-contiguous", (2, 6, 8, 7), layout="contiguous", signed=True),
    Case("3x3-stride-2-contiguous", (2, 3, 7, 8), stride=(2, 2), layout="contiguous"),
    Case("sliced", (4, 6, 6, 5), layout="sliced"),
    Case("no-padding", padding=(0, 0), signed=True),
    Case("padding-3", padding=(3, 3), signed=True),
    Case("dilation-2", (1, 9, 8, 7), padding=(2, 2), dilation=(2, 2)),
    Case("dilation-2-stride-3", (1, 4, 9, 8), stride=(3, 3), padding=(0, 0), dilation=(2, 2)),
    Case("unequal", (2, 4, 7, 9), kernel=(1, 5), stride=(1, 2), padding=(0, 3), dilation=(1, 2), signed=True),
    Case("even-kernel", kernel=(2, 2), stride=(2, 2)),
    Case("1x1", kernel=(1, 1), padding=(0, 0)),
    Case("1x1-stride-2", kernel=(1, 1), stride=(2, 2), padding=(0, 0)),
    Case("5x5", (2, 8, 7, 7), kernel=(5, 5), padding=(2, 2), signed=True),
    Case("5x5-stride-2", (1, 8, 9, 8), kernel=(5, 5), stride=(2, 2), padding=(2, 2)),
    Case("7x7", (1, 7, 8, 6), kernel=(7, 7), padding=(3, 3), activations=MIXED),
    Case("7x7-joint", (1, 4, 7, 5), kernel=(7, 7), padding=(3, 3), activations=JOINT, weights=MIXED_JOINT),
    Case("joint", (2, 8, 6, 6), activations=JOINT, weights=WEIGHTS_JOINT, signed=True),
    Case("joint-stride-2-mixed", (1, 8, 8, 6), stride=(2, 2), activations=JOINT, weights=MIXED_JOINT),
    Case("mixed-weight", weights=MIXED),
    Case("one-row-of-weight-candidates", rows=False),
    Case("mixed-joint-one-row", activations=JOINT, weights=MIXED_JOINT, rows=False),
    Case("special", activations=SPECIAL),
    Case("fp16", (2, 8, 6, 6), dtype=torch.float16, w_dtype=torch.float16, signed=True),
    Case("bf16", (2, 16, 6, 6), dtype=torch.bfloat16),
    Case("bf16-joint", (1, 16, 6, 6), activations=JOINT, weights=WEIGHTS_JOINT, dtype=torch.bfloat16, w_dtype=torch.bfloat16),
]
NAMES = ("y", "x", "weight", "a_offset", "a_range", "a_p", "w_offset", "w_range", "w_p")


def _settled(x: Tensor, offset: Tensor, range: Tensor, grid: Grid, generator: torch.Generator) -> Tensor:
    """x with every value replaced whose code is in doubt for some candidate. offset and range [K], or [C, K] for x [C, …]."""
    while True:
        doubt = torch.zeros(x.shape, dtype=torch.bool)
        for k, (n, z) in enumerate(zip(*grid[:2], strict=True)):
            if n > 0:
                beta, r = (t.double()[..., k].reshape(-1, 1, 1, 1) for t in (offset, range))
                v = ((x.double() - beta) / r + z / n) * n
                doubt |= ((v - v.floor() - 0.5).abs() < 1e-3) | (v.abs() < 1e-3) | ((v - n).abs() < 1e-3)
        if not doubt.any():
            return x
        x = torch.where(doubt, torch.randn(x.shape, generator=generator).to(x.dtype), x)


@dataclass
class Problem:
    case: Case
    tensors: tuple[Tensor, ...]

    def call(self, tensors: Any) -> Tensor:
        x, weight, *small = tensors
        (a_steps, a_zero, a_groups), (w_steps, w_zero, w_groups) = self.case.activations, self.case.weights
        through = [k % 2 for k, _ in enumerate(w_steps)]
        return mixed_depthwise(
            x, weight, *small[:3], a_steps, a_zero, a_groups, *small[3:], w_steps, w_zero, w_groups, through, *self.case.window
        )

    def run(self, name: str | None, device: str = "cpu", double: bool = False) -> dict[str, Tensor]:
        leaves = [
            (t.double() if double else t.clone(memory_format=torch.preserve_format)).to(device).requires_grad_() for t in self.tensors
        ]
        if self.case.layout == "sliced" and not double:
            whole = leaves[0].detach().repeat_interleave(2, 0)
            leaves[0] = whole[::2].requires_grad_()
        with backend(name):
            y = self.call(leaves)
            grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(self.case.dtype)
            y.backward(grad.to(device, y.dtype))
        return {k: v.detach().cpu() for k, v in zip(NAMES, (y, *(leaf.grad for leaf in leaves)), strict=True)}


def problem(case: Case) -> Problem:
    g = torch.Generator().manual_seed(0)
    channels, ka, kw = case.shape[1], len(case.activations[0]), len(case.weights[0])
    rows = (channels if case.rows else 1, kw)
    a_offset = (torch.rand(ka, generator=g) * -0.5 - 0.5) * case.signed
    a_range, a_p = torch.rand(ka, generator=g) + 1.0, torch.rand(ka, generator=g)
    w_offset, w_range, w_p = torch.randn(rows, generator=g) * 0.1, torch.rand(rows, generator=g) * 2 + 1, torch.rand(rows, generator=g)
    slices = 3 if case.weights is MIXED_JOINT else 1
    weight = torch.randn(channels, slices, *case.kernel, generator=g).to(case.w_dtype)
    x = _settled(torch.randn(case.shape, generator=g).to(case.dtype), a_offset, a_range, case.activations, g)
    if case.layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    weight = _settled(weight, w_offset, w_range, case.weights, g)
    return Problem(case, (x, weight, a_offset, a_range, a_p, w_offset, w_range, w_p))


def assert_close(case: Case, got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """`want` is in float64. Tensors in 16 bits may be two steps off: the interpreter cuts bfloat16 off instead of rounding it."""
    ulp = {torch.float32: 1e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
    for name in NAMES:
        a, b = got[name], want[name]
        assert a.shape == b.shape, f"{name}: {tuple(a.shape)} instead of {tuple(b.shape)}"
        step = ulp[a.dtype]
        sums = 4e-6 if name in ("y", "x") else 2e-5
        limit = 2 * step * b.abs() + sums * b.abs().max()
        error = (a.double() - b).abs()
        assert (error <= limit).all(), f"{name}: off by {error.max():.3g} where {b.abs().max():.3g} is the largest value"


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every new tensor is NaN until something writes it."""
    original = torch.empty

    def empty(*args: Any, **kwargs: Any) -> Tensor:
        out = original(*args, **kwargs)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", empty)
    yield


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_kernels_agree_with_the_definition(case: Case) -> None:
    p = problem(case)
    got = p.run("triton", DEVICE)
    assert got["y"].dtype == got["x"].dtype == case.dtype
    assert_close(case, got, p.run("reference", double=True))


@pytest.mark.parametrize("name", ["reference", None])
@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[18], CASES[19], CASES[-2], CASES[-1]], ids=lambda c: c.name)
def test_fallbacks_agree_with_the_definition(case: Case, name: str | None) -> None:
    p = problem(case)
    assert_close(case, p.run(name), p.run("reference", double=True))


def _fake_quantized(x: Tensor, offset: Tensor, range: Tensor, n: float, z: float) -> Tensor:
    """Straight-through rounding by autograd alone."""
    if n <= 0:
        return x * (n == IDENTITY)
    v = ((x - offset) / range + z / n).clamp(0, 1) * n
    return offset + (v + (v.round() - v).detach() - z) * (range / n)


@pytest.mark.parametrize("case", [replace(CASES[2], weights=WEIGHTS_JOINT, activations=JOINT), CASES[0]], ids=["joint", "shared"])
def test_definition_is_the_sum_over_all_pairs(case: Case) -> None:
    p = problem(case)
    (a_steps, a_zero, a_groups), (w_steps, w_zero, w_groups) = case.activations, case.weights
    x, weight, ao, ar, ap, wo, wr, wp = leaves = [t.double().requires_grad_() for t in p.tensors]
    y: Any = 0
    for i, (n, z) in enumerate(zip(a_steps, a_zero, strict=True)):
        a = ap[i] * _fake_quantized(x, ao[i], ar[i], n, z)
        for k, (nw, zw) in enumerate(zip(w_steps, w_zero, strict=True)):
            if a_groups[i] == w_groups[k]:
                beta, r, share = (t[:, k].reshape(-1, 1, 1, 1) for t in (wo, wr, wp))
                q = _fake_quantized(weight, beta, r, nw, zw)
                y = y + torch.nn.functional.conv2d(a, share * q, None, *case.window, x.size(1))
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).double())
    want = {k: v.detach() for k, v in zip(NAMES, (y, *(leaf.grad for leaf in leaves)), strict=True)}
    got = p.run("reference", double=True)
    for name in NAMES:
        if name != "weight":  # half of the weight's candidates pass gradients through the clip
            torch.testing.assert_close(got[name], want[name])
    inside = weight.abs() < 0.3
    assert inside.any()
    torch.testing.assert_close(got["weight"][inside], want["weight"][inside])


PINS = {
    "3x3": {"strip_width": 4, "strip_rows": 4, "block_strips": 4, "strip_channels": 8},
    "3x3-stride-2": {"strip_width": 4, "strip_rows": 3, "block_strips": 8},
    "3x3-contiguous": {"strip_width": 3, "strip_rows": 5, "strip_channels": 4, "strip_warps": 1},
    "5x5": {"strip_width": 1, "strip_rows": 4, "strip_taps": 15},
    "joint": {"strip_rows": 4, "strip_taps": 14},
}


@pytest.mark.parametrize("name", PINS)
def test_launch_parameters_do_not_change_results(name: str) -> None:
    p = problem(next(c for c in CASES if c.name == name))
    want = p.run("triton", DEVICE)
    with launch.pinned(**PINS[name]):
        got = p.run("triton", DEVICE)
    for key in NAMES:
        exact = key in ("y", "x") and not GPU
        torch.testing.assert_close(got[key], want[key], rtol=0 if exact else 1e-5, atol=0 if exact else 2e-5)


@pytest.mark.parametrize("name", ["triton", "reference"])
def test_same_bits_every_time(name: str) -> None:
    p = problem(Case("bits", (2, 4, 5, 4), weights=MIXED))
    with launch.pinned(strip_rows=3, block_strips=4):
        first, second = (p.run(name, DEVICE if name == "triton" else "cpu") for _ in range(2))
    for key in NAMES:
        assert torch.equal(first[key], second[key]), key


@pytest.mark.parametrize("activations", [SHARED, SPECIAL, ([0.0], [0.0], [0])], ids=["shared", "special", "pruned"])
def test_nan_shows_wherever_it_is_read(activations: Grid) -> None:
    p = problem(Case("nan", (2, 5, 9, 8), activations=activations))
    p.tensors[0][1, 2, 4, 3] = math.nan
    p.tensors[0][0, 1, 4, 4] = math.inf if activations is SHARED else 1.0
    got, want = p.run("triton", DEVICE), p.run("reference")
    for key in NAMES:
        assert torch.equal(got[key].isnan(), want[key].isnan()), key
        torch.testing.assert_close(got[key].nan_to_num(), want[key].nan_to_num(), rtol=1e-5, atol=2e-5)
    assert got["y"].isnan().sum() == 9
    assert got["x"].isnan().sum() == 1


@pytest.mark.parametrize("name", ["triton", "reference"])
def test_empty_batch(name: str) -> None:
    p = problem(Case("empty", (0, 4, 5, 5)))
    found = p.run(name, DEVICE if name == "triton" else "cpu")
    assert found["y"].shape == (0, 4, 5, 5)
    assert found["x"].shape == (0, 4, 5, 5)
    assert all((found[key] == 0).all() for key in NAMES[2:])


@pytest.mark.parametrize("name", ["triton", "reference"])
def test_memory_formats(name: str) -> None:
    for layout in ("channels_last", "contiguous"):
        p = problem(Case("format", (2, 4, 5, 6), stride=(2, 2), layout=layout))
        found = p.run(name, DEVICE if name == "triton" else "cpu")
        for key in ("y", "x"):
            assert found[key].is_contiguous(memory_format=getattr(torch, layout.replace("contiguous", "contiguous_format"))), key


@pytest.mark.parametrize("name", ["triton", "reference"])
def test_gradient_of_any_layout(name: str) -> None:
    p = problem(CASES[0])
    device = DEVICE if name == "triton" else "cpu"
    found = []
    for change in (lambda g: g.expand(2, 5, 7, 6), lambda g: g.expand(2, 5, 7, 6).contiguous()):
        leaves = [t.clone(memory_format=torch.preserve_format).to(device).requires_grad_() for t in p.tensors]
        with backend(name):
            p.call(leaves).backward(change(torch.ones((), device=device)))
        found.append([leaf.grad for leaf in leaves])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_autocast_gives_its_dtype() -> None:
    p = problem(CASES[1])
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got = p.run("triton", DEVICE)
    assert got["y"].dtype == torch.bfloat16
    assert got["x"].dtype == torch.float32
    torch.testing.assert_close(got["y"].float(), p.run("reference")["y"], rtol=1.6e-2, atol=1e-6)


def _arguments(case: Case, grad: bool) -> tuple[Any, ...]:
    p = problem(case)
    x, weight, *small = (t.requires_grad_(grad) for t in p.tensors)
    activations, weights = case.activations, case.weights
    return (x, weight, *small[:3], *activations, *small[3:], *weights, [0] * len(weights[0]), *case.window)


@pytest.mark.parametrize("case", [CASES[1], CASES[5], CASES[19], CASES[-1]], ids=lambda c: c.name)
def test_opcheck(case: Case) -> None:
    with backend("reference"):
        torch.library.opcheck(torch.ops.qprune.mixed_depthwise, (*_arguments(case, True), case.dtype))
        arguments = _arguments(case, False)
        grad = torch.randn_like(mixed_depthwise(*arguments))
        torch.library.opcheck(
            torch.ops.qprune.mixed_depthwise_backward,
            (grad, *arguments, True),
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static"),
        )


@pytest.mark.parametrize("case", [CASES[1], CASES[4]], ids=lambda c: c.name)
def test_fakes_have_the_strides_of_the_kernels(case: Case) -> None:
    arguments = tuple(t.to(DEVICE) if isinstance(t, Tensor) else t for t in _arguments(case, False))
    with backend("triton"):
        torch.library.opcheck(torch.ops.qprune.mixed_depthwise, (*arguments, case.dtype), test_utils=("test_schema", "test_faketensor"))
        grad = torch.randn_like(mixed_depthwise(*arguments))
        torch.library.opcheck(
            torch.ops.qprune.mixed_depthwise_backward, (grad, *arguments, True), test_utils=("test_schema", "test_faketensor")
        )


def test_compile_without_graph_breaks() -> None:
    p = problem(CASES[18])
    torch._dynamo.reset()
    results = []
    for function in (p.call, torch.compile(p.call, backend="aot_eager", fullgraph=True)):
        leaves = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in p.tensors]
        y = function(leaves)
        y.square().sum().backward()
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for a, b in zip(*results, strict=True):
        assert a.stride() == b.stride()
        assert torch.equal(a, b)


def test_keeps_its_arguments_and_nothing_else() -> None:
    p = problem(CASES[0])
    leaves = [t.requires_grad_() for t in p.tensors]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        p.call(leaves)
    assert {t.data_ptr() for t in kept} <= {t.data_ptr() for t in leaves}


def test_second_derivatives_are_refused() -> None:
    p = problem(CASES[0])
    leaves = [t.requires_grad_() for t in p.tensors]
    (dx,) = torch.autograd.grad(p.call(leaves).square().sum(), leaves[0], create_graph=True)
    with pytest.raises(QPruneError, match="no second derivatives"):
        dx.sum().backward()

"""Convolution on integer codes against the reference and against the layer's float path: on the GPU where there is one, else interpreted.

Inputs keep away from rounding boundaries, so that every machine picks the same codes, and the sums of codes are exact; what remains are
the roundings of the scales and of the output. The interpreter cuts float32 off when it stores bfloat16 (one step, 2⁻⁷ relative, allowed).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from interpreter import DEVICE, interpret  # noqa: F401
from torch import Tensor

from qprune.grids import weight_grid
from qprune.kernels import InputError, QPruneError, backend, int8_ops, launch, launch_int8, reference, reference_int8
from qprune.kernels.launch_int8 import Shape

pytestmark = pytest.mark.gpu

LSQ, SYMMETRIC, DOREFA = "lsq", "symmetric", "dorefa"


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    original = int8_ops.empty_output

    def poisoned(*args: Any) -> Tensor:
        out = original(*args)
        return out if isinstance(out, torch._subclasses.FakeTensor) else out.fill_(torch.nan)

    monkeypatch.setattr(int8_ops, "empty_output", poisoned)
    yield


@dataclass(frozen=True)
class Case:
    """A convolution: sizes, bits of input and weights (in turn over the filters), and what the tensors are like."""

    name: str
    shape: Shape
    a_bits: int = 8
    signed: bool = False
    w_bits: tuple[int, ...] = (2, 3, 4, 8, 0, 5, 6, 7)
    kind: str = LSQ
    bias: bool = True
    layout: str = "channels_last"
    dtype: torch.dtype = torch.float32
    out: torch.dtype | None = None


CASES = [
    Case("1x1", Shape(2, 32, 7, 9, 40, (1, 1))),
    Case("1x1-signed", Shape(2, 32, 7, 9, 40, (1, 1)), signed=True, bias=False),
    Case("1x1-4-bit", Shape(2, 64, 7, 9, 24, (1, 1)), a_bits=4),
    Case("1x1-odd-channels", Shape(2, 17, 5, 6, 19, (1, 1)), a_bits=3, signed=True),
    Case("1x1-stride", Shape(2, 32, 9, 7, 16, (1, 1), (2, 2))),
    Case("1x1-padded", Shape(2, 16, 5, 5, 8, (1, 1), (1, 1), (1, 1))),
    Case("1x1-contiguous", Shape(2, 32, 7, 9, 40, (1, 1)), layout="contiguous"),
    Case("1x1-one-position", Shape(3, 33, 1, 1, 10, (1, 1)), layout="contiguous"),
    Case("1x1-groups", Shape(2, 24, 6, 6, 20, (1, 1), groups=2)),
    Case("1x1-many-filters", Shape(1, 16, 6, 6, 150, (1, 1))),
    Case("3x3-many-filters", Shape(1, 16, 6, 6, 200, (3, 3), padding=(1, 1), groups=2), layout="contiguous"),
    Case("1x1-bf16", Shape(2, 32, 7, 9, 40, (1, 1)), a_bits=5, dtype=torch.bfloat16),
    Case("1x1-fp16", Shape(2, 32, 7, 9, 40, (1, 1)), dtype=torch.float16, out=torch.float32),
    Case("3x3", Shape(2, 16, 8, 9, 20, (3, 3), padding=(1, 1))),
    Case("3x3-signed", Shape(2, 16, 8, 9, 20, (3, 3), padding=(1, 1)), signed=True),
    Case("3x3-signed-2-bit", Shape(2, 16, 8, 9, 20, (3, 3), padding=(1, 1)), a_bits=2, signed=True),
    Case("3x3-7-bit", Shape(1, 16, 8, 9, 20, (3, 3), padding=(1, 1)), a_bits=7),
    Case("3x3-1-bit", Shape(1, 16, 8, 9, 20, (3, 3), padding=(1, 1)), a_bits=1, w_bits=(1, 2)),
    Case("3x3-three-channels", Shape(1, 3, 11, 9, 20, (3, 3), (2, 2), (1, 1)), signed=True),
    Case("3x3-no-padding", Shape(2, 48, 6, 7, 17, (3, 3), (2, 1))),
    Case("3x3-dilated", Shape(1, 16, 12, 11, 8, (3, 3), (1, 2), (2, 3), (2, 3))),
    Case("3x3-groups", Shape(2, 32, 7, 6, 12, (3, 3), padding=(1, 1), groups=2)),
    Case("3x3-many-groups", Shape(1, 12, 6, 6, 8, (3, 3), padding=(1, 1), groups=4), signed=True),
    Case("3x3-contiguous", Shape(2, 16, 8, 8, 20, (3, 3), padding=(1, 1)), layout="contiguous"),
    Case("3x3-sliced", Shape(2, 16, 8, 8, 20, (3, 3), padding=(1, 1)), layout="sliced", signed=True),
    Case("3x3-symmetric", Shape(1, 16, 8, 8, 20, (3, 3), padding=(1, 1)), kind=SYMMETRIC),
    Case("3x3-dorefa", Shape(1, 16, 8, 8, 20, (3, 3), padding=(1, 1)), kind=DOREFA, w_bits=(1, 2, 4, 7, 0)),
    Case("3x3-bf16", Shape(2, 16, 8, 8, 20, (3, 3), padding=(1, 1)), a_bits=4, dtype=torch.bfloat16),
    Case("3x3-fp16-to-bf16", Shape(2, 16, 8, 8, 20, (3, 3), padding=(1, 1)), dtype=torch.float16, out=torch.bfloat16),
    Case("5x5", Shape(1, 24, 9, 8, 10, (5, 5), padding=(2, 2))),
    Case("7x7-stride", Shape(2, 3, 17, 15, 16, (7, 7), (2, 2), (3, 3))),
    Case("3x1", Shape(2, 17, 8, 7, 9, (3, 1), padding=(1, 0)), signed=True),
    Case("1x5", Shape(1, 16, 5, 12, 9, (1, 5), (1, 2), (0, 2))),
]
PARAMS = [pytest.param(case, id=case.name) for case in CASES]


@dataclass
class Problem:
    case: Case
    x: Tensor
    weight: Tensor
    ranges: Tensor
    steps: Tensor
    zero_point: Tensor
    bias: Tensor | None
    offset: Tensor
    range: Tensor
    n: float

    def run(self, name: str, device: str = "cpu") -> Tensor:
        s = self.case.shape
        x, codes, total, scale, offset, range_ = (
            t.to(device) for t in (self.x, *reference_int8.weight_codes(*self.filters), self.offset, self.range)
        )
        bias = None if self.bias is None else self.bias.to(device)
        with backend(name):
            geometry = (s.stride, s.padding, s.dilation, s.groups)
            y = int8_ops.quant_conv2d_int8(x, codes, total, scale, bias, offset, range_, self.n, *geometry, self.case.out)
        return y.cpu()

    @property
    def filters(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.weight, self.ranges, self.steps, self.zero_point

    def quantized_weight(self) -> Tensor:
        """Q(W) by the definition of the float path: one candidate per distinct (n, z), p one-hot for each filter."""
        grids = sorted(set(zip(self.steps.tolist(), self.zero_point.tolist(), strict=True)))
        p = torch.tensor([[float(g == grid) for grid in grids] for g in zip(self.steps.tolist(), self.zero_point.tolist(), strict=True)])
        n, z = zip(*grids, strict=True)
        r = self.ranges.unsqueeze(1).expand_as(p)
        return reference.mix_quantize(self.weight, torch.zeros_like(p), r, p, n, z, 0, [0] * len(n), None)[0]

    def quantized_input(self) -> Tensor:
        one = torch.ones(1, 1)
        return reference.mix_quantize(self.x, self.offset.view(1, 1), self.range.view(1, 1), one, [self.n], [0], 1, [0], None)[0]


def problem(case: Case) -> Problem:
    g = torch.Generator().manual_seed(7)
    s = case.shape
    weight = torch.randn(s.filters, s.channels // s.groups, *s.kernel, generator=g)
    grids = [weight_grid(case.kind, case.w_bits[f % len(case.w_bits)]) for f in range(s.filters)]
    n = 2.0**case.a_bits - 1
    range_ = torch.tensor([2.75])
    offset = -range_ * (2 ** (case.a_bits - 1) / n) if case.signed else torch.zeros(1)
    x = torch.randn(s.batch, s.channels, s.height, s.width, generator=g).to(case.dtype)
    v = ((x.double() - offset.double()) / range_.double() * n).clamp(0, n)
    x = torch.where((v - v.floor() - 0.5).abs() < 1e-3, 0.0, x)
    if case.layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif case.layout == "sliced":
        x = F.pad(x, (1, 2, 3, 0), value=torch.inf)[:, :, 3:, 1:-2]
    return Problem(
        case, x, weight, torch.rand(s.filters, generator=g) * 2 + 2, *torch.tensor(grids).unbind(1),
        torch.randn(s.filters, generator=g) if case.bias else None, offset, range_, n,
    )  # fmt: skip


def assert_same(got: Tensor, want: Tensor) -> None:
    """Equal up to the rounding of the scales and the bias in float32, or of the output if it is of another type."""
    assert got.shape == want.shape
    assert got.stride() == want.stride()
    tolerance = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2**-7}[got.dtype]
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", PARAMS)
def test_agrees_with_the_reference(case: Case) -> None:
    p = problem(case)
    assert_same(p.run("triton", DEVICE), p.run("reference"))


@pytest.mark.parametrize("case", PARAMS)
def test_reference_is_the_convolution_of_quantized_tensors(case: Case) -> None:
    p, s = problem(case), case.shape
    got = p.run("reference")
    channels_last = case.layout == "channels_last"
    assert got.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    assert got.dtype == (case.out or case.dtype)
    x, w = p.quantized_input().double(), p.quantized_weight().double()
    bias = None if p.bias is None else p.bias.double()
    want = F.conv2d(x, w, bias, s.stride, s.padding, s.dilation, s.groups)
    assert tuple(want.shape[2:]) == s.out
    size = F.conv2d(x.abs(), w.abs(), None, s.stride, s.padding, s.dilation, s.groups)
    tolerance = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2**-7}[got.dtype]
    assert ((got.double() - want).abs() <= tolerance * (1 + size)).all()


@pytest.mark.parametrize(("kind", "bits"), [(LSQ, range(2, 9)), (SYMMETRIC, range(2, 9)), (DOREFA, range(1, 8))])
def test_weight_codes_are_the_codes_of_mix_quantize(kind: str, bits: range) -> None:
    for b in bits:
        p = problem(Case("codes", Shape(1, 8, 3, 3, 33, (3, 3)), w_bits=(b, 0), kind=kind))
        codes, total, scale = reference_int8.weight_codes(*p.filters)
        assert codes.dtype == torch.int8
        assert codes.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(scale.view(-1, 1, 1, 1) * codes, p.quantized_weight())
        assert torch.equal(total, codes.double().sum((1, 2, 3)).int())
        assert not codes[1::2].any()
        assert codes[::2].amax() > codes[::2].amin()


def test_a_weight_that_is_nan_is_seen() -> None:
    p = problem(next(c for c in CASES if c.name == "3x3"))
    p.weight[3, 5, 1, 1] = torch.nan
    assert p.run("reference").isnan().flatten(2).all(2).tolist() == [[f == 3 for f in range(20)]] * 2


def test_which_weight_grids_fit() -> None:
    assert all(reference_int8.fits(*weight_grid(kind, b)) for kind in (LSQ, SYMMETRIC) for b in range(9))
    assert [reference_int8.fits(*weight_grid(DOREFA, b)) for b in (1, 6, 7, 8)] == [True, True, True, False]
    assert not reference_int8.fits(255, 0)
    assert not reference_int8.fits(511, 256)
    assert not reference_int8.fits(reference.IDENTITY, 0)


@pytest.mark.parametrize("name", ["1x1", "1x1-many-filters", "3x3", "3x3-signed", "3x3-groups", "3x3-dilated"])
@pytest.mark.parametrize("pins", [
    {"block_m": 32, "block_n": 16, "block_k": 32},
    {"block_m": 64, "block_n": 32, "block_k": 64, "encode_rows": 2, "encode_width": 4, "encode_channels": 8},
    {"block_m": 128, "warps": 8, "inline": 0},
], ids=["small", "medium", "codes"])  # fmt: skip
def test_launch_parameters_do_not_change_results(name: str, pins: dict[str, int]) -> None:
    p = problem(next(c for c in CASES if c.name == name))
    want = p.run("triton", DEVICE)
    with launch.pinned(**pins):
        assert torch.equal(p.run("triton", DEVICE), want)


def test_sums_are_exact() -> None:
    """Sums beyond 2²⁴, where a float32 accumulator would round at every step, are rounded once."""
    s = Shape(1, 256, 6, 6, 8, (3, 3), padding=(1, 1))
    g = torch.Generator().manual_seed(1)
    x = torch.full((1, 256, 6, 6), 255.0).contiguous(memory_format=torch.channels_last)
    x[0, ::7] = torch.randint(0, 256, (37, 6, 6), generator=g).float()
    codes = torch.full((8, 256, 3, 3), 127, dtype=torch.int8)
    codes[:, ::5] = torch.randint(-128, 128, (8, 52, 3, 3), generator=g).to(torch.int8)
    exact = F.conv2d(x.double(), codes.double(), padding=1).long()
    assert exact.abs().max() > 2**25
    codes, x = codes.to(DEVICE), x.to(DEVICE)
    total, zero, one = codes.flatten(1).sum(1, dtype=torch.int32), torch.zeros(1, device=DEVICE), torch.ones(8, device=DEVICE)
    with backend("triton"):
        y = int8_ops.quant_conv2d_int8(x, codes, total, one, None, zero, zero + 255, 255, s.stride, s.padding)
    assert torch.equal(y.cpu(), exact.float())


@pytest.mark.parametrize("name", ["reference", "triton"])
@pytest.mark.parametrize("kernel", [1, 3])
def test_nan_stays_in_its_neighbourhood_and_infinity_saturates(name: str, kernel: int) -> None:
    p = problem(Case("special", Shape(1, 16, 9, 9, 8, (kernel, kernel), padding=(kernel // 2, kernel // 2))))
    clean = p.run(name, DEVICE if name == "triton" else "cpu")
    p.x[0, 3, 4, 4] = torch.nan
    got = p.run(name, DEVICE if name == "triton" else "cpu")
    near = torch.zeros(9, 9, dtype=torch.bool)
    near[4 - kernel // 2 : 5 + kernel // 2, 4 - kernel // 2 : 5 + kernel // 2] = True
    assert got.isfinite().all()
    assert torch.equal(got[..., ~near], clean[..., ~near])
    p.x[0, 3, 4, 4], p.x[0, 4, 4, 4] = torch.inf, -torch.inf
    got = p.run(name, DEVICE if name == "triton" else "cpu")
    p.x[0, 3, 4, 4], p.x[0, 4, 4, 4] = 100.0, -100.0
    assert torch.equal(got, p.run(name, DEVICE if name == "triton" else "cpu"))


@pytest.mark.parametrize("name", ["reference", "triton"])
def test_opcheck_and_compile(name: str) -> None:
    p = problem(next(c for c in CASES if c.name == "3x3"))
    arguments = tuple(
        t.to(DEVICE) if name == "triton" else t for t in (p.x, *reference_int8.weight_codes(*p.filters), p.bias, p.offset, p.range)
    )
    geometry = ([1, 1], [1, 1], [1, 1], 1, torch.float32)
    with backend(name):
        torch.library.opcheck(torch.ops.qprune.quant_conv2d_int8.default, (*arguments, p.n, *geometry))
        torch.library.opcheck(torch.ops.qprune.quant_conv2d_int8.default, (arguments[0].contiguous(), *arguments[1:], p.n, *geometry))

        def call(x: Tensor) -> Tensor:
            return int8_ops.quant_conv2d_int8(2 * x, *arguments[1:], p.n, padding=(1, 1)) + 1

        half = arguments[0] / 2
        assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(half), call(half))


def test_no_gradient() -> None:
    p = problem(next(c for c in CASES if c.name == "1x1"))
    p.x.requires_grad_()
    with pytest.raises(QPruneError, match="no gradient"):
        p.run("reference")
    with torch.no_grad():
        assert not p.run("reference").requires_grad


def test_limits() -> None:
    x, zero, one = torch.zeros(1, 1, 1, 1), torch.zeros(1), torch.ones(1)
    codes = torch.zeros(1, 1, 1, 1, dtype=torch.int8)
    with pytest.raises(InputError, match="1 to 255 steps"):
        int8_ops.quant_conv2d_int8(x, codes, zero.int(), one, None, zero, one, 511)
    with pytest.raises(InputError, match="at most 65536"):
        int8_ops.quant_conv2d_int8(x, codes.expand(1, 65537, 1, 1), zero.int(), one, None, zero, one, 255)
    with pytest.raises(InputError, match="do not match"):
        int8_ops.quant_conv2d_int8(x.expand(1, 2, 1, 1), codes, zero.int(), one, None, zero, one, 255)
    with pytest.raises(InputError, match="too small"):
        int8_ops.quant_conv2d_int8(x, codes.expand(1, 1, 3, 3), zero.int(), one, None, zero, one, 255, padding=(0, 1))
    with pytest.raises(InputError, match="split the batch"):
        int8_ops.quant_conv2d_int8(x.expand(2**11, 1, 2**10, 2**10), codes, zero.int(), one, None, zero, one, 255)


def test_empty_batch() -> None:
    p = problem(Case("empty", Shape(0, 16, 8, 8, 8, (3, 3), padding=(1, 1))))
    assert p.run("triton", DEVICE).shape == (0, 8, 8, 8)


@pytest.mark.parametrize("arch", [80, 90])
def test_blocks(arch: int) -> None:
    """Blocks fill the machine where the layer is large enough, and 1×1 layers with many filters read codes that are written once."""
    device = launch.Device(132, arch)

    def tile(filters: int, size: int = 56, kernel: int = 1, channels: int = 256) -> launch_int8.ProductTile:
        return launch_int8.product(Shape(64, channels, size, size, filters, (kernel, kernel)), True, 2, device)

    assert (tile(256).block_m, tile(256).block_n) == (128, 128)
    assert tile(32).block_n == 32
    assert [tile(f).inline for f in (64, 512, 1024)] == [1, 1, 0]
    assert tile(256, kernel=3).inline == 0
    assert tile(256, kernel=3).block_n == (256 if arch == 90 else 128)
    assert tile(256, kernel=3).block_k == 128
    assert [tile(64, kernel=3, channels=c).block_k for c in (16, 24, 32, 64, 128)] == [64, 32, 32, 64, 128]
    small = launch_int8.product(Shape(1, 512, 7, 7, 512, (3, 3)), True, 2, device)
    assert small.block_m * small.block_n <= 64 * 64

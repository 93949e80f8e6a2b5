"""The forward pass of the mixed convolution in Triton against the definition: on the GPU where there is one, else interpreted.

The bound of an error has a part for rounding, relative to Σ_m conv(|A_m(x)|, |V_m|), and one for codes: an input within a few ulp of a
rounding boundary may get the neighbouring code, which is worth d_m·|V_m| in every output that it reaches, and nothing elsewhere.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from conv_cases import CASES, PARAMS, Case, Problem, problem
from interpreter import DEVICE, GPU, interpret
from torch import Tensor

from qprune.kernels import IDENTITY, backend, conv, conv_common, conv_pack, launch, launch_conv, mixed_conv2d

__all__ = ["interpret"]
pytestmark = pytest.mark.gpu

BITS = {torch.float32: 19, torch.float16: 11, torch.bfloat16: 8 if GPU else 7}
"""Accuracy of an output relative to the sum of the sizes of its terms, 2^−BITS. The weights' rounding decides, the output's comes on top;
the interpreter cuts bfloat16 off."""


@pytest.fixture(autouse=True)
def _float32_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv, "precision", lambda dtype: "ieee")


def run(p: Problem, name: str, sampled: bool = False, double: bool = False, weight: Tensor | None = None) -> Tensor:
    """The output alone. weight: in the place of the problem's."""
    case = p.case
    weight = chosen(p, sampled) if weight is None else weight
    device = DEVICE if name == "triton" else "cpu"
    tensors = [t.to(device, torch.float64 if double else None) for t in (p.x, weight, p.offset, p.range)]
    choice = p.choice.to(device) if sampled else None
    with backend(name), torch.no_grad():
        y = mixed_conv2d(*tensors, *case.grid, choice, True, case.stride, case.padding, case.dilation, case.groups)
    return y.cpu()


def chosen(p: Problem, sampled: bool) -> Tensor:
    """The weight; with zeros in all groups but each filter's choice, if sampled."""
    if not sampled:
        return p.weight
    m = len(p.case.grid[0])
    keep = torch.nn.functional.one_hot(p.choice, m).to(p.weight.dtype).view(-1, m, 1, 1, 1)
    like = p.weight.unflatten(1, (m, -1)) * keep
    return like.flatten(1, 2)


def bounds(p: Problem, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_m conv(|A_m(x)|, |V_m|), and what codes that may differ by one are worth; float64.

    |A_m| counts its two terms and the padding, which are added up and taken off again.
    """
    case = p.case
    x = p.x.double()
    (ph, pw), geometry = case.padding, (case.dilation, case.groups)
    padded = torch.nn.functional.pad(x, (pw, pw, ph, ph))
    size, slack = torch.zeros(()), torch.zeros(())
    for m, (n, z, v) in enumerate(zip(*case.grid, weight.double().abs().chunk(len(case.grid[0]), 1), strict=True)):
        if n == 0:
            continue
        if n == IDENTITY:
            size = size + torch.nn.functional.conv2d(padded.abs(), v, None, case.stride, 0, *geometry)
            continue
        beta, r = p.offset[m].item(), p.range[m].item()
        level = ((x - beta) / r + z / n) * n
        distance = (level.clamp(0, n) - level.clamp(0, n).floor() - 0.5).abs()
        close = distance < 4 * 2.0**-24 * (level.abs() + n * (abs(beta) / r + 1))
        assert close.sum() <= 2 + 0.005 * close.numel(), "too many codes near a boundary for a test"
        slack = slack + torch.nn.functional.conv2d(close.double() * (1.001 * r / n), v, None, case.stride, case.padding, *geometry)
        code = (((padded - beta) / r + z / n) * n).clamp(0, n).round() - z
        size = size + torch.nn.functional.conv2d(abs(beta) + code.abs() * r / n, v, None, case.stride, 0, *geometry)
    return size, slack


def check(p: Problem, got: Tensor, want: Tensor, sampled: bool = False, weight: Tensor | None = None) -> None:
    size, slack = bounds(p, chosen(p, sampled) if weight is None else weight)
    assert got.shape == want.shape
    assert torch.equal(got.isnan(), want.isnan()), "NaN in other places"
    number = ~want.isnan()
    error = (got.double() - want.double()).abs()[number]
    allowed = (2.0 ** -BITS[got.dtype] * size + slack)[number] + 1e-12
    assert (error <= allowed).all(), f"{(error > allowed).sum()} values off by up to {(error / allowed).max():.3g} times what is allowed"


@pytest.mark.parametrize("sampled", [False, True], ids=["joint", "sampled"])
@pytest.mark.parametrize("case", PARAMS)
def test_agrees_with_the_definition(case: Case, sampled: bool) -> None:
    p = problem(case)
    got = run(p, "triton", sampled)
    assert got.dtype == case.dtype
    assert got.is_contiguous(memory_format=torch.channels_last if case.channels_last else torch.contiguous_format)
    check(p, got, run(p, "reference", sampled), sampled)
    check(p, got, run(p, "reference", sampled, double=True), sampled)


def test_the_bound_sees_one_wrong_code() -> None:
    p = problem(CASES[0])
    want = run(p, "reference", double=True)
    p.x[0, 0, 3, 3] += 1.01 * p.range[2] / 255
    with pytest.raises(AssertionError, match="what is allowed"):
        check(p, run(p, "triton"), want)


def _case(name: str) -> Case:
    return next(c for c in CASES if c.name == name)


PINS = [{"block_m": 16, "block_n": 16, "block_k": 16}, {"block_m": 32, "block_n": 64, "block_k": 64}]
TILED = [
    Case("plain", 20, 20, size=(5, 5), signed=True, offset=0.1),
    Case("merged", 3, 20, (7, 7), (9, 9), stride=(2, 2), padding=(3, 3), m=2),
    Case("groups", 40, 40, (1, 1), (5, 5), padding=(0, 0), groups=2),
]


@pytest.mark.parametrize("sampled", [False, True], ids=["joint", "sampled"])
@pytest.mark.parametrize("pins", PINS, ids=lambda pins: "x".join(map(str, pins.values())))
@pytest.mark.parametrize("case", TILED, ids=lambda case: case.name)
def test_tiles_do_not_change_results(case: Case, pins: dict[str, int], sampled: bool) -> None:
    """With several tiles of pixels, filters and channels, and with tiles larger than the problem."""
    p = problem(case)
    with launch.pinned(**pins):
        got = run(p, "triton", sampled)
    check(p, got, run(p, "reference", sampled), sampled)
    torch.testing.assert_close(got, run(p, "triton", sampled), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sampled", [False, True], ids=["joint", "sampled"])
@pytest.mark.parametrize("name", ["3x3", "7x7-stride-2", "wide-padding", "groups-2"])
def test_padding_is_zero_where_zero_is_off_the_grid(name: str, sampled: bool) -> None:
    """A_m(0) is far from 0 here, in the image but not outside of it."""
    p = problem(_case(name))
    p.offset[:] = torch.tensor([0.3, -2.9, -0.123])
    want = run(p, "reference", sampled, double=True)
    check(p, run(p, "triton", sampled), want, sampled)
    p.x.zero_()
    want = run(p, "reference", sampled, double=True)
    assert want.abs().max() > 0.1
    check(p, run(p, "triton", sampled), want, sampled)


def test_runs_are_equal() -> None:
    for sampled in (False, True):
        p = problem(_case("batch-1"))
        assert torch.equal(run(p, "triton", sampled), run(p, "triton", sampled))


@pytest.mark.parametrize("sampled", [False, True], ids=["joint", "sampled"])
@pytest.mark.parametrize("name", ["3x3", "rectangular"])
def test_layouts_of_the_weight(name: str, sampled: bool) -> None:
    p = problem(_case(name))
    weight = chosen(p, sampled)
    want = run(p, "triton", sampled)
    wide = torch.zeros(*weight.shape[:3], 2 * weight.size(3))
    wide[..., ::2] = weight
    for other in (weight.contiguous(memory_format=torch.channels_last), wide[..., ::2]):
        assert torch.equal(run(p, "triton", sampled, weight=other), want)


def test_layouts_of_x() -> None:
    p = problem(_case("3x3"))
    want = run(p, "triton")
    wide = torch.zeros(2, 8, 7, 12)
    wide[..., ::2] = p.x
    for x in (p.x.contiguous(), wide[..., ::2]):
        p.x = x
        assert torch.equal(run(p, "triton"), want)


@pytest.mark.parametrize("choice", [[0] * 12, [2] * 12, [1, 2] * 6, [2, 1, 0] * 4], ids=["first", "last", "two", "all"])
def test_choices_of_filters(choice: list[int]) -> None:
    p = problem(_case("signed"))
    p.choice = torch.tensor(choice)
    check(p, run(p, "triton", True), run(p, "reference", True, double=True), True)


def test_a_choice_reads_nothing_of_the_other_quantizers() -> None:
    """Each filter is computed once: values in the groups that it did not choose have no effect."""
    p = problem(_case("3x3"))
    assert torch.equal(run(p, "triton", True, weight=p.weight), run(p, "triton", True))


@pytest.mark.parametrize(("groups", "m", "block"), [(1, 3, 16), (2, 2, 16), (4, 1, 32), (1, 5, 32)])
def test_filter_table(groups: int, m: int, block: int) -> None:
    choice = torch.randint(m, (60,))
    filters, quantizers = (t.cpu() for t in conv_pack.filter_table(choice.to(DEVICE), groups, m, block))
    for group, of_group in enumerate(choice.view(groups, -1)):
        found = [filters[group, t][filters[group, t] >= 0] for t in range(filters.size(1)) if quantizers[group, t] >= 0]
        assert torch.equal(torch.cat(found), torch.argsort(of_group, stable=True))
        for t, quantizer in enumerate(quantizers[group]):
            if quantizer >= 0:
                rows = filters[group, t]
                assert (of_group[rows[rows >= 0]] == quantizer).all()
                assert rows[0] >= 0


def test_all_quantizers_pruned() -> None:
    p = problem(replace(_case("3x3"), steps=(0, 0)))
    for sampled in (False, True):
        assert torch.equal(run(p, "triton", sampled), torch.zeros(2, 16, 7, 6))


def test_infinities_are_clipped() -> None:
    p = problem(_case("3x3"))
    p.x[0, 1, 2, 3], p.x[1, 2, 3, 4] = math.inf, -math.inf
    got = run(p, "triton")
    assert got.isfinite().all()
    torch.testing.assert_close(got, run(p, "reference"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sampled", [False, True], ids=["joint", "sampled"])
def test_nan_reaches_what_it_should(sampled: bool) -> None:
    """The first quantizer is pruned, so another one has to carry it."""
    p = problem(replace(_case("nan"), steps=(0, 15, 255)))
    p.choice = torch.tensor([1, 2, 1, 2, 1, 2])
    got = run(p, "triton", sampled)
    assert got.isnan().any()
    assert torch.equal(got.isnan(), run(p, "reference", sampled).isnan())


def test_autocast() -> None:
    """Float32 inputs are multiplied in the autocast dtype: their codes are those of float32."""
    p = problem(_case("3x3"))
    tensors = [t.to(DEVICE) for t in (p.x, p.weight, p.offset, p.range)]
    with backend("triton"), torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        got = mixed_conv2d(*tensors, *p.case.grid, None, True, (1, 1), (1, 1), (1, 1), 1).cpu()
    assert got.dtype == torch.bfloat16
    check(p, got, run(p, "reference", double=True))


def test_weights_are_rounded_to_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """What tensor cores would cut off of a weight is not there, also in what is added for centers and taken off for borders."""
    monkeypatch.setattr(conv, "precision", lambda dtype: "tf32")
    packed: list[Tensor] = []
    original = conv_pack.pack

    def pack(*args: object) -> tuple[Tensor, ...]:
        packed[:] = original(*args)  # type: ignore[arg-type]
        return tuple(packed)

    monkeypatch.setattr(conv, "pack", pack)
    p = problem(_case("learned-offset"))
    p.weight[0, 0, 0, 0] = math.nan
    got = run(p, "triton")
    for operand in packed[:2]:
        assert not (operand.view(torch.int32) & 0x1FFF)[~operand.isnan()].any()
    assert got[:, 0].isnan().all()
    assert not got[:, 1:].isnan().any()
    p.weight[0, 0, 0, 0] = 0.0
    size, slack = bounds(p, p.weight)
    assert ((run(p, "triton") - run(p, "reference", double=True)).abs() <= 2.0**-10 * size + slack).all()
    assert (got - run(p, "reference")).abs()[:, 1:].max() > 1e-4


def test_the_precision_of_products_follows_pytorch() -> None:
    before = torch.backends.cudnn.conv.fp32_precision
    try:
        torch.backends.cudnn.conv.fp32_precision = "tf32"
        assert conv_common.precision(torch.float32) == "tf32"
        assert conv_common.precision(torch.bfloat16) == "ieee"
        torch.backends.cudnn.conv.fp32_precision = "ieee"
        assert conv_common.precision(torch.float32) == "ieee"
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


@pytest.mark.parametrize("arch", [80, 86, 90])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("quantizers", [1, 3, 8])
def test_launch_parameters(arch: int, itemsize: int, quantizers: int) -> None:
    device = launch.Device(132, arch)
    for filters in (1, 24, 40, 64, 96, 160, 512):
        for run_ in (3, 16, 48, 64, 512):
            s = launch_conv.ConvShape(100_000, filters, run_, 9, False, 1, quantizers, itemsize, itemsize)
            tile = launch_conv.forward(s, device)
            assert tile == launch_conv.forward(s, device)
            assert -(-filters // tile.block_n) * tile.block_n < max(2 * filters, 17)
            stages = tile.conv_stages - (arch < 90)
            used = stages * tile.block_k * itemsize * (tile.block_m + quantizers * tile.block_n)
            assert used <= launch_conv.SHARED.get(arch, 101376)
            assert launch_conv.forward(replace(s, tensor_cores=False), device).block_n <= 64
            assert tile.conv_registers * 32 * tile.conv_warps <= 65536

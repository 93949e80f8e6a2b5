"""The gradients of the mixed convolution as Triton kernels, against the reference: on the GPU where there is one, else interpreted.

Sums are taken in float32 and compared with those of float64. A code may differ by one step where u·n lies within a few ulp of a rounding
boundary; such pairs are counted, and each may add what one step does. Operands of float16 and bfloat16 products are exact codes and the
given tensors, and results are rounded once: one ulp of the dtype (the interpreter cuts bfloat16 off instead of rounding it) is allowed on
top of float32's accuracy.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from conv_cases import CASES, PARAMS, Case, Problem, problem
from interpreter import DEVICE, interpret
from torch import Tensor

from qprune.kernels import IDENTITY, backend, launch, launch_conv_grad, reference_conv
from qprune.kernels.launch_conv_grad import InputShape, WeightShape

__all__ = ["interpret"]
pytestmark = pytest.mark.gpu

ULP = {torch.float32: 0.0, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
NAMES = ("x", "weight", "offset", "range")


def _case(name: str) -> Problem:
    return problem(next(c for c in CASES if c.name == name))


def _gradients(
    p: Problem,
    name: str,
    sampled: bool = False,
    all_groups: bool = True,
    dtype: torch.dtype | None = None,
    wanted: tuple[bool, bool] = (True, True),
) -> dict[str, Tensor]:
    """The gradients by one backend, those of the reference in float64; dtype: that of dy, if not that of the case."""
    case = p.case
    memory_format = torch.channels_last if case.channels_last else torch.contiguous_format
    grad = p.grad.to(dtype or case.dtype).contiguous(memory_format=memory_format)
    weight = reference_conv.chosen_only(p.weight, p.choice, p.case.m) if sampled else p.weight
    tensors = [grad, p.x, weight, p.offset, p.range]
    tensors = [t.double() if name == "reference" else t.to(DEVICE) for t in tensors]
    choice = p.choice.to(tensors[0].device) if sampled else None
    with backend(name):
        found = torch.ops.qprune.mixed_conv2d_backward(
            *tensors, *case.grid, choice, all_groups, case.stride, case.padding, case.dilation, case.groups, *wanted
        )
    return {key: value.cpu() for key, value in zip(NAMES, found, strict=True)}


def _flips(p: Problem) -> int:
    """Pairs of an element of x and a quantizer whose code depends on the rounding of u·n."""
    found = 0
    for m, (n, z) in enumerate(zip(*p.case.grid, strict=True)):
        if n > 0:
            v = ((p.x.double() - p.offset[m]) / p.range[m] + z / n) * n
            found += int(((v - v.floor() - 0.5).abs() < 2.0**-20 * v.abs().clamp_min(1.0)).sum())
    return found


def _assert_agree(p: Problem, got: dict[str, Tensor], want: dict[str, Tensor], ulp: float | None = None) -> None:
    """`got` against float64: each value to 4e-6 of the root of its terms' squares, and x and weight to `ulp` of their size on top."""
    ulp = ULP[p.case.dtype] if ulp is None else ulp
    dy, dx = (t.nan_to_num().square().mean().sqrt() for t in (p.grad.double(), want["x"]))
    flips, step = _flips(p), max((r / n for r, n in zip(p.range.tolist(), p.case.grid[0], strict=True) if n > 0), default=0.0)
    terms = {"x": want["x"].square().nan_to_num().mean().sqrt(), "weight": dy * p.grad[:, 0].numel() ** 0.5}
    terms |= dict.fromkeys(("offset", "range"), dx * p.x.numel() ** 0.5)
    slack = {"x": 0.0, "weight": step * p.grad.abs().max() * flips}
    slack |= dict.fromkeys(("offset", "range"), want["x"].nan_to_num().abs().max() * flips)
    for key in NAMES:
        a, b = got[key].double(), want[key]
        assert a.shape == b.shape, key
        assert torch.equal(a.isnan(), b.isnan()), f"{key}: NaN in other places"
        a, b = a.nan_to_num(), b.nan_to_num()
        rounding = ulp * b.abs() if key in ("x", "weight") else 0.0
        off = (a - b).abs() - rounding
        assert off.max() <= 4e-6 * terms[key] + slack[key], f"{key}: off by {off.max():.3g}, terms of {terms[key]:.3g}"


@pytest.mark.parametrize("case", PARAMS)
def test_agrees_with_the_reference(case: Case) -> None:
    p = problem(case)
    got = _gradients(p, "triton")
    assert got["x"].dtype == got["weight"].dtype == case.dtype
    assert got["x"].is_contiguous(memory_format=torch.channels_last if case.channels_last else torch.contiguous_format)
    _assert_agree(p, got, _gradients(p, "reference"))


SAMPLED = [
    "1x1", "3x3-stride-2-odd", "groups-2", "full-precision", "pruned-input", "contiguous", "bf16", "many-channels",
]  # fmt: skip


@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_filters(name: str) -> None:
    """All groups of the weight's gradient, and only the chosen ones."""
    p = _case(name)
    for all_groups in (True, False):
        got, want = (_gradients(p, which, sampled=True, all_groups=all_groups) for which in ("triton", "reference"))
        _assert_agree(p, got, want)
    assert not got["weight"][reference_conv.chosen_only(torch.ones_like(p.weight), p.choice, p.case.m) == 0].any()


def test_sampled_filters_carry_nan() -> None:
    p = _case("nan")
    got, want = (_gradients(p, which, sampled=True, all_groups=False) for which in ("triton", "reference"))
    chosen = reference_conv.chosen_only(torch.ones_like(p.weight), p.choice, p.case.m) == 1
    want["weight"] = want["weight"].where(chosen, 0.0)
    _assert_agree(p, got, want)


@pytest.mark.parametrize("choice", [[0] * 16, [2] * 16, [2] + [0] * 15], ids=["first", "last", "not-the-second"])
def test_quantizers_that_no_filter_chose(choice: list[int]) -> None:
    p = _case("3x3")
    p.choice = torch.tensor(choice)
    got, want = (_gradients(p, which, sampled=True, all_groups=False) for which in ("triton", "reference"))
    _assert_agree(p, got, want)
    assert got["range"][1] == 0.0


OTHERS = [
    Case("every-quantizer-pruned", 4, 6, m=2, steps=(0, 0)),
    Case("only-full-precision", 4, 6, m=1, steps=(IDENTITY,)),
    Case("dilation-2-stride-2", 6, 10, size=(9, 8), stride=(2, 2), padding=(2, 2), dilation=(2, 2)),
    Case("dilation-3-stride-2", 6, 10, size=(9, 8), stride=(2, 2), padding=(3, 3), dilation=(3, 3)),
    Case("dilation-2-stride-6", 4, 6, size=(14, 13), stride=(6, 4), padding=(2, 1), dilation=(2, 2)),
    Case("stride-beyond-the-kernel", 4, 6, (2, 1), size=(9, 8), stride=(3, 2), padding=(0, 0)),
    Case("stride-beyond-the-image", 4, 6, (3, 3), size=(1, 2), stride=(3, 3), padding=(1, 1)),
    Case("merged-taps-of-one-row", 3, 6, (1, 5), padding=(0, 2)),
    Case("no-pixel-twice", 8, 6, (2, 2), size=(6, 6), stride=(2, 2), padding=(0, 0)),
    Case("wide-row", 20, 18, size=(1, 40), padding=(1, 1)),
    Case("many-filters", 18, 70, size=(4, 4)),
    Case("five-quantizers", 8, 9, m=5, steps=(3, 7, 15, 63, 255)),
]


@pytest.mark.parametrize("case", OTHERS, ids=lambda c: c.name)
def test_other_geometries_and_quantizers(case: Case) -> None:
    p = problem(case)
    _assert_agree(p, _gradients(p, "triton"), _gradients(p, "reference"))


@dataclass(frozen=True)
class WithZeroPoints(Case):
    @property
    def grid(self) -> tuple[list[float], list[float]]:
        return [3.0, 15.0, 255.0], [1.5, 7.0, 128.0]


def test_zero_points() -> None:
    p = problem(WithZeroPoints("zero-points", 6, 10, signed=True))
    p.offset.zero_()
    _assert_agree(p, _gradients(p, "triton"), _gradients(p, "reference"))


def test_x_in_another_dtype() -> None:
    """Under autocast dy is float16 while x and the weight stay float32; codes are those of x in float32."""
    p = _case("3x3")
    p.weight = p.weight.half().float()
    got, want = (_gradients(p, name, dtype=torch.float16) for name in ("triton", "reference"))
    assert got["x"].dtype == got["weight"].dtype == torch.float32
    _assert_agree(p, got, want)


PINS = {
    "3x3-stride-2-odd": {"dx_m": 16, "dx_n": 16, "dx_k": 16, "dw_m": 32, "dw_n": 16, "dw_k": 16, "dw_splits": 1},
    "1x1": {"dx_m": 64, "dx_k": 16, "dw_n": 16, "dw_k": 16, "dw_splits": 4, "dx_warps": 8, "dw_warps": 8, "dx_stages": 2, "dw_stages": 2},
    "many-channels": {"dx_m": 64, "dx_n": 32, "dx_k": 32, "dw_m": 64, "dw_n": 64, "dw_k": 32, "dw_splits": 1},
}


@pytest.mark.parametrize("sampled", [False, True], ids=["joint", "sampled"])
@pytest.mark.parametrize("name", PINS)
def test_launch_parameters_do_not_change_results(name: str, sampled: bool) -> None:
    """Several tiles along every axis, with remainders; the same bits every time."""
    p = _case(name)
    with launch.pinned(**PINS[name]):
        got = _gradients(p, "triton", sampled, all_groups=False)
        again = _gradients(p, "triton", sampled, all_groups=False) if name == "1x1" else got
    _assert_agree(p, got, _gradients(p, "reference", sampled, all_groups=False))
    assert all(torch.equal(got[key], again[key]) for key in NAMES)


def test_only_one_of_the_gradients() -> None:
    p = _case("3x3")
    want = _gradients(p, "triton")
    for wanted in ((True, False), (False, True)):
        got = _gradients(p, "triton", wanted=wanted)
        for key, needed in zip(NAMES, (*wanted, wanted[0], wanted[0]), strict=True):
            if needed:
                assert torch.equal(got[key], want[key])
            else:
                assert not got[key].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("processors", [8, 132])
@pytest.mark.parametrize(("filters", "run", "quantizers"), [(64, 64, 3), (2048, 512, 1), (8, 8, 3), (256, 1024, 5), (3, 1000, 8)])
def test_tiles_fit_the_device(filters: int, run: int, quantizers: int, processors: int, dtype: torch.dtype) -> None:
    """Shared memory, and what a product and a warp need at least."""
    for arch in (80, 86, 90):
        device, size = launch.Device(processors, arch), dtype.itemsize
        dx = launch_conv_grad.input_tile(InputShape(100352, run, filters, 1, 1, quantizers, False, 4, size), device)
        dw = launch_conv_grad.weight_tile(WeightShape(100352, filters, run, 9, False, 1, quantizers, 4, size), device)
        limit = launch_conv_grad.SHARED.get(arch, 101376)
        assert dx.dx_stages * dx.dx_k * size * (dx.dx_m + quantizers * dx.dx_n) <= limit
        assert dw.dw_stages * dw.dw_k * (4 * dw.dw_m + size * dw.dw_n) <= limit
        assert min(dx.dx_m, dx.dx_n, dx.dx_k, dw.dw_m, dw.dw_n, dw.dw_k) >= 16
        assert 1 <= dw.dw_splits <= 2 * processors

"""The one table of shapes, layouts, dtypes and candidate sets that every backend is tested on, and how two results are compared."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from qprune.functional import mix_quantize
from qprune.kernels import backend

LSQ = ([3, 7, 15, 255], [2, 4, 8, 128])
SYMMETRIC = ([2, 6, 14, 254], [1, 3, 7, 127])
DOREFA = ([1, 3, 15], [0.5, 1.5, 7.5])
UNSIGNED = ([3, 7, 15, 63, 255], [0, 0, 0, 0, 0])
WITH_SPECIAL = ([0, 3, 255, math.inf], [0, 2, 128, 0])


@dataclass(frozen=True)
class Case:
    name: str
    shape: tuple[int, ...]
    grid: tuple[list[float], list[float]]
    axis: int = 0
    rows: bool = True
    layout: str = "contiguous"
    dtype: torch.dtype = torch.float32
    groups: tuple[int, ...] | None = None
    pass_through: bool = False
    noise: bool = False
    special: str = ""
    k: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", len(self.grid[0]))


CASES = [
    Case("weight-3x3-filter", (17, 5, 3, 3), LSQ),
    Case("weight-3x3-layer", (16, 8, 3, 3), SYMMETRIC, rows=False),
    Case("weight-1x1-filter", (33, 7, 1, 1), DOREFA),
    Case("weight-depthwise", (31, 1, 3, 3), LSQ, pass_through=True),
    Case("weight-channels-last-grouped", (16, 6, 3, 3), LSQ, layout="channels_last", groups=(0, 1, 0, 1)),
    Case("weight-grouped", (9, 10, 3, 3), UNSIGNED, groups=(0, 1, 2, 1, 0)),
    Case("weight-special", (12, 6, 3, 3), WITH_SPECIAL),
    Case("weight-linear-bf16", (10, 65), LSQ, dtype=torch.bfloat16),
    Case("weight-long-rows", (3, 700, 3, 3), SYMMETRIC),
    Case("act-nchw-tensor", (3, 5, 7, 9), UNSIGNED, axis=1, rows=False),
    Case("act-nhwc-tensor", (3, 8, 7, 9), UNSIGNED, axis=1, rows=False, layout="channels_last"),
    Case("act-nchw-channel", (2, 6, 8, 8), UNSIGNED, axis=1),
    Case("act-nhwc-channel", (2, 13, 5, 7), UNSIGNED, axis=1, layout="channels_last"),
    Case("act-nhwc-joint", (2, 16, 6, 6), UNSIGNED, axis=1, rows=False, layout="channels_last", groups=(0, 1, 2, 3, 4)),
    Case("act-nchw-joint", (2, 3, 5, 5), LSQ, axis=1, rows=False, groups=(0, 1, 2, 3)),
    Case("act-fp16", (2, 8, 8, 8), UNSIGNED, axis=1, rows=False, dtype=torch.float16),
    Case("act-bf16-channels-last", (2, 32, 8, 8), UNSIGNED, axis=1, rows=False, layout="channels_last", dtype=torch.bfloat16),
    Case("act-special", (2, 4, 6, 6), WITH_SPECIAL, axis=1, rows=False),
    Case("strided-slice", (6, 10, 6, 6), LSQ, layout="sliced"),
    Case("transposed-dense", (12, 9, 4, 4), LSQ, layout="transposed"),
    Case("axis-2", (3, 4, 5, 6), LSQ, axis=2),
    Case("one-element", (1, 1, 1, 1), LSQ),
    Case("vector", (19,), UNSIGNED, rows=False),
    Case("one-candidate", (8, 4, 3, 3), ([15], [8])),
    Case("eight-candidates", (8, 16, 3, 3), ([1, 3, 7, 15, 31, 63, 127, 255], [0.5, 2, 4, 8, 16, 32, 64, 128])),
    Case("midpoints", (8, 64), LSQ, special="midpoints"),
    Case("zeros", (8, 4, 3, 3), LSQ, special="zeros"),
    Case("nan", (8, 4, 3, 3), LSQ, special="nan"),
    Case("inf", (8, 4, 3, 3), LSQ, special="inf"),
    Case("noise-weight", (16, 8, 3, 3), SYMMETRIC, noise=True),
    Case("noise-act", (2, 8, 9, 9), UNSIGNED, axis=1, rows=False, layout="channels_last", noise=True),
]
PARAMS = [pytest.param(case, id=case.name) for case in CASES]


@dataclass
class Problem:
    """The tensors of a case. `run` evaluates forward and all gradients on one backend."""

    case: Case
    x: Tensor
    offset: Tensor
    range: Tensor
    p: Tensor
    grad: Tensor
    seed: Tensor | None

    def run(self, name: str | None, device: str = "cpu", double: bool = False) -> dict[str, Tensor]:
        def leaf(t: Tensor) -> Tensor:
            return (t.to(device=device, dtype=torch.float64) if double else t.to(device)).detach().requires_grad_()

        x, offset, range_, p = (leaf(t) for t in (self.x, self.offset, self.range, self.p))
        steps, zero_point = self.case.grid
        seed = None if self.seed is None else self.seed.to(device)
        with backend(name):
            y = mix_quantize(
                x, offset, range_, p, steps, zero_point,
                axis=self.case.axis, groups=self.case.groups, pass_through=self.case.pass_through, seed=seed,
            )  # fmt: skip
            y.backward(self.grad.to(device=device, dtype=y.dtype))
        values = {"y": y.detach(), "x": x.grad, "offset": offset.grad, "range": range_.grad, "p": p.grad}
        return {k: v.cpu() for k, v in values.items() if v is not None}


def problem(case: Case, seed: int = 0) -> Problem:
    g = torch.Generator().manual_seed(seed)
    shape = case.shape
    x = torch.randn(*shape, generator=g)
    if case.axis == 1 and case.grid is UNSIGNED:
        x = x.relu()
    if case.layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif case.layout == "sliced":
        x = torch.randn(2 * shape[0], *shape[1:], generator=g)[::2]
    elif case.layout == "transposed":
        x = torch.randn(shape[1], shape[0], *shape[2:], generator=g).transpose(0, 1)
    rows = (shape[case.axis], case.k) if case.rows else (case.k,)
    range_ = 1.0 + 2.0 * torch.rand(rows, generator=g)
    offset = 0.25 * torch.randn(rows, generator=g) if "special" not in case.name else torch.zeros(rows)
    p = torch.rand(rows, generator=g).softmax(-1)
    if case.special == "midpoints":
        range_ = torch.tensor(case.grid[0]).expand(rows).clone() / 4
        offset = torch.zeros(rows)
        x = (torch.randint(-9, 9, shape, generator=g) + 0.5) / 4
    elif case.special == "zeros":
        x, offset = torch.zeros(shape), torch.zeros(rows)
    elif case.special:
        x.view(-1)[::7] = {"nan": math.nan, "inf": math.inf}[case.special]
        x.view(-1)[3::11] *= -1
    m = 1 if case.groups is None else max(case.groups) + 1
    grad = torch.randn(*((m,) if case.groups is not None else ()), *shape, generator=g)
    seed_tensor = torch.tensor([0x1234_5678_9ABC]) if case.noise else None
    return Problem(case, x.to(case.dtype), offset, range_, p, grad, seed_tensor)


def near_boundary(problem: Problem, ulp: float = 8.0) -> Tensor:
    """Elements where some candidate's û·n lies within a few float32 ulp of a rounding boundary, or û of a clip edge: there a backend may
    pick the neighbouring code, since compilers may contract a multiplication and an addition into one rounding."""
    case = problem.case
    view = [1] * len(case.shape)
    if case.rows:
        view[case.axis] = case.shape[case.axis]
    close = torch.zeros(case.shape, dtype=torch.bool)
    for k, (n, z) in enumerate(zip(*case.grid, strict=True)):
        if n in (0, math.inf):
            continue
        offset, range_ = (t.double()[..., k].reshape(view) for t in (problem.offset, problem.range))
        v = ((problem.x.double() - offset) / range_ + z / n) * n
        eps = ulp * 2.0**-24 * v.abs().clamp_min(max(z, 1.0))
        close |= ((v - v.floor() - 0.5).abs() < eps) | (v.abs() < eps) | ((v - n).abs() < eps)
    return close


def assert_agree(problem: Problem, got: dict[str, Tensor], flips: float = 0.02) -> None:
    """`got` against the float32 reference: outputs and dx to a few ulp except one-step flips at boundaries, at most `flips` of all
    elements; parameter gradients against float64 to the accuracy of a float32 sum."""
    case = problem.case
    want = problem.run("reference")
    close = near_boundary(problem)
    low = case.dtype != torch.float32
    tol = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[case.dtype]
    step = max((problem.range.max().item() / n for n in case.grid[0] if 0 < n < math.inf), default=0.0)
    for name in ("y", "x"):
        a, b = got[name], want[name]
        assert a.shape == b.shape and a.dtype == b.dtype, f"{name}: {a.shape} {a.dtype} instead of {b.shape} {b.dtype}"
        a, b = a.double(), b.double()
        assert torch.equal(a.isnan(), b.isnan()), f"{name}: NaN in other places"
        a, b = a.nan_to_num(posinf=1e9, neginf=-1e9), b.nan_to_num(posinf=1e9, neginf=-1e9)
        wrong = (a - b).abs() > tol * (1.0 + b.abs())
        allowed = close.expand_as(wrong)
        assert not (wrong & ~allowed).any(), f"{name}: {(wrong & ~allowed).sum()} values off by up to {(a - b).abs().max():.3g}"
        if case.special != "midpoints":
            assert wrong.double().mean() <= flips, f"{name}: {wrong.double().mean():.3%} flipped codes"
        if name == "y":
            assert ((a - b).abs() <= 1.01 * step + tol * (1.0 + b.abs())).all(), "y: more than one step off"
    exact = problem.run("reference", double=True)
    for name in ("offset", "range", "p"):
        a, b = got[name].double(), exact[name]
        assert a.shape == b.shape
        nan = a.isnan()
        assert torch.equal(nan, b.isnan()), f"d{name}: NaN in other rows"
        scale = max(b[~nan].square().mean().sqrt().item(), 1e-3) if (~nan).any() else 1.0
        slack = (1e-4 if not low else 2e-2) * scale + step * close.sum().item() * problem.grad.abs().max().item()
        if case.special == "midpoints":
            a, b = a[~nan], want[name].double()[~nan]
        assert ((a - b).abs()[~nan if a.dim() == nan.dim() else ...] <= slack).all(), (
            f"d{name}: off by {(a - b).abs().max():.3g}, allowed {slack:.3g}"
        )

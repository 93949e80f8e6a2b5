"""functional.mixed_conv2d: every form is the sum over branches, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qprune.functional import Quantizers, mix_quantize, mixed_conv2d
from qprune.kernels import InputError

W_STEPS, W_ZERO = (3, 15), (2, 8)
A_STEPS, A_ZERO = (3, 15, 255), (0, 0, 0)


def _problem(filters: int = 8, channels: int = 6, groups: int = 1) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, channels, 7, 6, generator=g, dtype=torch.float64).relu()
    weight = torch.randn(filters, channels // groups, 3, 3, generator=g, dtype=torch.float64)
    w = Quantizers(torch.zeros(filters, 2), 2 + torch.rand(filters, 2, generator=g), W_STEPS, W_ZERO)
    a = Quantizers(torch.tensor([0.0, -0.5, 0.1]), 1 + torch.rand(3, generator=g), A_STEPS, A_ZERO)
    return {"x": x, "weight": weight, "w": w, "a": a, "padding": 1, "groups": groups, "bias": torch.randn(filters, generator=g).double()}


def _branches(p: Tensor, pairs: list[tuple[int, int]], x: Tensor, weight: Tensor, w: Quantizers, a: Quantizers, **conv: Any) -> Tensor:
    """A convolution per pair, in float64."""
    one = torch.ones(1)
    bias = conv.pop("bias")
    total = torch.zeros(())
    for k, (i, j) in enumerate(pairs):
        q = mix_quantize(weight, w.offset[:, i : i + 1], w.range[:, i : i + 1], one, w.steps[i : i + 1], w.zero_point[i : i + 1])
        v = mix_quantize(x, a.offset[j : j + 1], a.range[j : j + 1], one, a.steps[j : j + 1], a.zero_point[j : j + 1], axis=1)
        total = total + p[:, k].view(-1, 1, 1) * F.conv2d(v, q, None, **conv)
    return total + bias.view(-1, 1, 1)


PAIRS = [(i, j) for i in range(2) for j in range(3)]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("route", [None, "library", "fused"])
@pytest.mark.parametrize("pairs", [None, [(0, 0), (0, 1), (1, 1), (1, 2)]], ids=["all", "some"])
def test_joint_is_the_sum_over_branches(pairs: list[tuple[int, int]] | None, route: str | None, groups: int) -> None:
    problem = _problem(groups=groups)
    p = torch.randn(8, len(pairs or PAIRS)).softmax(1)
    torch.testing.assert_close(mixed_conv2d(p=p, pairs=pairs, route=route, **problem), _branches(p, pairs or PAIRS, **problem))


def test_shared_is_the_sum_over_branches() -> None:
    problem = _problem()
    p, a_p = torch.randn(8, 2).softmax(1), torch.randn(3).softmax(0)
    joint = (p.unsqueeze(2) * a_p).flatten(1)
    torch.testing.assert_close(mixed_conv2d(p=p, a_p=a_p, **problem), _branches(joint, PAIRS, **problem))


@pytest.mark.parametrize("route", ["library", "fused"])
def test_sampled_is_the_sum_over_branches(route: str) -> None:
    problem = _problem()
    p = F.one_hot(torch.tensor([0, 1, 2, 3, 4, 5, 0, 3]), 6).double().requires_grad_()
    y = mixed_conv2d(p=p, form="sampled", route=route, **problem)
    want = _branches(p, PAIRS, **problem)
    torch.testing.assert_close(y, want)
    grads = [torch.autograd.grad(out.square().sum(), p)[0] for out in (y, want)]
    torch.testing.assert_close(*grads)


def test_one_row_of_coefficients_and_ranges_for_the_layer() -> None:
    problem = _problem()
    problem["w"] = Quantizers(torch.zeros(2), torch.tensor([2.0, 3.0]), W_STEPS, W_ZERO)
    p = torch.randn(6).softmax(0)
    y = mixed_conv2d(p=p, **problem)
    problem["w"] = Quantizers(torch.zeros(8, 2), torch.tensor([2.0, 3.0]).expand(8, 2), W_STEPS, W_ZERO)
    torch.testing.assert_close(y, _branches(p.expand(8, 6), PAIRS, **problem))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"form": "pairwise"}, "form must be one of shared, joint, sampled, got 'pairwise'"),
        ({"form": "shared"}, "form 'shared' takes a_p and no pairs"),
        ({"a_p": torch.ones(3), "pairs": [(0, 0)]}, "form 'shared' takes a_p and no pairs"),
        ({"route": "gpu"}, "route: expected one of library, fused, got 'gpu'"),
        ({"pairs": [(0, 0), (2, 1)]}, r"pairs must number 2 weight and 3 input quantizers, .*got \[\(0, 0\), \(2, 1\)\]"),
        ({"pairs": [(0, 0), (1, 1)]}, "each input one at least once"),
        ({"stride": (1, 2, 3)}, r"stride must be one integer or two, each at least 1, got \(1, 2, 3\)"),
        ({"stride": 0}, "stride must be one integer or two, each at least 1, got 0"),
        ({"padding": -1}, "padding must be one integer or two, each at least 0, got -1"),
        ({"groups": 4}, r"with groups = 4, got \(2, 6, 7, 6\) and \(8, 6, 3, 3\)"),
        ({"x": torch.zeros(6, 7, 6)}, r"expected x \[N, C, H, W\]"),
        ({"a": Quantizers(torch.zeros(3), torch.ones(3), (3, 2.5, 255), A_ZERO)}, "mixed_conv2d: steps must be integers"),
    ],
)
def test_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        mixed_conv2d(**{**_problem(), "p": torch.full((6,), 1 / 6), **changes})


@pytest.mark.parametrize("form", ["shared", "joint", "sampled"])
def test_compiles_as_one_graph(form: str) -> None:
    problem = _problem()
    p = torch.randn(8, 2 if form == "shared" else 6).softmax(1)
    p = F.one_hot(p.argmax(1), 6).double() if form == "sampled" else p
    extra = {"a_p": torch.randn(3).softmax(0)} if form == "shared" else {}
    compiled = torch.compile(lambda: mixed_conv2d(p=p, form=form, **extra, **problem), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(), mixed_conv2d(p=p, form=form, **extra, **problem))

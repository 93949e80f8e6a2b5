"""mixed_conv2d: the definition against autograd in float64, and the contract of its operators."""

from __future__ import annotations

import pytest
import torch
from conv_cases import CASES, PARAMS, Case, Problem, problem
from torch import Tensor

from qprune.kernels import IDENTITY, QPruneError, backend, mixed_conv2d


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad


def _by_autograd(p: Problem) -> dict[str, Tensor]:
    """The sum over quantizers written out in float64, with straight-through rounding."""
    case = p.case
    x, weight, offset, range_ = (t.double().detach().requires_grad_() for t in (p.x, p.weight, p.offset, p.range))
    total: Tensor | None = None
    for m, (n, z, v) in enumerate(zip(*case.grid, weight.chunk(len(case.grid[0]), 1), strict=True)):
        if n == IDENTITY:
            a = x
        elif n == 0:
            a = x * 0.0
        else:
            u = ((x - offset[m]) / range_[m] + z / n).clamp(0, 1)
            a = offset[m] + (_Round.apply(u * n) - z) * (range_[m] / n)
        y = torch.nn.functional.conv2d(a, v, None, case.stride, case.padding, case.dilation, case.groups)
        total = y if total is None else total + y
    assert total is not None
    total.backward(p.grad.double())
    found = {"y": total.detach(), "x": x.grad, "weight": weight.grad, "offset": offset.grad, "range": range_.grad}
    return {name: value for name, value in found.items() if value is not None}


@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in CASES if c.special != "nan" and c.dtype == torch.float32])
def test_the_definition_against_autograd(case: Case) -> None:
    p = problem(case)
    got, want = p.run("reference", double=True), _by_autograd(p)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("case", PARAMS)
def test_float32_and_lower(case: Case) -> None:
    p = problem(case)
    got = p.run("reference")
    assert got["y"].dtype == case.dtype
    assert got["y"].is_contiguous(memory_format=torch.channels_last if case.channels_last else torch.contiguous_format)
    assert got["x"].dtype == got["weight"].dtype == case.dtype
    assert got["y"].isnan().any() == (case.special == "nan")


def test_a_choice_is_the_same_convolution() -> None:
    p = problem(CASES[0])
    want, every, chosen = (p.run("reference", sampled=True, all_groups=flag) for flag in (True, True, False))
    for name in ("y", "x", "weight", "offset", "range"):
        assert torch.equal(every[name], want[name])
    mask = torch.nn.functional.one_hot(p.choice, 3).view(-1, 3, 1, 1, 1)
    assert torch.equal(chosen["weight"].unflatten(1, (3, -1)), want["weight"].unflatten(1, (3, -1)) * mask)
    assert (want["weight"] != 0).sum() > (chosen["weight"] != 0).sum()


def _arguments(p: Problem, grad: bool = True) -> tuple[object, ...]:
    case = p.case
    tensors = [t.clone().requires_grad_(grad) for t in (p.x, p.weight, p.offset, p.range)]
    return (*tensors, *case.grid, None, True, case.stride, case.padding, case.dilation, case.groups)


@pytest.mark.parametrize("name", ["3x3", "3x3-stride-2-odd", "groups-2", "contiguous", "1x1"])
def test_opcheck(name: str) -> None:
    p = problem(next(c for c in CASES if c.name == name))
    with backend("reference"):
        torch.library.opcheck(
            torch.ops.qprune.mixed_conv2d.default, (*_arguments(p), torch.float32),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static"),
        )  # fmt: skip


def test_compiles_as_one_graph() -> None:
    p = problem(CASES[0])
    compiled = torch.compile(mixed_conv2d, fullgraph=True, backend="aot_eager")
    results = []
    for function in (mixed_conv2d, compiled):
        arguments = _arguments(p)
        y = function(*arguments)
        y.backward(p.grad)
        results.append((y.detach(), *(t.grad for t in arguments[:4] if isinstance(t, Tensor))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_keeps_only_its_arguments() -> None:
    p = problem(CASES[0])
    arguments = _arguments(p)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.data_ptr()), t)[1], lambda t: t):
        mixed_conv2d(*arguments)
    assert set(kept) == {t.data_ptr() for t in arguments[:4] if isinstance(t, Tensor)}


def test_only_the_gradients_that_are_wanted() -> None:
    p = problem(CASES[0])
    want = p.run("reference")
    for i, name in enumerate(("x", "weight", "offset", "range")):
        arguments = _arguments(p, grad=False)
        leaf = arguments[i]
        assert isinstance(leaf, Tensor)
        leaf.requires_grad_()
        mixed_conv2d(*arguments).backward(p.grad)
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, want[name])


def test_an_empty_batch() -> None:
    p = problem(CASES[0])
    x = p.x[:0].requires_grad_()
    weight = p.weight.requires_grad_()
    y = mixed_conv2d(x, weight, p.offset, p.range, *p.case.grid, None, True, (1, 1), (1, 1), (1, 1), 1)
    y.sum().backward()
    assert y.shape == (0, 16, 7, 6)
    assert weight.grad is not None
    assert not weight.grad.any()


def test_no_second_derivatives() -> None:
    p = problem(CASES[0])
    arguments = _arguments(p)
    y = mixed_conv2d(*arguments)
    (dx,) = torch.autograd.grad(y.sum(), arguments[0], create_graph=True)  # type: ignore[arg-type]
    with pytest.raises(QPruneError, match="second derivatives"):
        dx.sum().backward()

"""The operators as PyTorch sees them: schemas, fakes, compilation, memory kept for the backward pass, layouts, autocast."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import LSQ, UNSIGNED, Case, Problem, problem
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qprune.functional import mix_quantize
from qprune.kernels import QPruneError, backend, dispatch, ops

HAS_CPU = not isinstance(dispatch._module("cpu", "quantize"), str)
BACKENDS = ["reference", pytest.param("cpu", marks=pytest.mark.skipif(not HAS_CPU, reason="no C++ compiler"))]

WEIGHT = Case("weight", (6, 4, 3, 3), LSQ)
SAMPLES = [
    WEIGHT,
    Case("bf16", (6, 20), LSQ, dtype=torch.bfloat16, pass_through=True),
    Case("fp16-nhwc", (2, 8, 5, 5), UNSIGNED, axis=1, rows=False, layout="channels_last", dtype=torch.float16),
    Case("nhwc-grouped", (2, 8, 5, 5), LSQ, axis=1, layout="channels_last", groups=(0, 1, 0, 2)),
    Case("sliced", (6, 4, 3, 3), LSQ, layout="sliced"),
    Case("transposed", (6, 4, 3, 3), LSQ, layout="transposed"),
    Case("noise", (6, 10), LSQ, noise=True),
]
samples = pytest.mark.parametrize("case", SAMPLES, ids=lambda case: case.name)


def core_arguments(made: Problem, grad: bool = True) -> tuple[Any, ...]:
    """What the core operator takes for this problem, without the output dtype."""
    case = made.case
    groups = list(case.groups or [0] * case.k)
    small = [t.reshape(-1, case.k).clone().requires_grad_(grad) for t in (made.offset, made.range, made.p)]
    steps, zero_point = ([float(v) for v in values] for values in case.grid)
    return (made.x.requires_grad_(grad), *small, steps, zero_point, case.axis, groups, [int(case.pass_through)] * case.k, made.seed)


@samples
@pytest.mark.parametrize("name", BACKENDS)
def test_opcheck(case: Case, name: str) -> None:
    made = problem(case)
    with backend(name):
        torch.library.opcheck(torch.ops.qprune.mix_quantize, (*core_arguments(made), made.x.dtype))
        arguments = core_arguments(problem(case), grad=False)
        grad = torch.randn_like(ops.mix_quantize(*arguments))
        # the gradient operator is not differentiable itself, so its autograd registration is not among the checks
        torch.library.opcheck(
            torch.ops.qprune.mix_quantize_backward,
            (grad, *arguments, True),
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static"),
        )


def gradients(function: Any, made: Problem) -> list[Tensor]:
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (made.x, made.offset, made.range, made.p)]
    y = function(*leaves)
    y.backward(made.grad.to(y.dtype))
    return [y.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # PyTorch's own, raised inside Inductor
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("case", [WEIGHT, SAMPLES[3]], ids=["weight", "nhwc-grouped"])
def test_compile_without_graph_breaks(case: Case, compiler: str) -> None:
    made = problem(case)

    def function(x: Tensor, offset: Tensor, range: Tensor, p: Tensor) -> Tensor:
        return mix_quantize(x * 2, offset, range.exp(), p.softmax(-1), *case.grid, axis=case.axis, groups=case.groups).relu()

    torch._dynamo.reset()
    eager, compiled = gradients(function, made), gradients(torch.compile(function, backend=compiler, fullgraph=True), made)
    for a, b in zip(eager, compiled, strict=True):
        assert a.stride() == b.stride() or compiler == "inductor"
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def kept_bytes(function: Any, *leaves: Tensor) -> int:
    """Bytes of the distinct storages that are saved for the backward pass."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = function(*leaves)
    y.sum().backward()
    return sum(kept.values())


@pytest.mark.parametrize("name", BACKENDS)
def test_keeps_x_and_little_else(name: str) -> None:
    case = Case("kept", (64, 512), LSQ)
    made = problem(case)
    leaves = [t.requires_grad_() for t in (made.x, made.offset, made.range, made.p)]

    def plain(x: Tensor, offset: Tensor, range: Tensor, p: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for k, (n, z) in enumerate(zip(*case.grid, strict=True)):
            b, r, weight = (t[:, k : k + 1] for t in (offset, range, p))
            exact = ((x - b) / r + z / n).clamp(0, 1) * n
            total = total + weight * (b + (exact + (exact.round() - exact).detach() - z) * (r / n))
        return total

    with backend(name):
        fused = kept_bytes(lambda *t: mix_quantize(*t, *case.grid), *leaves)
    small = sum(t.nbytes for t in leaves[1:])
    assert made.x.nbytes <= fused <= made.x.nbytes + small
    assert kept_bytes(plain, *leaves) >= 2 * case.k * made.x.nbytes


@pytest.mark.parametrize("name", BACKENDS)
def test_memory_formats_are_kept(name: str) -> None:
    case = Case("kept", (3, 8, 5, 6), UNSIGNED, axis=1, rows=False, layout="channels_last")
    made = problem(case)
    x = made.x.requires_grad_()
    with backend(name):
        y = mix_quantize(x, made.offset, made.range, made.p, *case.grid, axis=1)
        y.backward(made.grad)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert x.grad is not None and x.grad.is_contiguous(memory_format=torch.channels_last)
    five = torch.randn(2, 4, 3, 3, 3).contiguous(memory_format=torch.channels_last_3d)
    with backend(name):
        y = mix_quantize(five, made.offset, made.range, made.p, *case.grid, axis=1)
    assert y.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("case", [WEIGHT, SAMPLES[3]], ids=["weight", "nhwc-grouped"])
def test_gradient_of_any_layout(case: Case, name: str) -> None:
    made = problem(case)
    want = made.run(name)
    made.grad = made.grad.transpose(-1, -2).contiguous().transpose(-1, -2)
    for key, value in made.run(name).items():
        assert torch.equal(value, want[key]), key
    made.grad = torch.ones(()).expand_as(made.grad)
    expanded = made.run(name)
    made.grad = made.grad.contiguous()
    for key, value in made.run(name).items():
        assert torch.equal(value, expanded[key]), key


@pytest.mark.parametrize("name", BACKENDS)
def test_autocast_gives_its_dtype(name: str) -> None:
    made = problem(WEIGHT)
    leaves = [t.requires_grad_() for t in (made.x, made.offset, made.range, made.p)]
    with backend(name):
        with torch.autocast("cpu", torch.bfloat16):
            y = mix_quantize(*leaves, *LSQ)
            assert y.dtype == torch.bfloat16
            assert mix_quantize(*(t.double() for t in leaves), *LSQ).dtype == torch.float64
        y.sum().backward()
        assert [leaf.grad.dtype for leaf in leaves] == [torch.float32] * 4
        torch.testing.assert_close(y.float(), mix_quantize(*leaves, *LSQ), rtol=8e-3, atol=8e-3)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (4, 0, 3, 3)], ids=str)
@pytest.mark.parametrize("groups", [None, [0, 1]], ids=["one", "two"])
def test_empty_tensors(shape: tuple[int, ...], groups: list[int] | None, name: str) -> None:
    leaves = [t.requires_grad_() for t in (torch.randn(shape), torch.zeros(2), torch.ones(2), torch.rand(2))]
    with backend(name):
        y = mix_quantize(*leaves, [3, 15], [2, 8], groups=groups)
        y.sum().backward()
    assert y.shape == ((2, *shape) if groups else shape)
    assert leaves[0].grad is not None and leaves[0].grad.shape == shape
    assert all(torch.equal(leaf.grad, torch.zeros(2)) for leaf in leaves[1:])


@pytest.mark.parametrize("name", BACKENDS)
def test_second_derivatives_are_refused(name: str) -> None:
    x = torch.randn(6, requires_grad=True)
    one = torch.ones(1, requires_grad=True)
    with backend(name):
        y = mix_quantize(x, 0 * one, one, one * 1, [15], [8])
        (dx,) = torch.autograd.grad((y * y).sum(), x, create_graph=True)
        with pytest.raises(QPruneError, match="no second derivatives"):
            dx.sum().backward()


@samples
@pytest.mark.parametrize("name", BACKENDS)
def test_same_bits_every_time(case: Case, name: str) -> None:
    made = problem(case)
    first = made.run(name)
    for _ in range(3):
        for key, value in made.run(name).items():
            assert torch.equal(value, first[key]), key


@pytest.mark.parametrize("name", BACKENDS)
def test_full_precision_alone_is_the_identity(name: str) -> None:
    x = torch.randn(5, 7)
    x[0, 0], x[1, 1] = math.inf, math.nan
    one = torch.ones(1)
    with backend(name):
        y = mix_quantize(x, 0 * one, one, one, [math.inf], [0])
    torch.testing.assert_close(y, x, rtol=0, atol=0, equal_nan=True)


def test_plain_tensors_go_around_the_dispatcher_and_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    direct: list[int] = []
    original = ops._Direct.apply
    monkeypatch.setattr(ops._Direct, "apply", lambda *a: (direct.append(1), original(*a))[1])
    made = problem(WEIGHT)
    plain = made.run(None)
    assert direct == [1]
    with Watch():
        watched = made.run(None)
    assert direct == [1]
    assert {"qprune::mix_quantize", "qprune::mix_quantize_backward"} <= set(seen)
    assert all(torch.equal(plain[name], watched[name]) for name in plain)

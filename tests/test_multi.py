"""mix_quantize_many: what mix_quantize gives for every weight alone, in one call and one launch for each pass."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from cases import DOREFA, LSQ, SYMMETRIC, UNSIGNED, WITH_SPECIAL, Case, Problem, assert_agree, problem
from interpreter import DEVICE, GPU, interpret  # noqa: F401
from torch import Tensor

from qprune.kernels import IDENTITY, QPruneError, backend, dispatch, launch, launch_multi, mix_quantize_many, multi, multi_grad, multi_table

pytestmark = pytest.mark.gpu

HAS_CPU = not isinstance(dispatch._module("cpu", "quantize"), str)
CPU = pytest.param("cpu", marks=pytest.mark.skipif(not HAS_CPU, reason="no C++ compiler"))

SHAPES: list[tuple[tuple[int, ...], str]] = [
    ((16, 3, 7, 7), "contiguous"),
    ((17, 8, 3, 3), "contiguous"),
    ((8, 16, 3, 3), "channels_last"),
    ((33, 8, 1, 1), "contiguous"),
    ((31, 1, 3, 3), "contiguous"),
    ((10, 65), "contiguous"),
    ((3, 700, 3, 3), "contiguous"),
    ((2, 36, 3, 3), "sliced"),
    ((12, 9, 4, 4), "transposed"),
    ((1, 4, 3, 3), "contiguous"),
    ((1, 1, 1, 1), "contiguous"),
]
PLAIN = [(shape, layout) for shape, layout in SHAPES if layout == "contiguous"]
ONE = ([15], [8])


def network(grid: tuple[list[float], list[float]], shapes: Sequence[tuple[tuple[int, ...], str]] = SHAPES, **fields: Any) -> list[Problem]:
    """A problem for each weight, with the same candidates."""
    return [problem(Case(f"{i}", shape, grid, layout=layout, **fields), seed=i) for i, (shape, layout) in enumerate(shapes)]


def core(case: Case) -> tuple[list[float], list[float], list[int], list[int]]:
    steps = [IDENTITY if n == math.inf else float(n) for n in case.grid[0]]
    return steps, [float(z) for z in case.grid[1]], list(case.groups or [0] * case.k), [int(case.pass_through)] * case.k


def leaves(problems: Sequence[Problem], device: str = "cpu") -> tuple[list[Tensor], list[Tensor]]:
    """The weights and the three parameters, ready for gradients."""
    xs = [p.x.to(device).detach().requires_grad_() for p in problems]
    small = [torch.cat([getattr(p, name) for p in problems]).to(device).requires_grad_() for name in ("offset", "range", "p")]
    return xs, small


def stacked(y: Tensor, case: Case) -> Tensor:
    """An output [F, M·C, …] as the public function gives it."""
    if case.groups is None:
        return y
    m = max(case.groups) + 1
    return y.unflatten(1, (m, case.shape[1])).movedim(1, 0).reshape(m, *case.shape)


def concatenated(grad: Tensor, case: Case) -> Tensor:
    return grad if case.groups is None else grad.movedim(0, 1).flatten(1, 2)


def run(problems: Sequence[Problem], name: str, device: str = "cpu") -> list[dict[str, Tensor]]:
    """What `Problem.run` gives for each of the problems, from one call."""
    xs, small = leaves(problems, device)
    case = problems[0].case
    with backend(name):
        ys = mix_quantize_many(xs, *small, *core(case))
        grads = [concatenated(p.grad, p.case).to(device=device, dtype=y.dtype) for p, y in zip(problems, ys, strict=True)]
        torch.autograd.backward(ys, grads)
    rows = [x.size(0) for x in xs]
    of_rows = zip(*(t.grad.cpu().split(rows) for t in small if t.grad is not None), strict=True)
    return [
        {"y": stacked(y.detach(), p.case).cpu(), "x": x.grad.cpu(), "offset": b, "range": r, "p": q}
        for p, x, y, (b, r, q) in zip(problems, xs, ys, of_rows, strict=True)
        if x.grad is not None
    ]


NETWORKS: dict[str, dict[str, Any]] = {
    "lsq": {"grid": LSQ},
    "through": {"grid": SYMMETRIC, "pass_through": True},
    "one candidate": {"grid": ONE},
    "three candidates": {"grid": DOREFA},
    "five in three groups": {"grid": UNSIGNED, "groups": (0, 1, 2, 1, 0)},
    "two groups of special ones": {"grid": WITH_SPECIAL, "groups": (0, 1, 1, 0)},
    "pruned and full precision": {"grid": WITH_SPECIAL},
    "nothing but pruned": {"grid": ([0], [0]), "special": "nan", "shapes": PLAIN},
    "nan": {"grid": LSQ, "special": "nan", "shapes": PLAIN},
    "inf": {"grid": LSQ, "special": "inf", "shapes": PLAIN},
    "bf16": {"grid": LSQ, "dtype": torch.bfloat16},
    "fp16": {"grid": LSQ, "dtype": torch.float16, "groups": (0, 1, 0, 1)},
}
networks = pytest.mark.parametrize("name", NETWORKS)


@networks
@pytest.mark.parametrize("which", ["reference", CPU])
def test_is_what_every_weight_gives_alone(which: str, name: str) -> None:
    problems = network(**NETWORKS[name])
    for p, got in zip(problems, run(problems, which), strict=True):
        alone = p.run(which)
        for key, value in got.items():
            assert value.dtype == alone[key].dtype, key
            torch.testing.assert_close(value, alone[key], rtol=0, atol=0, equal_nan=True)


@networks
def test_triton_agrees_with_the_reference(name: str) -> None:
    problems = network(**NETWORKS[name])
    for p, got in zip(problems, run(problems, "triton", DEVICE), strict=True):
        assert_agree(p, got)


@pytest.mark.parametrize("which", ["reference", CPU, "triton"])
@pytest.mark.parametrize("groups", [None, (0, 1, 0, 1)])
def test_memory_formats_are_kept(which: str, groups: tuple[int, ...] | None) -> None:
    problems = network(LSQ, groups=groups)
    xs, small = leaves(problems, DEVICE if which == "triton" else "cpu")
    with backend(which):
        ys = mix_quantize_many(xs, *small, *core(problems[0].case))
        alone = torch.ops.qprune.mix_quantize
        steps, zero_point, order, through = core(problems[0].case)
        for x, y, b, r, q in zip(xs, ys, *(t.split([x.size(0) for x in xs]) for t in small), strict=True):
            want = alone(x, b, r, q, steps, zero_point, 0, order, through, None, x.dtype)
            assert (y.shape, y.stride()) == (want.shape, want.stride())


class Count:
    """Stands for a kernel and counts its launches and programs."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.grids = kernel, []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.grids.append(grid)
        return self.kernel[grid]


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> tuple[Count, Count]:
    forward, backward = Count(multi.mix_quantize_many_fwd_kernel), Count(multi_grad.mix_quantize_many_bwd_kernel)
    monkeypatch.setattr(multi, "mix_quantize_many_fwd_kernel", forward)
    monkeypatch.setattr(multi_grad, "mix_quantize_many_bwd_kernel", backward)
    return forward, backward


DEEP = [((4, 2 + i % 7, 1, 1), "contiguous") for i in range(53)]


def test_one_launch_in_each_pass(counts: tuple[Count, Count]) -> None:
    problems = network(ONE, DEEP)
    got = run(problems, "triton", DEVICE)
    assert [len(count.grids) for count in counts] == [1, 1]
    for p, one in zip(problems, got, strict=True):
        assert_agree(p, one)


def test_a_launch_takes_so_many_weights(counts: tuple[Count, Count], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_multi, "MOST", 3)
    multi_table._launches.cache_clear()
    problems = network(DOREFA, SHAPES[:7], groups=(0, 1, 0))
    got = run(problems, "triton", DEVICE)
    multi_table._launches.cache_clear()
    assert [len(count.grids) for count in counts] == [3, 3]
    for p, one in zip(problems, got, strict=True):
        assert_agree(p, one)


def test_weights_of_several_dtypes(counts: tuple[Count, Count]) -> None:
    problems = [problem(Case("", (6, 4, 3, 3), LSQ, dtype=dtype)) for dtype in (torch.float32, torch.float16, torch.float32)]
    for p, got in zip(problems, run(problems, "triton", DEVICE), strict=True):
        assert_agree(p, got)
    assert [len(count.grids) for count in counts] == [2, 2]


def test_launch_parameters_do_not_change_results(counts: tuple[Count, Count]) -> None:
    """With several tiles for a weight, and several blocks of rows in a tile."""
    problems = network(DOREFA, [((6, 3, 7, 7), "contiguous"), *SHAPES[1:5]], groups=(0, 1, 0))
    want = run(problems, "triton", DEVICE)
    with launch.pinned(many_threads=128, many_blocks=8, many_warps=2):
        got = run(problems, "triton", DEVICE)
    assert all(programs > len(problems) for count in counts for (programs,) in count.grids[1:])
    for p, a, b in zip(problems, got, want, strict=True):
        assert_agree(p, a)
        for key in () if GPU else ("y", "x"):
            assert torch.equal(a[key], b[key]), key


@pytest.mark.parametrize("which", [CPU, "triton"])
def test_same_bits_every_time(which: str) -> None:
    problems = network(SYMMETRIC, SHAPES[:7])
    with launch.pinned(many_threads=512):
        first, again = (run(problems, which, DEVICE if which == "triton" else "cpu") for _ in range(2))
    for a, b in zip(first, again, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("which", ["reference", CPU, "triton"])
def test_outputs_that_nothing_uses(which: str) -> None:
    device = DEVICE if which == "triton" else "cpu"
    problems = network(DOREFA, SHAPES[:5])
    xs, small = leaves(problems, device)
    with backend(which):
        ys = mix_quantize_many(xs, *small, *core(problems[0].case))
        ys[2].backward(problems[2].grad.to(device))
    assert_agree(problems[2], dict(zip(("x", "y"), (xs[2].grad.cpu(), ys[2].detach().cpu()))) | _rows_of(small, xs, 2))
    for i in (0, 1, 3, 4):
        assert torch.count_nonzero(xs[i].grad) == 0
        assert all(torch.count_nonzero(value) == 0 for value in _rows_of(small, xs, i).values())


def _rows_of(small: Sequence[Tensor], xs: Sequence[Tensor], i: int) -> dict[str, Tensor]:
    """Gradients of the parameters of weight i."""
    rows = [x.size(0) for x in xs]
    return {name: t.grad.cpu().split(rows)[i] for name, t in zip(("offset", "range", "p"), small, strict=True)}


@pytest.mark.parametrize("which", ["reference", CPU, "triton"])
def test_frozen_weights(which: str) -> None:
    device = DEVICE if which == "triton" else "cpu"
    problems = network(DOREFA, SHAPES[:4])
    xs, small = leaves(problems, device)
    xs[1].requires_grad_(False)
    with backend(which):
        ys = mix_quantize_many(xs, *small, *core(problems[0].case))
        torch.autograd.backward(ys, [p.grad.to(device) for p in problems])
    assert xs[1].grad is None
    for i in (0, 2, 3):
        assert_agree(problems[i], {"x": xs[i].grad.cpu(), "y": ys[i].detach().cpu()} | _rows_of(small, xs, i))


@pytest.mark.parametrize("which", ["reference", CPU, "triton"])
def test_offset_gradient_only_where_it_is_wanted(which: str) -> None:
    device = DEVICE if which == "triton" else "cpu"
    problems = network(DOREFA, SHAPES[:4])
    xs, small = leaves(problems, device)
    steps, zero_point, groups, through = core(problems[0].case)
    grads = [p.grad.to(device) for p in problems]
    op = torch.ops.qprune.mix_quantize_many_backward
    with backend(which), torch.no_grad():
        dxs, *want = op(grads, xs, *small, steps, zero_point, groups, through, True)
        dxs2, *got = op(grads, xs, *small, steps, zero_point, groups, through, False)
    assert want[0].abs().sum() > 0
    assert which == "reference" or torch.count_nonzero(got[0]) == 0
    torch.testing.assert_close([*dxs, *want[1:]], [*dxs2, *got[1:]])


@pytest.mark.parametrize("which", ["reference", CPU, "triton"])
def test_no_weights_and_empty_weights(which: str) -> None:
    device = DEVICE if which == "triton" else "cpu"
    none = torch.zeros(0, 3, device=device)
    with backend(which):
        assert mix_quantize_many([], none, none, none, [3, 7, 15], [2, 4, 8], [0, 0, 0], [0, 0, 0]) == []
        problems = network(DOREFA, SHAPES[:2])
        empty = [torch.zeros(0, 4, 3, 3, device=device), torch.zeros(3, 0, 3, 3, device=device)]
        xs, small = leaves(problems, device)
        all_xs = [xs[0], *empty, xs[1]]
        rows = (16, 3)
        padded = [torch.cat([t[: rows[0]], torch.ones(rows[1], 3, device=device), t[rows[0] :]]).detach().requires_grad_() for t in small]
        ys = mix_quantize_many(all_xs, *padded, *core(problems[0].case))
        assert [y.shape for y in ys] == [x.shape for x in all_xs]
        torch.autograd.backward([ys[0], ys[3]], [p.grad.to(device) for p in problems])
    for i, p in ((0, problems[0]), (3, problems[1])):
        assert_agree(p, {"x": all_xs[i].grad.cpu(), "y": ys[i].detach().cpu()} | _rows_of(padded, all_xs, i))
    assert all(torch.count_nonzero(value) == 0 for value in _rows_of(padded, all_xs, 2).values())


def test_float64_takes_the_reference() -> None:
    problems = network(LSQ, SHAPES[:2])
    xs, small = ([t.detach().double() for t in ts] for ts in leaves(problems, DEVICE))
    with backend("triton"):
        ys = mix_quantize_many(xs, *small, *core(problems[0].case))
    for p, y in zip(problems, ys, strict=True):
        assert torch.equal(y.cpu(), p.run("reference", double=True)["y"])


@pytest.mark.parametrize("which", ["reference", CPU, "triton"])
def test_output_in_another_dtype(which: str) -> None:
    """Under autocast the outputs are bfloat16 while the weights and their gradients stay float32."""
    device = DEVICE if which == "triton" else "cpu"
    problems = network(LSQ, SHAPES[:4], groups=(0, 1, 0, 1))
    with torch.autocast(device, dtype=torch.bfloat16):
        results = run(problems, which, device)
    for p, got in zip(problems, results, strict=True):
        want = p.run("reference")
        assert got["y"].dtype == torch.bfloat16
        assert got["x"].dtype == torch.float32
        torch.testing.assert_close(got["y"].float(), want["y"], rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(got["p"], want["p"], rtol=2e-2, atol=2e-1)


def test_weight_that_starts_off_a_16_byte_boundary() -> None:
    problems = network(DOREFA, [((6, 40), "contiguous"), ((4, 8, 3, 3), "contiguous")])
    x = torch.empty(1 + problems[0].x.numel(), device=DEVICE)[1:].view(6, 40)
    shifted = dataclasses.replace(problems[0], x=x.copy_(problems[0].x))
    net = launch_multi.network(tuple((p.x.shape, p.x.stride()) for p in problems), 1)
    for first, vectors in ((problems[0], [4]), (shifted, [4, 1])):
        xs = [first.x.to(DEVICE), problems[1].x.to(DEVICE)]
        (part,), alone = multi_table.launches(net, xs, [torch.empty_like(x) for x in xs])
        assert [block.vector for block in part.blocks] == vectors
        assert alone == []
    for p, got in zip((shifted, problems[1]), run([shifted, problems[1]], "triton", DEVICE), strict=True):
        assert_agree(p, got)


def _resnet() -> Iterator[tuple[int, ...]]:
    yield (64, 3, 7, 7)
    for width in (64, 128, 256, 512):
        yield from ((width, 4 * width, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1), (4 * width, 1, 3, 3))
    yield (1000, 2048)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("last", [False, True])
def test_the_table_covers_every_element_once(groups: int, last: bool) -> None:
    xs = [torch.empty(shape, device="meta") for shape in _resnet()]
    xs = [x.contiguous(memory_format=torch.channels_last) if last and x.dim() == 4 else x for x in xs]
    net = launch_multi.network(tuple((x.shape, x.stride()) for x in xs), groups)
    ((part, kind),), alone = launch_multi.parts(net, ("fp32",) * len(xs), (4,) * len(xs), launch_multi.tile(False), 132)
    assert kind == "fp32"
    assert alone == []
    assert len(part.blocks) <= 6
    ends = [0] * len(xs)
    starts = [sum(net.rows[:i]) for i in range(len(xs))]
    costs = []
    for tile in sorted(part.tiles):
        layer, block, first, rows, row, repeat, inner = tile
        assert (first, row) == (ends[layer], starts[layer] + first)
        assert repeat * inner * xs[layer].size(0) == xs[layer].numel()
        assert (inner == net.layouts[layer].block) or groups == 1
        assert inner % part.blocks[block].vector == 0
        ends[layer] += rows
    for _, block, _, rows, _, repeat, inner in part.tiles:
        shape = part.blocks[block]
        costs.append(-(-rows // shape.rows) * (1 + repeat * -(-inner // shape.inner)))
    assert ends == list(net.rows)
    assert costs == sorted(costs, reverse=True)


SMALL: list[tuple[tuple[int, ...], str]] = [((4, 8, 3, 3), "channels_last"), ((5, 9), "contiguous"), ((3, 4, 2, 2), "transposed")]


@pytest.mark.parametrize("groups", [None, (0, 1, 0)])
@pytest.mark.parametrize("which", ["reference", CPU, "triton"])
def test_opcheck(which: str, groups: tuple[int, ...] | None) -> None:
    problems = network(DOREFA, SMALL, groups=groups)
    xs, small = leaves(problems, DEVICE if which == "triton" else "cpu")
    steps, zero_point, order, through = core(problems[0].case)
    with backend(which):
        torch.library.opcheck(torch.ops.qprune.mix_quantize_many, (xs, *small, steps, zero_point, order, through, None))
        plain, params = [x.detach() for x in xs], [t.detach() for t in small]
        grads = [torch.randn_like(y) for y in mix_quantize_many(plain, *params, steps, zero_point, order, through)]
        # the gradient operator is not differentiable itself, so its autograd registration is not among the checks
        torch.library.opcheck(
            torch.ops.qprune.mix_quantize_many_backward,
            (grads, plain, *params, steps, zero_point, order, through, True),
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static"),
        )


@pytest.mark.parametrize("which", ["reference", CPU, "triton"])
def test_compile_without_graph_breaks(which: str) -> None:
    device = DEVICE if which == "triton" else "cpu"
    problems = network(DOREFA, SMALL, groups=(0, 1, 0))
    case = problems[0].case

    def function(xs: list[Tensor], offset: Tensor, range: Tensor, p: Tensor) -> list[Tensor]:
        return [y.relu() for y in mix_quantize_many([2 * x for x in xs], offset, range.exp(), p.softmax(-1), *core(case))]

    def gradients(called: Any) -> list[Tensor]:
        xs, small = leaves(problems, device)
        ys = called(xs, *small)
        torch.autograd.backward(ys, [concatenated(p.grad, p.case).to(device) for p in problems])
        return [*(y.detach() for y in ys), *(t.grad for t in (*xs, *small) if t.grad is not None)]

    torch._dynamo.reset()
    with backend(which):
        eager, compiled = gradients(function), gradients(torch.compile(function, backend="aot_eager", fullgraph=True))
    for a, b in zip(eager, compiled, strict=True):
        assert a.stride() == b.stride()
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_keeps_weights_and_parameters() -> None:
    xs, small = leaves(network(LSQ))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t), backend("reference"):
        mix_quantize_many(xs, *small, *core(Case("", (1, 1), LSQ)))
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in (*xs, *small)}


def test_second_derivatives_are_refused() -> None:
    problems = network(DOREFA, SHAPES[:2])
    xs, small = leaves(problems)
    ys = mix_quantize_many(xs, *small, *core(problems[0].case))
    (dx,) = torch.autograd.grad(sum(y.square().sum() for y in ys), xs[:1], create_graph=True)
    with pytest.raises(QPruneError, match="no second derivatives"):
        dx.sum().backward()


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_cuda_graph() -> None:
    problems = network(LSQ, groups=(0, 1, 0, 1))[:8]
    xs, small = leaves(problems, DEVICE)
    leaf = [*xs, *small]
    grads = [concatenated(p.grad, p.case).to(DEVICE) for p in problems]

    def step() -> tuple[Tensor, ...]:
        ys = mix_quantize_many(xs, *small, *core(problems[0].case))
        return (*ys, *torch.autograd.grad(ys, leaf, grads))

    with backend("triton"):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        with torch.no_grad():
            for t in xs:
                t.mul_(0.5)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))

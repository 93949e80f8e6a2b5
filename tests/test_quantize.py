"""The Triton kernels of mix_quantize against the reference: on the GPU where there is one, else in Triton's interpreter.

The interpreter cuts float32 off when it stores bfloat16, instead of rounding to nearest, so a value may be one bfloat16 step (2⁻⁷ relative)
away; the tolerance of `cases.assert_agree` for bfloat16 is two steps on either machine. It also keeps a multiplication and an addition
apart, which a GPU contracts, so equality of codes bit for bit is only asked of the interpreter.
"""

from __future__ import annotations

import math

import pytest
import torch
from cases import CASES, DOREFA, LSQ, PARAMS, SYMMETRIC, UNSIGNED, WITH_SPECIAL, Case, Problem, assert_agree, near_boundary, problem
from interpreter import DEVICE, GPU, interpret, interpreted, tl, triton

import qprune.kernels.layout
from qprune.functional import mix_quantize
from qprune.kernels import backend, launch, reference

__all__ = ["interpret"]
pytestmark = pytest.mark.gpu

with interpreted():
    from qprune.kernels import candidates
    from qprune.kernels.candidates import uniform

    @triton.jit
    def draw_kernel(p_seed, p_index, p_out, N: tl.constexpr):  # type: ignore[no-untyped-def]
        o_n = tl.arange(0, N)
        tl.store(p_out + o_n, uniform(tl.load(p_seed), tl.load(p_index + o_n)))


@pytest.mark.parametrize("case", PARAMS)
def test_agrees_with_the_reference(case: Case) -> None:
    p = problem(case)
    assert_agree(p, p.run("triton", DEVICE))


UNUSUAL = [
    Case("axis-2-grouped", (3, 4, 5, 6), LSQ, axis=2, groups=(0, 1, 0, 1)),
    Case("axis-2-grouped-channels-last", (3, 4, 5, 6), LSQ, axis=2, layout="channels_last", groups=(0, 1, 0, 1)),
    Case("axis-3-grouped-channels-last", (3, 4, 5, 6), LSQ, axis=3, layout="channels_last", groups=(0, 1, 1, 1)),
    Case("axis-1-grouped", (3, 4, 5, 6), UNSIGNED, axis=1, groups=(0, 1, 2, 1, 0)),
    Case("axis-1-grouped-channels-last", (3, 4, 5, 6), UNSIGNED, axis=1, layout="channels_last", groups=(0, 1, 2, 1, 0)),
    Case("vector-grouped", (19,), LSQ, groups=(0, 1, 0, 1)),
    Case("noise-grouped", (6, 4, 3, 3), SYMMETRIC, groups=(0, 1, 0, 1), noise=True),
    Case("volume-channels", (2, 5, 3, 4, 4), UNSIGNED, axis=1),
]


@pytest.mark.parametrize("case", UNUSUAL, ids=lambda c: c.name)
def test_unusual_axes(case: Case) -> None:
    p = problem(case)
    assert_agree(p, p.run("triton", DEVICE))


def _case(name: str) -> Problem:
    return problem(next(c for c in CASES if c.name == name))


PINS = {
    "weight-3x3-filter": {"block_channels": 4, "block_inner": 16, "splits_inner": 3, "vector": 1, "warps": 1},
    "weight-channels-last-grouped": {"block_outer": 2, "block_channels": 8, "block_inner": 8, "splits_outer": 2, "vector": 2},
    "act-nchw-channel": {"block_outer": 1, "block_channels": 2, "block_inner": 32, "splits_inner": 2, "finish_channels": 1},
    "act-nhwc-tensor": {"block_inner": 128, "splits_inner": 3, "vector": 8, "finish_splits": 1},
    "act-nhwc-channel": {"block_outer": 16, "block_channels": 4, "splits_outer": 3, "warps": 2},
    "act-nhwc-joint": {"block_outer": 8, "block_inner": 16, "splits_outer": 4, "vector": 4},
    "weight-long-rows": {"block_channels": 2, "block_inner": 1024, "splits_inner": 2, "vector": 4},
}


@pytest.mark.parametrize("name", PINS)
def test_launch_parameters_do_not_change_results(name: str) -> None:
    p = _case(name)
    want = p.run("triton", DEVICE)
    with launch.pinned(**PINS[name]):
        got = p.run("triton", DEVICE)
    assert_agree(p, got)
    for key in () if GPU else ("y", "x"):
        assert torch.equal(got[key], want[key]), key
    for key in ("offset", "range", "p"):
        torch.testing.assert_close(got[key], want[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["weight-3x3-layer", "act-nchw-channel", "noise-act"])
def test_same_bits_every_time(name: str) -> None:
    p = _case(name)
    with launch.pinned(block_inner=256, splits_inner=2, splits_outer=2):
        first = p.run("triton", DEVICE)
        for _ in range(2):
            again = p.run("triton", DEVICE)
            assert all(torch.equal(first[key], again[key]) for key in first)


@pytest.mark.parametrize("seed", [0, 1, 0x1234_5678_9ABC, -1, -(2**63)])
def test_noise_is_the_reference_stream(seed: int) -> None:
    key = torch.tensor([seed], device=DEVICE)
    index = torch.cat([torch.arange(200), torch.arange(2**32 - 8, 2**32 + 40), 2**40 + torch.arange(8)]).to(DEVICE)
    out = torch.empty(index.numel(), device=DEVICE)
    draw_kernel[(1,)](key, index, out, out.numel())
    assert torch.equal(out, reference.philox_uniform(key, index) - 0.5)


@pytest.mark.parametrize("chosen", range(4))
@pytest.mark.parametrize("grid", [LSQ, SYMMETRIC], ids=["lsq", "symmetric"])
def test_one_candidate_gives_the_reference_codes(grid: tuple[list[float], list[float]], chosen: int) -> None:
    p = problem(Case("codes", (16, 64), grid))
    p.offset.zero_()
    p.p.zero_()[:, chosen] = 1.0
    got, want = (p.run(name, device)["y"] for name, device in (("triton", DEVICE), ("reference", "cpu")))
    n, z = grid[0][chosen], grid[1][chosen]
    codes = [torch.round(y / (p.range[:, chosen, None] / n)) + z for y in (got, want)]
    differ = codes[0] != codes[1]
    assert not (differ & ~near_boundary(p)).any() if GPU else torch.equal(got, want)
    assert codes[0].min() >= 0
    assert codes[0].max() <= n


ONE_CLIP = [
    Case("flat", (3, 8, 7, 9), UNSIGNED, axis=1, rows=False, layout="channels_last"),
    Case("channels", (2, 40, 9, 7), UNSIGNED, axis=1, layout="channels_last"),
    Case("filters", (17, 5, 3, 3), DOREFA),
    Case("unequal-zero-points", (8, 4, 3, 3), LSQ),
    Case("grouped", (9, 10, 3, 3), UNSIGNED, groups=(1, 0, 2, 1, 0)),
    Case("special", (12, 6, 3, 3), WITH_SPECIAL),
    Case("pass-through", (16, 8, 3, 3), SYMMETRIC, pass_through=True),
    Case("nan", (8, 4, 3, 3), SYMMETRIC, special="nan"),
    Case("inf", (8, 4, 3, 3), SYMMETRIC, special="inf"),
    Case("noise", (16, 8, 3, 3), SYMMETRIC, noise=True),
    Case("bf16", (2, 32, 8, 8), UNSIGNED, axis=1, layout="channels_last", dtype=torch.bfloat16),
]


@pytest.mark.parametrize("case", ONE_CLIP, ids=lambda c: c.name)
def test_one_clip_for_all_candidates(case: Case) -> None:
    """Expanded columns of offset and range take a shorter path, which agrees with the reference and, to rounding, with the general path."""
    p = problem(case)
    p.offset, p.range = (t[..., :1].clone() for t in (p.offset, p.range))
    p.offset, p.range = (t.expand(p.p.shape) for t in (p.offset, p.range))
    got = p.run("triton", DEVICE)
    assert_agree(p, got)
    p.offset, p.range = p.offset.clone(), p.range.clone()
    general = p.run("triton", DEVICE)
    if not GPU:
        torch.testing.assert_close(got["y"], general["y"], rtol=0, atol=0, equal_nan=True)
    tolerance = 1e-5 if case.dtype == torch.float32 else 1.6e-2
    for key in ("x", "offset", "range", "p"):
        torch.testing.assert_close(got[key], general[key], rtol=tolerance, atol=tolerance, equal_nan=True)


def test_strides_tell_one_clip() -> None:
    column, full = torch.rand(6, 1), torch.rand(6, 4)
    assert candidates.one_clip(column.expand(6, 4), torch.rand(1, 1).expand(6, 4))
    assert candidates.one_clip(column, column)
    assert not candidates.one_clip(column.expand(6, 4), full)
    assert not candidates.one_clip(full[:1].expand(6, 4), column.expand(6, 4))


@pytest.mark.parametrize(
    ("grid", "shared", "clip", "part"),
    [
        (UNSIGNED, True, (0, 0, 0, 0, 0), (0, 1, 0, 1, 0)),
        (UNSIGNED, False, (0, 1, 2, 3, 4), (0, 1, 2, 3, 4)),
        (([0, 2, 6, 255, -1], [0, 1, 3, 128, 0]), True, (0, 1, 1, 3, 4), (0, 1, 2, 3, 4)),
    ],
)
def test_candidates_that_clip_alike(
    grid: tuple[list[float], list[float]], shared: bool, clip: tuple[int, ...], part: tuple[int, ...]
) -> None:
    assert candidates.clips(tuple(grid[0]), tuple(grid[1]), (0, 1, 0, 1, 0), shared) == (clip, part)


def test_one_clip_is_seen_through_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = candidates.clips

    def clips(*args: object) -> object:
        seen.append(args[-1])
        return original(*args)

    monkeypatch.setattr(candidates, "clips", clips)
    p = _case("act-nhwc-tensor")
    p.run("triton", DEVICE)
    assert not any(seen)
    seen.clear()
    p.offset, p.range = p.offset[:1].expand(5), p.range[:1].expand(5)
    p.run("triton", DEVICE)
    assert seen
    assert all(seen)


def test_output_in_another_dtype() -> None:
    """Under autocast the output is bfloat16 while x and its gradient stay float32."""
    p = _case("act-nhwc-tensor")
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got = p.run("triton", DEVICE)
    want = p.run("reference")
    assert got["y"].dtype == torch.bfloat16
    assert got["x"].dtype == torch.float32
    torch.testing.assert_close(got["y"].float(), want["y"], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(got["p"], want["p"], rtol=2e-2, atol=2e-1)


def test_view_that_starts_off_a_16_byte_boundary() -> None:
    x = torch.randn(1 + 6 * 40, device=DEVICE)[1:].view(6, 40)
    range_, p = torch.full((6, 2), 2.0, device=DEVICE), torch.full((6, 2), 0.5, device=DEVICE)
    ys = []
    for name in ("triton", "reference"):
        with backend(name):
            ys.append(mix_quantize(x, torch.zeros_like(p), range_, p, [3, 15], [2, 8]))
    torch.testing.assert_close(ys[0], ys[1])


def test_offset_gradient_is_zero_unless_wanted() -> None:
    p = _case("act-nchw-channel")
    x, range_, mix = (t.to(DEVICE) for t in (p.x, p.range, p.p))
    op = torch.ops.qprune.mix_quantize_backward
    with backend("triton"):
        arguments = (p.grad.to(DEVICE), x, torch.zeros_like(mix), range_, mix, *p.case.grid, 1, [0] * 5, [0] * 5, None)
        with_offset, without = op(*arguments, True), op(*arguments, False)
    assert with_offset[1].abs().sum() > 0
    assert torch.equal(without[1], torch.zeros_like(without[1]))
    for i in (0, 2, 3):
        torch.testing.assert_close(with_offset[i], without[i])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("axis", [None, 0, 1, 2, 3])
def test_the_view_is_the_layout(axis: int | None, groups: int, layout: str) -> None:
    """Every storage position is visited once, with the right channel and the right place in the output."""
    x = torch.empty(3, 4, 5, 6)
    x = x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x
    described = qprune.kernels.layout.describe(x, 1 if axis is None else x.size(axis), axis or 0, groups)
    v = launch.view(described)
    o, c, i = torch.meshgrid(torch.arange(v.outer), torch.arange(v.channels), torch.arange(v.inner), indexing="ij")
    position = (o * v.x_outer + c * v.x_channel + i).flatten()
    assert torch.equal(position.sort().values, torch.arange(x.numel()))
    assert torch.equal(c.flatten() % described.channels, position // described.inner % described.channels)
    for m in range(groups):
        out = (o * v.y_outer + c * v.y_channel + i + m * v.y_group).flatten()
        block = described.block
        assert torch.equal(out, position // block * groups * block + m * block + position % block)


@pytest.mark.parametrize("state", [8, 11, 16, 31, 60])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize(
    "layout",
    [
        qprune.kernels.layout.Layout(2**26, 1, 2**26, 1, 2**26),
        qprune.kernels.layout.Layout(2**21, 512, 2**12, 1, 2**21),
        qprune.kernels.layout.Layout(32 * 256 * 3136, 256, 1, 1, 32 * 256 * 3136),
        qprune.kernels.layout.Layout(32 * 256 * 3136, 1, 32 * 256 * 3136, 3, 256),
    ],
    ids=["flat", "rows", "channels", "joint"],
)
def test_all_programs_of_a_large_tensor_run_at_once(layout: qprune.kernels.layout.Layout, itemsize: int, state: int) -> None:
    v, device = launch.view(layout), launch.Device(132, 90)
    for tile in (launch.forward(v, itemsize, device, state), launch.backward(v, itemsize, device, state)):
        programs = math.prod(candidates.grid(v, tile))
        resident = -(-programs // device.processors)
        assert resident * tile.registers * 32 * tile.warps <= 65536
        assert 32 * tile.warps * resident >= 384
        assert tile.vector * itemsize <= 16


def test_pins_are_checked_and_end_with_the_block() -> None:
    v = launch.view(qprune.kernels.layout.Layout(4096, 1, 4096, 1, 4096))
    device = launch.Device(132, 90)
    before = launch.forward(v, 2, device, 16)
    with launch.pinned(warps=8), launch.pinned(block_inner=512):
        assert (launch.forward(v, 2, device, 16).warps, launch.forward(v, 2, device, 16).block_inner) == (8, 512)
    assert launch.forward(v, 2, device, 16) == before
    with pytest.raises(TypeError, match="no launch parameter is called block_none"):
        launch.pinned(block_none=3)

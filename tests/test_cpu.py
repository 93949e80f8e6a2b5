"""The C++ kernels against the reference, and the ways in which they come into being or fail to."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import DOREFA, LSQ, PARAMS, SYMMETRIC, UNSIGNED, WITH_SPECIAL, Case, assert_agree, problem
from torch import Tensor

from qprune.functional import mix_quantize
from qprune.kernels import BackendError, backend, cpu, dispatch
from qprune.kernels.cpu import build

if isinstance(dispatch._module("cpu", "quantize"), str):
    pytest.skip(f"no CPU kernels here: {dispatch._module('cpu', 'quantize')}", allow_module_level=True)

TEN = ([1.0, 2, 3, 7, 15, 31, 63, 127, 255, 1023], [0.5, 1, 2, 4, 8, 16, 32, 64, 128, 512])
SHARED = ([3.0, 15, 255], [0.0, 0, 0])

# What the common table does not reach: several passes, several units, tables of parameters with every kind of buffer.
MORE = [
    Case("ten-candidates", (6, 50), TEN),
    Case("ten-candidates-nhwc-channel", (2, 5, 9, 9), TEN, axis=1, layout="channels_last"),
    Case("ten-candidates-grouped", (6, 5, 3, 3), TEN, groups=(0, 1, 0, 0, 0, 0, 0, 0, 0, 0)),
    Case("long-rows", (3, 70_001), LSQ),
    Case("long-tensor-bf16", (5, 8, 41, 61), UNSIGNED, axis=1, rows=False, dtype=torch.bfloat16),
    Case("many-short-rows", (4001, 9), SYMMETRIC),
    Case("nchw-channel-many-images", (600, 3, 5, 5), UNSIGNED, axis=1),
    Case("nchw-channel-large-map", (2, 3, 131, 131), DOREFA, axis=1, pass_through=True),
    Case("nhwc-channel-many-pixels", (9, 7, 31, 33), LSQ, axis=1, layout="channels_last"),
    Case("nhwc-channel-wide", (3, 1030, 6, 6), DOREFA, axis=1, layout="channels_last", pass_through=True),
    Case("nhwc-channel-wide-fp16", (2, 1300, 5, 5), UNSIGNED, axis=1, layout="channels_last", dtype=torch.float16),
    Case("nhwc-channel-bf16", (4, 24, 9, 9), UNSIGNED, axis=1, layout="channels_last", dtype=torch.bfloat16),
    Case("nhwc-channel-noise", (2, 12, 17, 9), UNSIGNED, axis=1, layout="channels_last", noise=True),
    Case("nhwc-channel-grouped", (2, 12, 9, 9), LSQ, axis=1, layout="channels_last", groups=(1, 0, 1, 2)),
    Case("nhwc-channel-special", (2, 12, 9, 9), WITH_SPECIAL, axis=1, layout="channels_last"),
    Case("special-grouped", (8, 4, 3, 3), WITH_SPECIAL, groups=(0, 1, 1, 2)),
    Case("special-pass-through", (8, 40), WITH_SPECIAL, pass_through=True),
    Case("noise-bf16-grouped", (8, 4, 3, 3), LSQ, dtype=torch.bfloat16, groups=(0, 1, 0, 1), noise=True),
]


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", PARAMS + [pytest.param(case, id=case.name) for case in MORE])
def test_agrees_with_the_reference(case: Case) -> None:
    made = problem(case)
    assert_agree(made, made.run("cpu"))


@pytest.mark.parametrize("rows", [True, False], ids=["rows", "tensor"])
@pytest.mark.parametrize("grid", [SHARED, DOREFA], ids=["unsigned", "dorefa"])
def test_shared_range(rows: bool, grid: tuple[list[float], list[float]]) -> None:
    made = problem(Case("shared", (10, 9, 7, 7), grid, rows=rows))
    made.range = made.range[..., :1].expand_as(made.range).contiguous()
    made.offset = made.offset[..., :1].expand_as(made.offset).contiguous()
    assert_agree(made, made.run("cpu"))


@pytest.mark.parametrize(
    "case",
    [
        Case("rows", (64, 700), LSQ),
        Case("tensor", (9, 16, 32, 32), UNSIGNED, axis=1, rows=False, layout="channels_last"),
        Case("table", (16, 24, 32, 32), UNSIGNED, axis=1, layout="channels_last"),
        Case("images", (40, 24, 16, 16), UNSIGNED, axis=1),
    ],
    ids=lambda case: case.name,
)
def test_same_bits_every_time_and_for_any_number_of_threads(case: Case, threads: Callable[[int], None]) -> None:
    made = problem(case)
    threads(1)
    first = made.run("cpu")
    for count in [1] * 4 + [2] * 14 + [3] * 2:
        threads(count)
        for name, value in made.run("cpu").items():
            assert torch.equal(value, first[name]), f"{name} with {count} threads"


def both(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    with backend("cpu"):
        fast = mix_quantize(*args, **kwargs)
    with backend("reference"):
        return fast, mix_quantize(*args, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("grid", [LSQ, SYMMETRIC, UNSIGNED], ids=["lsq", "symmetric", "unsigned"])
def test_one_hot_weights_give_the_same_codes_bit_for_bit(dtype: torch.dtype, grid: tuple[list[float], list[float]]) -> None:
    k = len(grid[0])
    x, range_ = torch.randn(40, 5000).to(dtype), 1 + 2 * torch.rand(40, k)
    for i in [*torch.arange(k).tolist()]:
        p = torch.zeros(40, k)
        p[:, i] = 1
        assert torch.equal(*both(x, torch.zeros(40, k), range_, p, *grid)), f"candidate {i}"


def test_offsets_and_noise_change_the_last_bit_at_most() -> None:
    x, one, seed = torch.randn(8, 3, 50, 50), torch.ones(1), torch.tensor([2**40 + 17])
    for extra in ({}, {"seed": seed}):
        fast, slow = both(x, 0.3 * one, 4 * one, one, [15], [8], **extra)
        assert (fast - slow).abs().max() <= 5e-7


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [Case("rows", (8, 40), LSQ), Case("groups", (4, 8, 6, 6), LSQ, axis=1, rows=False, groups=(0, 1, 0, 1))])
def test_output_dtype_may_differ_under_autocast(case: Case, x_dtype: torch.dtype) -> None:
    made = problem(case)
    made.x = made.x.to(x_dtype)
    results = []
    for name in ("cpu", "reference"):
        leaves = [t.clone().requires_grad_() for t in (made.x, made.offset, made.range, made.p)]
        with backend(name), torch.autocast("cpu", torch.bfloat16):
            y = mix_quantize(*leaves, *case.grid, axis=case.axis, groups=case.groups)
            assert y.dtype == torch.bfloat16
            y.backward(made.grad.bfloat16())
        assert leaves[0].grad.dtype == x_dtype
        results.append([y, *(leaf.grad for leaf in leaves)])
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1.6e-2, atol=1.6e-2)


def test_large_tensor() -> None:
    made = problem(Case("large", (96, 4608), LSQ))
    assert_agree(made, made.run("cpu"), flips=1e-4)


def test_bf16_error_is_below_that_of_the_plain_formulation() -> None:
    made = problem(Case("bf16", (16, 3000), LSQ, dtype=torch.bfloat16))
    exact = made.run("reference", double=True)["y"]
    plain = torch.zeros_like(made.x)
    for k, (n, z) in enumerate(zip(*made.case.grid, strict=True)):
        offset, range_, p = (t[:, k : k + 1].bfloat16() for t in (made.offset, made.range, made.p))
        q = (((made.x - offset) * (1 / range_) + z / n).clamp(0, 1) * n).round()
        plain = plain + p * (offset + (q - z) * (range_ / n))
    error = (made.run("cpu")["y"].double() - exact).abs().mean()
    assert error <= 2 * (plain.double() - exact).abs().mean()


def test_gradients_do_not_depend_on_which_are_wanted() -> None:
    made = problem(Case("wanted", (8, 33), LSQ))
    full = made.run("cpu")
    with backend("cpu"):
        x, p = made.x.clone().requires_grad_(), made.p.clone().requires_grad_()
        mix_quantize(x, made.offset, made.range, p, *LSQ).backward(made.grad)
    assert torch.equal(x.grad, full["x"]) and torch.equal(p.grad, full["p"])


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A machine where the library was never built: an empty cache, and names that no installed file has."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(build, "library_name", lambda: "absent.so")
    cpu.load.cache_clear()
    dispatch._module.cache_clear()
    yield tmp_path / "qprune"
    cpu.load.cache_clear()
    dispatch._module.cache_clear()


@pytest.mark.parametrize("broken", ["no compiler", "compiler fails", "compiler is missing"])
def test_without_a_compiler_the_reference_runs(
    broken: str, bare: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if broken == "no compiler":
        monkeypatch.setattr(build, "compiler", lambda: None)
    else:
        monkeypatch.setenv("CXX", "false" if broken == "compiler fails" else str(bare / "nothing"))
    x, one = torch.randn(9), torch.ones(1)
    with backend("reference"):
        want = mix_quantize(x, 0 * one, one, one, [15], [8])
    with caplog.at_level(logging.WARNING, logger="qprune"):
        assert torch.equal(mix_quantize(x, 0 * one, one, one, [15], [8]), want)
        assert torch.equal(mix_quantize(x, 0 * one, one, one, [15], [8]), want)
    assert [record.getMessage().count("\n") for record in caplog.records if "reference runs" in record.getMessage()] == [0]
    with (
        backend("cpu"),
        pytest.raises(BackendError, match=r"the cpu backend was asked for and is not available: .*no CPU kernels"),
    ):
        mix_quantize(x, 0 * one, one, one, [15], [8])
    assert not [path for path in bare.glob("*") if path.suffix != ".lock"], "nothing half-made is left behind"


def test_a_file_that_is_no_library_is_reported(bare: Path) -> None:
    bare.mkdir()
    (bare / "absent.so").write_text("torn")
    with pytest.raises(BackendError, match="no CPU kernels"):
        cpu.load()


def test_compiles_once_and_says_so(bare: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    made = []
    monkeypatch.setattr(build, "build", lambda output: made.append(output) or output.write_text("library"))
    assert cpu._locate() == cpu._locate() == bare / "absent.so"
    assert made == [bare / "absent.so"]
    assert [record.getMessage().startswith("qprune: compiling the CPU kernels once") for record in caplog.records] == [True]


def test_lock_of_a_killed_process_does_not_block(tmp_path: Path) -> None:
    lock = tmp_path / "library.lock"
    hold = f"import fcntl, time; f = open({str(lock)!r}, 'w'); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        process.send_signal(signal.SIGKILL)
    assert lock.exists()
    with build.locked(lock):
        pass


def test_reference_backend_compiles_nothing(tmp_path: Path) -> None:
    code = (
        "import sys, torch; from qprune.functional import mix_quantize; o = torch.ones(1);"
        "mix_quantize(torch.randn(3), 0 * o, o, o, [15], [8]); assert 'qprune.kernels.cpu' not in sys.modules"
    )
    environment = {**os.environ, "QPRUNE_BACKEND": "reference", "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=Path(__file__).parent.parent)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_other_instruction_sets_agree(capability: str) -> None:
    code = (
        "import sys; sys.path.insert(0, 'tests'); from cases import CASES, assert_agree, problem\n"
        "for case in CASES: made = problem(case); assert_agree(made, made.run('cpu'))"
    )
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=Path(__file__).parent.parent)

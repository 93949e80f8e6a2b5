"""The public function: what it refuses and how it says so, the layout of groups, and the choice of a backend."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qprune.functional import mix_quantize
from qprune.kernels import BackendError, InputError, QPruneError, backend, dispatch


def arguments(**changes: Any) -> dict[str, Any]:
    valid = {
        "x": torch.randn(4, 6),
        "offset": torch.zeros(2),
        "range": torch.ones(2),
        "p": torch.full((2,), 0.5),
        "steps": [3, 15],
        "zero_point": [2, 8],
    }
    return {**valid, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(4, 6, dtype=torch.int64)}, r"x must be a floating-point tensor, got torch\.int64: convert it with x\.float\(\)"),
        ({"x": torch.tensor(1.0)}, r"axis 0 is not a dimension of x with shape \(\)"),
        ({"axis": 2}, r"axis 2 is not a dimension of x with shape \(4, 6\)"),
        ({"axis": -3}, r"axis -3 is not a dimension of x with shape \(4, 6\)"),
        ({"offset": torch.zeros(3)}, r"offset must be \[K\] or \[C, K\] = \[4, 2\] for axis 0, got \(3,\)"),
        ({"range": torch.ones(6, 2)}, r"range must be \[K\] or \[C, K\] = \[4, 2\] for axis 0, got \(6, 2\)"),
        ({"range": torch.ones(4, 2), "axis": 1}, r"range must be \[K\] or \[C, K\] = \[6, 2\] for axis 1, got \(4, 2\)"),
        ({"p": torch.ones(2, 2, 2)}, r"p must be \[K\] or \[C, K\] = \[4, 2\] for axis 0, got \(2, 2, 2\)"),
        ({"p": torch.ones(2, device="meta")}, r"p is on meta, x on cpu"),
        ({"steps": [3]}, r"steps and zero_point must hold K = 2 ≥ 1 numbers, got 1 and 2"),
        ({"zero_point": []}, r"steps and zero_point must hold K = 2 ≥ 1 numbers, got 2 and 0"),
        ({"steps": [3, -2]}, r"steps must be integers from 0 to 2097152, or math\.inf for full precision, got -2"),
        ({"steps": [3, 2**22]}, r"steps must be integers from 0 to 2097152, or math\.inf for full precision, got 4194304"),
        ({"steps": [3, 2.5]}, r"steps must be integers .*, got 2\.5"),
        ({"steps": [3, math.nan]}, r"steps must be integers .*, got nan"),
        ({"steps": [3, -math.inf]}, r"steps must be integers .*, got -inf"),
        ({"zero_point": [2, 16]}, r"zero_point must be a multiple of 1/2 between 0 and steps = 15, got 16"),
        ({"zero_point": [-1, 8]}, r"zero_point must be a multiple of 1/2 between 0 and steps = 3, got -1"),
        ({"zero_point": [0.25, 8]}, r"zero_point must be a multiple of 1/2 between 0 and steps = 3, got 0\.25"),
        ({"zero_point": [math.nan, 8]}, r"zero_point must be a multiple of 1/2 .*, got nan"),
        ({"groups": [0]}, r"groups must number K = 2 candidates 0 … M−1 without gaps, got \[0\]"),
        ({"groups": [0, 2]}, r"groups must number K = 2 candidates 0 … M−1 without gaps, got \[0, 2\]"),
        ({"groups": [1, 1]}, r"groups must number K = 2 candidates 0 … M−1 without gaps, got \[1, 1\]"),
        ({"pass_through": [True]}, r"pass_through must be a bool or K = 2 bools, got 1"),
        ({"seed": torch.tensor([1.0])}, r"seed must be one int64 number as a tensor, got torch\.float32 of shape \(1,\)"),
        ({"seed": torch.tensor([1, 2])}, r"seed must be one int64 number as a tensor, got torch\.int64 of shape \(2,\)"),
    ],
)
def test_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=rf"^mix_quantize: {message}") as caught:
        mix_quantize(**arguments(**changes))
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, QPruneError)
    assert "\n" not in str(caught.value)


def test_no_candidates() -> None:
    empty = torch.zeros(0)
    with pytest.raises(InputError, match="K = 0 ≥ 1"):
        mix_quantize(torch.randn(3), empty, empty, empty, [], [])


def test_steps_may_be_pruned_or_infinite() -> None:
    x = torch.randn(4, 6)
    y = mix_quantize(**arguments(x=x, steps=[0, math.inf], zero_point=[99, 99], p=torch.tensor([0.7, 0.25])))
    assert torch.equal(y, 0.25 * x)


@pytest.mark.parametrize("shape", [(2,), (1, 2), (4, 2)], ids=str)
def test_parameters_per_tensor_or_per_row_broadcast(shape: tuple[int, ...]) -> None:
    changes = arguments(p=torch.full(shape, 0.5), range=torch.ones(shape))
    torch.testing.assert_close(mix_quantize(**changes), mix_quantize(**arguments(x=changes["x"])))


@pytest.mark.parametrize("parameters", [torch.float64, torch.bfloat16], ids=str)
def test_parameters_of_other_dtypes_get_gradients_of_theirs(parameters: torch.dtype) -> None:
    p = torch.full((2,), 0.5, dtype=parameters, requires_grad=True)
    mix_quantize(**arguments(p=p)).sum().backward()
    assert p.grad is not None and p.grad.dtype == parameters


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_groups_are_laid_out_for_a_convolution(memory_format: torch.memory_format) -> None:
    x = torch.randn(3, 4, 5, 6).contiguous(memory_format=memory_format)
    out = mix_quantize(**arguments(x=x, groups=[1, 0]))
    assert out.shape == (2, 3, 4, 5, 6)
    joined = out.movedim(0, 1).flatten(1, 2)
    assert joined.data_ptr() == out.data_ptr()
    assert joined.is_contiguous(memory_format=memory_format)
    for m, k in ((0, 1), (1, 0)):
        alone = {name: arguments()[name][k : k + 1] for name in ("offset", "range", "p", "steps", "zero_point")}
        assert torch.equal(out[m], mix_quantize(x, **alone))


def test_one_group_keeps_its_dimension() -> None:
    changes = arguments(groups=[0, 0])
    assert torch.equal(mix_quantize(**changes)[0], mix_quantize(**arguments(x=changes["x"])))


def test_negative_axis_counts_from_the_end() -> None:
    p = torch.rand(6, 2)
    changes = arguments(p=p)
    assert torch.equal(mix_quantize(**changes, axis=-1), mix_quantize(**changes, axis=1))


@pytest.mark.parametrize("rows", [True, False], ids=["rows", "tensor"])
def test_vectors(rows: bool) -> None:
    x, p = torch.randn(7), torch.rand(7, 2) if rows else torch.rand(2)
    y = mix_quantize(**arguments(x=x, p=p))
    assert y.shape == (7,)
    grouped = mix_quantize(**arguments(x=x, p=p, groups=[0, 1]))
    assert grouped.shape == (2, 7)
    torch.testing.assert_close(grouped.sum(0), y)


def test_pass_through_per_candidate() -> None:
    x = torch.tensor([-9.0, 0.1, 9.0], requires_grad=True)
    mix_quantize(**arguments(x=x, pass_through=[True, False], p=torch.tensor([0.25, 0.75]))).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0.25, 1.0, 0.25]


def test_backend_nests_and_restores() -> None:
    assert dispatch._chosen is None
    with backend("reference"):
        with backend("cpu"):
            assert dispatch._chosen == "cpu"
            with backend(None):
                assert dispatch._chosen is None
            assert dispatch._chosen == "cpu"
        assert dispatch._chosen == "reference"
        with pytest.raises(ZeroDivisionError), backend("cpu"):
            raise ZeroDivisionError
        assert dispatch._chosen == "reference"
    assert dispatch._chosen is None


def test_backend_as_a_call_stays_until_the_next() -> None:
    try:
        backend("reference")
        assert dispatch.select(torch.zeros(1)) is None
    finally:
        backend(None)
    assert dispatch._chosen is None


def test_unknown_backends_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match="unknown backend 'cuda': expected one of reference, cpu, triton"):
        backend("cuda")
    assert dispatch._chosen is None
    monkeypatch.setenv("QPRUNE_BACKEND", "fast")
    with pytest.raises(BackendError, match="unknown backend 'fast'"):
        mix_quantize(**arguments())


def test_backend_of_another_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with backend("triton"), pytest.raises(BackendError, match="the tensor is on cpu: move it to CUDA, or set TRITON_INTERPRET=1"):
        mix_quantize(**arguments())
    with backend("cpu"), pytest.raises(BackendError, match="the tensor is on meta: use backend"):
        dispatch.select(torch.zeros(1, device="meta"))


def test_environment_variable_chooses_and_the_call_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1)
    monkeypatch.setenv("QPRUNE_BACKEND", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendError, match="the triton backend was asked for"):
        dispatch.select(x)
    with backend("reference"):
        assert dispatch.select(x) is None
    monkeypatch.setenv("QPRUNE_BACKEND", "reference")
    assert dispatch.select(x) is None


def test_environment_variable_of_a_process() -> None:
    code = "import torch; from qprune.kernels import dispatch; print(dispatch.select(torch.zeros(1)))"
    environment = {**os.environ, "QPRUNE_BACKEND": "reference"}
    folder = Path(__file__).parent.parent
    run = subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=folder, capture_output=True, text=True)
    assert run.stdout == "None\n"


def test_float64_takes_the_reference_under_every_backend() -> None:
    double = {name: t.double() if isinstance(t, torch.Tensor) else t for name, t in arguments().items()}
    with backend("cpu"):
        y = mix_quantize(**double)
    assert y.dtype == torch.float64
    with backend("reference"):
        assert torch.equal(y, mix_quantize(**double))

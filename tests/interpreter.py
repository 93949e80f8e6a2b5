"""Triton for the tests of kernels: compiled where there is a GPU, else interpreted.

`@triton.jit` and Triton's own library look at TRITON_INTERPRET once, at their import, so kernels are imported here, in one place, with the
variable set. What another test of this process imported otherwise is imported again. A test file that imports this module is skipped
where Triton is missing, and uses the fixture `interpret`, which sets the variable while a test runs.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from qprune.kernels import dispatch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


def _mend_interpreter() -> None:
    """Before Triton 3.7, `range` over a tensor calls int() on an array of one number, which NumPy 2.4 refuses."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    original = interpreter._patch_lang_tensor

    def patch(tensor: Any, *scope: Any) -> None:
        original(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patch


def _import_kernels() -> None:
    for operation in dispatch.OPERATIONS["triton"]:
        importlib.import_module(f"qprune.kernels.{operation}")


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Functions that are decorated with @triton.jit inside are interpreted where there is no GPU."""
    with pytest.MonkeyPatch.context() as patch:
        if not GPU:
            patch.setenv("TRITON_INTERPRET", "1")
        yield


def _interpret_kernels() -> None:
    kernels = [name for name, module in sys.modules.items() if name.startswith("qprune.kernels.") and hasattr(module, "triton")]
    stale = [name for name in sys.modules if name.split(".")[0] == "triton" and not name.startswith("triton._C")]
    for name in (*kernels, *stale):
        sys.modules.pop(name, None)
    with interpreted():
        triton = importlib.import_module("triton")
        if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
            _mend_interpreter()
        _import_kernels()
    dispatch._module.cache_clear()


if not GPU:
    _interpret_kernels()

import triton  # noqa: E402
import triton.language as tl  # noqa: E402


@pytest.fixture(autouse=True)
def interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Import this fixture into a test file: its tests run with Triton on the GPU, or interpreted."""
    if not GPU:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


__all__ = ["DEVICE", "GPU", "interpret", "interpreted", "tl", "triton"]

"""Which implementation runs: chosen by name, by the variable QPRUNE_BACKEND, or by the device of the tensor."""

from __future__ import annotations

import functools
import importlib
import logging
import os
from types import ModuleType, TracebackType

import torch

from .errors import BackendError

NAMES = ("reference", "cpu", "triton")
OPERATIONS = {"cpu": ("quantize", "multi"), "triton": ("quantize", "multi", "conv", "depthwise", "int8")}
"""What each backend has kernels for; the reference has everything."""

log = logging.getLogger("qprune")
_chosen: str | None = None


def _check(name: str) -> str:
    if name not in NAMES:
        raise BackendError(f"unknown backend {name!r}: expected one of {', '.join(NAMES)}")
    return name


class backend:
    """Choose the implementation of the fused operations: `backend("reference")`, as a call or as a `with` block.

    name  "reference" (plain PyTorch, any device), "cpu" (C++, CPU tensors), "triton" (CUDA tensors, or CPU tensors under
          TRITON_INTERPRET=1),
          or None for the default: triton for CUDA tensors and cpu for CPU tensors, where they are available, else reference.

    A named backend that cannot run raises BackendError at the call that needs it; the default falls back to the reference with one log
    line. The environment variable QPRUNE_BACKEND sets the same for a whole process. float64 tensors always take the reference.
    """

    def __init__(self, name: str | None) -> None:
        global _chosen
        self.previous = _chosen
        _chosen = None if name is None else _check(name)

    def __enter__(self) -> backend:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        global _chosen
        _chosen = self.previous


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _module(name: str, operation: str) -> ModuleType | str:
    """The launcher module of a backend, or the reason why there is none."""
    try:
        if name == "cpu":
            module = importlib.import_module(".cpu", __package__)
            module.load()
        else:
            module = importlib.import_module(f".{operation}", __package__)
    except (ImportError, BackendError, OSError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        log.warning("qprune: no %s kernels (%s); the slower PyTorch reference runs instead", name, reason)
        return reason
    return module


def select(x: torch.Tensor, operation: str = "quantize") -> ModuleType | None:
    """The module with an operation's launchers for x (kernels/cpu, or kernels/<operation>.py with Triton), or None for the reference."""
    name = _chosen or (_check(os.environ["QPRUNE_BACKEND"]) if os.environ.get("QPRUNE_BACKEND") else None)
    if name == "reference" or x.dtype == torch.float64:
        return None
    if name == "cpu" and x.device.type != "cpu":
        raise BackendError(f"the cpu backend was asked for, but the tensor is on {x.device}: use backend('triton') or None")
    if name == "triton" and not x.is_cuda and not (interpreting() and x.device.type == "cpu"):
        raise BackendError(
            f"the triton backend was asked for, but the tensor is on {x.device}: move it to CUDA, or set TRITON_INTERPRET=1 to interpret"
        )
    wanted = name or {"cuda": "triton", "cpu": "cpu"}.get(x.device.type)
    if wanted is None or operation not in OPERATIONS[wanted]:
        return None
    module = _module(wanted, operation)
    if isinstance(module, ModuleType):
        return module
    if name is not None:
        raise BackendError(f"the {name} backend was asked for and is not available: {module}")
    return None

"""The CPU kernels: one C++ library, compiled at first use or when the package is installed, called on raw addresses."""

from __future__ import annotations

import ctypes
import functools
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .. import layout as layout_module
from ..errors import BackendError
from . import build

log = logging.getLogger("qprune")
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _Candidates(ctypes.Structure):
    _fields_ = [
        ("count", ctypes.c_int64),
        ("steps", ctypes.POINTER(ctypes.c_float)),
        ("zero", ctypes.POINTER(ctypes.c_float)),
        ("group", ctypes.POINTER(ctypes.c_int64)),
        ("through", ctypes.POINTER(ctypes.c_int64)),
    ]


class _Layout(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("numel", "channels", "inner", "groups", "block")]


def _locate() -> Path:
    """The library: beside this file (installed), else in the cache, where it is compiled if it is missing."""
    name = build.library_name()
    cached = build.cache_folder() / name
    for path in (Path(__file__).parent / name, cached):
        if path.is_file():
            return path
    with build.locked(cached.with_suffix(".lock")):
        if not cached.is_file():
            log.warning("qprune: compiling the CPU kernels once (well under a minute), cached in %s", cached.parent)
            start = time.perf_counter()
            build.build(cached)
            log.info("qprune: compiled the CPU kernels in %.0f s", time.perf_counter() - start)
    return cached


@functools.cache
def load() -> ctypes.CDLL:
    """The compiled library. Raises BackendError with one line if there is none and none can be made."""
    try:
        library = ctypes.CDLL(str(_locate()))
    except (RuntimeError, OSError) as error:
        raise BackendError(f"no CPU kernels: {error}") from error
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    layout, candidates = ctypes.POINTER(_Layout), ctypes.POINTER(_Candidates)
    library.qprune_forward.argtypes = [layout, candidates, pointer, number, pointer, number, *[pointer] * 4]
    library.qprune_backward.argtypes = [layout, candidates, pointer, number, pointer, number, *[pointer] * 5, number, *[pointer] * 3]
    return library


@functools.lru_cache(maxsize=256)
def _candidates(steps: tuple[float, ...], zero_point: tuple[float, ...], groups: tuple[int, ...], through: tuple[int, ...]) -> _Candidates:
    k = len(steps)
    floats, ints = ctypes.c_float * k, ctypes.c_int64 * k
    return _Candidates(k, floats(*steps), floats(*zero_point), ints(*groups), ints(*through))


@functools.lru_cache(maxsize=1024)
def _layout(layout: layout_module.Layout) -> _Layout:
    return _Layout(layout.numel, layout.channels, layout.inner, layout.groups, layout.block)


def forward(
    x: Tensor,
    out: Tensor,
    offset: Tensor,
    range: Tensor,
    p: Tensor,
    steps: Sequence[float],
    zero_point: Sequence[float],
    groups: Sequence[int],
    seed: Tensor | None,
    layout: layout_module.Layout,
) -> None:
    """Write V_1 … V_M into `out`.

    x, out            float32, bfloat16 or float16, dense, as `layout` describes them; their dtypes may differ
    offset, range, p  [C, K] or [1, K] float32
    seed              [1] int64, or None for rounding
    """
    offset, range, p = offset.contiguous(), range.contiguous(), p.contiguous()
    candidates = _candidates(tuple(steps), tuple(zero_point), tuple(groups), (0,) * len(steps))
    failed = load().qprune_forward(
        _layout(layout), candidates, x.data_ptr(), _TYPES[x.dtype], out.data_ptr(), _TYPES[out.dtype],
        offset.data_ptr(), range.data_ptr(), p.data_ptr(), None if seed is None else seed.data_ptr(),
    )  # fmt: skip
    if failed:
        raise MemoryError("mix_quantize: no memory for the workspace of the CPU kernel")


def backward(
    grad: Tensor,
    x: Tensor,
    offset: Tensor,
    range: Tensor,
    p: Tensor,
    steps: Sequence[float],
    zero_point: Sequence[float],
    groups: Sequence[int],
    pass_through: Sequence[int],
    seed: Tensor | None,
    layout: layout_module.Layout,
    need_offset: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx like x, and d_offset, d_range, d_p like p, from the gradient of what `forward` wrote. d_offset is zero unless need_offset.

    The sums over elements are cut by the layout alone, so the result does not depend on the number of threads.
    """
    offset, range, p = offset.contiguous(), range.contiguous(), p.contiguous()
    dx = layout_module.empty_output(x, 1, x.dtype)
    d_offset, d_range, d_p = torch.empty_like(p), torch.empty_like(p), torch.empty_like(p)
    candidates = _candidates(tuple(steps), tuple(zero_point), tuple(groups), tuple(pass_through))
    failed = load().qprune_backward(
        _layout(layout), candidates, grad.data_ptr(), _TYPES[grad.dtype], x.data_ptr(), _TYPES[x.dtype], dx.data_ptr(),
        offset.data_ptr(), range.data_ptr(), p.data_ptr(), None if seed is None else seed.data_ptr(), need_offset,
        d_offset.data_ptr(), d_range.data_ptr(), d_p.data_ptr(),
    )  # fmt: skip
    if failed:
        raise MemoryError("mix_quantize: no memory for the workspace of the CPU kernel")
    return dx, d_offset, d_range, d_p

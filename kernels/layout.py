"""How a tensor lies in memory, reduced to five numbers that every kernel understands.

The kernels never see shapes. They walk over the storage of a dense tensor, whatever the order of its dimensions, and need to know

    numel      elements of x
    channels   C, the number of rows of the [C, K] parameters (1: one row for the whole tensor)
    inner      the channel of storage position i is  (i // inner) % channels
    groups     M, the number of output tensors
    block      group m of storage position i is written at  (i // block) * M * block + m * block + i % block

The M outputs are interleaved so that they form one tensor concatenated along dimension 1, in the memory format of x: the input-channel axis
of a weight [F, C, kh, kw] and the channel axis of an activation [N, C, H, W]. A convolution consumes it without a copy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    numel: int
    channels: int
    inner: int
    groups: int
    block: int


def _memory_format(x: Tensor) -> torch.memory_format:
    for rank, fmt in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.dim() == rank and not x.is_contiguous() and x.is_contiguous(memory_format=fmt):
            return fmt
    return torch.contiguous_format


def _is_dense(x: Tensor) -> bool:
    """True if the storage holds each element of x exactly once, without gaps (dimensions of size 1 do not matter)."""
    expected = 1
    for stride, size in sorted((x.stride(i), x.size(i)) for i in range(x.dim()) if x.size(i) != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def dense(x: Tensor, groups: int) -> Tensor:
    """x itself where the kernels can walk over its storage, else a contiguous copy."""
    if groups == 1:
        return x if _is_dense(x) else x.contiguous()
    return x.contiguous(memory_format=_memory_format(x))


def describe(x: Tensor, channels: int, axis: int, groups: int) -> Layout:
    """The layout of a tensor that `dense` returned."""
    numel = x.numel()
    inner = x.stride(axis) if channels > 1 else max(numel, 1)
    if groups == 1:
        block = max(numel, 1)
    elif _memory_format(x) is torch.contiguous_format:
        block = math.prod(x.shape[1:])
    else:
        block = x.size(1)
    return Layout(numel, channels, inner, groups, max(block, 1))


def empty_output(x: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """Room for M outputs side by side along dimension 1, in x's memory format. x as `dense` returns it."""
    if groups == 1:
        return torch.empty_like(x, dtype=dtype)
    return empty((x.size(0), groups * x.size(1), *x.shape[2:]), x, dtype)


def empty(shape: Sequence[int], like: Tensor, dtype: torch.dtype) -> Tensor:
    """Room for a result of another shape, in the memory format (if it is of the same rank) and on the device of `like`."""
    memory_format = _memory_format(like) if len(shape) == like.dim() else torch.contiguous_format
    return torch.empty(tuple(shape), dtype=dtype, device=like.device, memory_format=memory_format)


def like_output(grad: Tensor, x: Tensor, groups: int) -> Tensor:
    """The gradient of the output, copied only if its memory order differs from the output's."""
    if groups > 1:
        return grad.contiguous(memory_format=_memory_format(x))
    same = all(g == s for g, s, n in zip(grad.stride(), x.stride(), x.shape, strict=True) if n != 1)
    return grad if same else torch.empty_like(x, dtype=grad.dtype).copy_(grad)

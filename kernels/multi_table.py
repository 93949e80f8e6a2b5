"""What the forward and the backward kernel for many weights share: addresses, tiles and launch arguments."""

# The arguments of a @triton.jit function have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment"

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch_multi
from .candidates import device_of
from .launch_multi import Block, ManyTile, Network

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def pick(addresses, i, LAYERS: tl.constexpr):
    """Address number i of a tuple of arguments. It compiles to one selection of an argument's place for each, and one load."""
    address = addresses[0]
    for j in tl.static_range(1, LAYERS):
        address = tl.where(i == j, addresses[j], address)
    return address


@triton.jit
def load_tile(p_table):
    """The columns of this program's tile. Rows are int64, and so is every address that follows from them."""
    p_tile = p_table + tl.program_id(0).to(tl.int64) * 7
    layer = tl.load(p_tile)
    block = tl.load(p_tile + 1)
    first = tl.load(p_tile + 2).to(tl.int64)
    rows = tl.load(p_tile + 3)
    row = tl.load(p_tile + 4).to(tl.int64)
    repeat = tl.load(p_tile + 5)
    inner = tl.load(p_tile + 6)
    return layer, block, first, rows, row, repeat, inner


@triton.jit
def wide(p_first, o_block, VECTOR: tl.constexpr):
    """p_first + o_block [BR, BI] with the promise that groups of VECTOR lie together, on 16 bytes."""
    p_block = p_first + o_block
    if VECTOR > 1:
        # a promise counts where the pointers are made, not on an argument of a function
        p_block = tl.max_contiguous(tl.multiple_of(p_block, [1, 16]), [1, VECTOR])
    return p_block


def constants(
    blocks: Sequence[Block], layers: int, steps: Sequence[float], zero_point: Sequence[float], groups: Sequence[int]
) -> dict[str, Any]:
    """The compile-time arguments that the forward and the backward kernel share, but for dtypes."""
    return {
        "LAYERS": layers, "K": len(steps), "M": max(groups) + 1, "STEPS": tuple(steps), "ZERO": tuple(zero_point), "GROUPS": tuple(groups),
        "SHAPES": len(blocks), "BLOCK_ROWS": tuple(b.rows for b in blocks), "BLOCK_INNER": tuple(b.inner for b in blocks),
        "BLOCK_VECTOR": tuple(b.vector for b in blocks),
    }  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """One launch: its weights, their dtype and that of the other tensors, the table on the device, and the blocks."""

    layers: tuple[int, ...]
    dtypes: tuple[tl.dtype, tl.dtype]
    table: Tensor
    blocks: tuple[Block, ...]
    warps: int

    @property
    def grid(self) -> tuple[int]:
        return (self.table.size(0),)

    def addresses(self, tensors: Sequence[Tensor]) -> tuple[int, ...]:
        return tuple([tensors[i].data_ptr() for i in self.layers])


@functools.lru_cache(maxsize=64)
def _launches(
    net: Network,
    dtypes: tuple[tuple[torch.dtype, torch.dtype], ...],
    unaligned: tuple[int, ...],
    device: torch.device,
    processors: int,
    tile: ManyTile,
) -> tuple[list[Launch], list[int]]:
    vectors = [16 // max(x.itemsize, other.itemsize) for x, other in dtypes]
    for i in unaligned:
        vectors[i] = 1
    todo, alone = launch_multi.parts(net, dtypes, tuple(vectors), tile, processors)
    made = []
    for part, (x, other) in todo:
        table = torch.tensor(part.tiles, dtype=torch.int32).to(device)
        made.append(Launch(part.layers, (TYPES[x], TYPES[other]), table, part.blocks, tile.many_warps))
    return made, alone


def launches(net: Network, xs: Sequence[Tensor], others: Sequence[Tensor]) -> tuple[list[Launch], list[int]]:
    """The launches over weights and their outputs (or the gradients of those), and the weights that need their own.

    The first call for a network and these dtypes uploads the tables; later ones, and a CUDA graph's, find them.
    """
    device = device_of(xs[0])
    dtypes = tuple([(x.dtype, other.dtype) for x, other in zip(xs, others, strict=True)])
    unaligned = tuple([i for i, (x, other) in enumerate(zip(xs, others, strict=True)) if (x.data_ptr() | other.data_ptr()) % 16])
    return _launches(net, dtypes, unaligned, xs[0].device, device.processors, launch_multi.tile(device.interpreted))

"""The weights of a whole network as one launch: how each lies in memory, and the table of tiles that the programs work through.

A weight [F, …] is F rows, one for each row of the parameters. A row is `repeat` runs of `inner` elements: one run of the whole row, except
for several groups in channels_last, whose outputs are interleaved pixel by pixel. A block is [rows, inner]; a program owns a tile of whole
rows of one weight and walks over it block by block, so each row is summed by one program, in a fixed order, and needs no second kernel.

Nothing here imports Triton, and nothing depends on measured timings: the same shapes always get the same launch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import TypeVar

import torch

from . import layout
from .launch import pin, pinnable
from .layout import Layout

_Kind = TypeVar("_Kind", bound=Hashable)

MOST = 128
"""Weights of one launch: three addresses for each fill three quarters of the 4 KB of arguments that every driver takes."""

COLUMNS = ("layer", "block", "first", "rows", "row", "repeat", "inner")
"""A row of the table: number of the weight in the launch, number of its block shape, first row in the weight, number of rows, first row in
the parameters, and the lengths of a row."""


@dataclass(frozen=True, eq=False)
class Network:
    """What follows from the shapes and strides of some weights, for `groups` outputs each.

    dense     whether the kernels can walk over a weight's storage; else it is copied
    layouts   of the weights, after that
    rows      F of each weight
    strides   of the outputs, and so of gradients that need no copy
    """

    dense: tuple[bool, ...]
    layouts: tuple[Layout, ...]
    rows: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    groups: int


@functools.lru_cache(maxsize=128)
def network(shapes: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...], groups: int) -> Network:
    """The network whose weights have these (shape, strides). One object for equal arguments."""
    meta = [torch.empty_strided(shape, strides, device="meta") for shape, strides in shapes]
    dense = [layout.dense(x, groups) for x in meta]
    layouts = tuple(layout.describe(x, x.size(0), 0, groups) for x in dense)
    outputs = [layout.empty_output(x, groups, x.dtype).stride() for x in dense]
    return Network(tuple(a is b for a, b in zip(meta, dense, strict=True)), layouts, tuple(x.size(0) for x in meta), tuple(outputs), groups)


@pinnable
@dataclass(frozen=True)
class ManyTile:
    """A block has many_threads times as many elements as one memory access of a thread; a program has up to many_blocks blocks."""

    many_threads: int
    many_blocks: int
    many_warps: int


def tile(interpreted: bool) -> ManyTile:
    """One access of each thread in a block of four warps. Few and large blocks for the interpreter."""
    return pin(ManyTile(2048, 64, 4) if interpreted else ManyTile(128, 24, 4))


@dataclass(frozen=True)
class Block:
    """Rows and elements of a row in a block, and elements per access: 16 bytes of the wider dtype, or one where rows are not aligned."""

    rows: int
    inner: int
    vector: int


@dataclass(frozen=True)
class Part:
    """One launch: the weights that take part, the shapes of blocks, and the tiles, rows of COLUMNS, largest first."""

    layers: tuple[int, ...]
    blocks: tuple[Block, ...]
    tiles: tuple[tuple[int, ...], ...]


def together(described: Layout) -> bool:
    """Whether a weight's rows lie one after the other, which a launch for many weights needs. Not so for transposed or empty ones."""
    return described.numel > 0 and described.inner * described.channels == described.numel


def _block(inner: int, vector: int, threads: int) -> Block:
    """The widest of three blocks that wastes at most 1/8 of its elements on rows of `inner`, else the one that wastes least.

    A row of the widest lies in one warp, so that sums over it need no shared memory.
    """
    size = threads * vector
    widths = [max(size // part, vector) for part in ((4, 16, 64) if vector > 1 else (4, 8, 16))]
    padded = {width: -(-inner // width) * width for width in widths}
    width = next((width for width in widths if 8 * padded[width] <= 9 * inner), min(widths, key=lambda width: padded[width]))
    return Block(size // width, width, vector)


@dataclass(frozen=True)
class _Rows:
    """A weight in a launch: `cost` blocks for as many rows as a block has, of which the first stands for loading parameters."""

    layer: int
    block: Block
    rows: int
    row: int
    repeat: int
    inner: int

    @property
    def cost(self) -> int:
        return 1 + self.repeat * -(-self.inner // self.block.inner)


def _part(members: list[tuple[int, Layout, int, int]], chosen: ManyTile, processors: int) -> Part:
    """The launch of some weights, each (position in the network, layout, first row of the parameters, elements per access)."""
    weights = []
    for layer, (_, described, row, vector) in enumerate(members):
        length = described.numel // described.channels
        inner = length if described.groups == 1 else described.block
        vector = vector if inner % vector == 0 else 1
        block = _block(inner, vector, chosen.many_threads)
        weights.append(_Rows(layer, block, described.channels, row, length // inner, inner))
    blocks = tuple(sorted({w.block for w in weights}, key=lambda block: (-block.vector, -block.inner)))
    total = sum(w.cost * math.ceil(w.rows / w.block.rows) for w in weights)
    target = min(max(total // (16 * processors), 4), chosen.many_blocks)
    tiles = []
    for w in weights:
        step = w.block.rows * max(1, target // w.cost)
        for first in range(0, w.rows, step):
            rows = min(step, w.rows - first)
            cost = w.cost * math.ceil(rows / w.block.rows)
            tiles.append((-cost, (w.layer, blocks.index(w.block), first, rows, w.row + first, w.repeat, w.inner)))
    tiles.sort(key=lambda tile: tile[0])
    return Part(tuple(position for position, *_ in members), blocks, tuple(columns for _, columns in tiles))


def parts(
    net: Network, kinds: tuple[_Kind, ...], vectors: tuple[int, ...], chosen: ManyTile, processors: int
) -> tuple[list[tuple[Part, _Kind]], list[int]]:
    """The launches for a network, each with its kind, and the positions of weights whose rows do not lie together.

    kinds    what all weights of one launch have in common: their dtypes
    vectors  elements per memory access, as dtypes and addresses allow
    """
    members: dict[_Kind, list[tuple[int, Layout, int, int]]] = {}
    alone = []
    row = 0
    for position, (described, rows) in enumerate(zip(net.layouts, net.rows, strict=True)):
        if together(described):
            members.setdefault(kinds[position], []).append((position, described, row, vectors[position]))
        else:
            alone.append(position)
        row += rows
    launches = [
        (_part(of_kind[start : start + MOST], chosen, processors), kind)
        for kind, of_kind in members.items()
        for start in range(0, len(of_kind), MOST)
    ]
    return launches, alone

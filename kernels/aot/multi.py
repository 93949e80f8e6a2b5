"""The configurations of mix_quantize_many: each block shape by itself, for its instructions, and whole networks, for their registers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .. import launch_multi, multi, multi_grad, multi_table
from .build import PROCESSORS, Budget, Build

GRIDS: dict[int, tuple[tuple[float, ...], tuple[float, ...]]] = {
    1: ((15,), (8,)),
    3: ((1, 3, 15), (0.5, 1.5, 7.5)),
    5: ((3, 7, 15, 63, 255), (2, 4, 8, 32, 128)),
    8: ((0, 3, 7, 15, 31, 63, 255, -1), (0, 2, 4, 8, 16, 32, 128, 0)),
}

_BYTES = {"fp32": 4, "bf16": 2}
_TYPES = {"fp32": multi_table.TYPES[torch.float32], "bf16": multi_table.TYPES[torch.bfloat16]}

Shape = tuple[int, ...]


def _bottlenecks() -> list[Shape]:
    """The weights of a ResNet-50."""
    shapes: list[Shape] = [(64, 3, 7, 7)]
    channels = 64
    for width, depth in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for i in range(depth):
            shapes += [(width, channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            shapes += [(4 * width, channels, 1, 1)] * (i == 0)
            channels = 4 * width
    return [*shapes, (1000, channels)]


def _basic() -> list[Shape]:
    """The weights of a ResNet-18."""
    shapes: list[Shape] = [(64, 3, 7, 7)]
    channels = 64
    for width in (64, 128, 256, 512):
        shapes += [(width, channels, 3, 3), *[(width, width, 3, 3)] * 3, *[(width, channels, 1, 1)] * (width > 64)]
        channels = width
    return [*shapes, (1000, channels)]


def _inverted() -> list[Shape]:
    """The weights of a MobileNetV2."""
    shapes: list[Shape] = [(32, 3, 3, 3), (32, 1, 3, 3), (16, 32, 1, 1)]
    channels = 16
    for width, depth in ((24, 2), (32, 3), (64, 4), (96, 3), (160, 3), (320, 1)):
        for _ in range(depth):
            shapes += [(6 * channels, channels, 1, 1), (6 * channels, 1, 3, 3), (width, 6 * channels, 1, 1)]
            channels = width
    return [*shapes, (1280, channels, 1, 1), (1000, 1280)]


NETWORKS: dict[str, Sequence[Shape]] = {
    "ResNet-18": _basic(),
    "ResNet-50": _bottlenecks(),
    "MobileNetV2": _inverted(),
    "most": [(512, 512, 3, 3)] * launch_multi.MOST,
    "long rows": [(512, 512, 3, 3)],
    "rows of 64": [(256, 64, 1, 1)],
    "rows of 16": [(96, 16, 1, 1)],
    "rows of 9": [(960, 1, 3, 3)],
    "rows of 147": [(64, 3, 7, 7)],
}
"""Those of one weight have one block shape, whose loop is measured."""


@dataclass(frozen=True)
class Config:
    """y is the dtype of outputs and gradients; last says that the weights of several groups are in channels_last."""

    kernel: str
    network: str
    k: int
    y: str = "fp32"
    m: int = 1
    x: str = "fp32"
    last: bool = False
    offset: bool = False
    arch: int = 90


def _configs(quick: bool) -> Iterator[Config]:
    for kernel in ("forward", "backward"):
        yield Config(kernel, "long rows", 5, offset=kernel == "backward")
        yield Config(kernel, "ResNet-50", 5, "bf16")
        yield Config(kernel, "ResNet-50", 5, arch=80)
        if quick:
            continue
        for k in GRIDS:
            yield from (Config(kernel, "ResNet-50", k, y) for y in _BYTES if (k, y) != (5, "bf16"))
            yield from (Config(kernel, "ResNet-18", k, y, 3) for y in _BYTES if k >= 3)
            yield from (Config(kernel, "long rows", k, y) for y in _BYTES)
        yield from (Config(kernel, "ResNet-50", 5, y, 3, last=True) for y in _BYTES)
        yield from (Config(kernel, "MobileNetV2", k, y) for k in (5, 8) for y in _BYTES)
        yield Config(kernel, "MobileNetV2", 5, "bf16", 3)
        yield from (Config(kernel, name, 5, y) for name in ("rows of 64", "rows of 16", "rows of 9", "rows of 147") for y in _BYTES)
        yield Config(kernel, "long rows", 5, "bf16", x="bf16")
        yield Config(kernel, "long rows", 5, m=3)
        yield Config(kernel, "most", 5)
    yield Config("backward", "ResNet-50", 5, offset=True)


def _part(c: Config) -> tuple[launch_multi.Part, launch_multi.ManyTile]:
    """The launch of the network, as the launcher would make it."""
    shapes = []
    for shape in NETWORKS[c.network]:
        strides = [1] * len(shape)
        order = [1, 3, 2, 0] if c.last and len(shape) == 4 else [*range(len(shape) - 1, -1, -1)]
        for inner, outer in itertools.pairwise(order):
            strides[outer] = strides[inner] * shape[inner]
        shapes.append((shape, tuple(strides)))
    net = launch_multi.network(tuple(shapes), c.m)
    tile = launch_multi.tile(interpreted=False)
    vectors = (16 // max(_BYTES[c.x], _BYTES[c.y]),) * len(shapes)
    ((part, _),), _ = launch_multi.parts(net, ("",) * len(shapes), vectors, tile, PROCESSORS[c.arch])
    return part, tile


def _budget(c: Config, blocks: Sequence[launch_multi.Block]) -> Budget:
    """Measured, with a margin of 10 to 20 %. 128 registers leave four blocks of 128 threads on a multiprocessor."""
    wide = max(block.vector for block in blocks)
    narrow = 20 if wide == 1 else 0
    if c.kernel == "forward":
        bits = 8 * wide * _BYTES[c.y]
        registers, slots = 64, 12 + 5 * c.k + narrow
    else:
        bits = 128
        extra = c.m > 1 or c.offset or c.x == "bf16"
        registers, slots = min(56 + 9 * c.k + 32 * extra, 128), 16 + 12 * c.k + 2 * (c.m - 1) + c.k * c.offset + narrow
    alone = len(blocks) == 1
    return Budget(registers, slots if alone else None, 512, (r"LDG\S*\.128", rf"STG\S*\.{bits}") if wide > 1 else ())


def _build(c: Config) -> Build:
    part, tile = _part(c)
    steps, zero_point = GRIDS[c.k]
    layers = len(part.layers)
    groups = tuple(k % c.m for k in range(c.k))
    constants: dict[str, Any] = multi_table.constants(part.blocks, layers, steps, zero_point, groups)
    function = multi.mix_quantize_many_fwd_kernel if c.kernel == "forward" else multi_grad.mix_quantize_many_bwd_kernel
    constants |= {"X": _TYPES[c.x], "Y" if c.kernel == "forward" else "G": _TYPES[c.y]}
    if c.kernel == "backward":
        constants |= multi_grad.grad_constants(steps, (0,) * c.k, c.offset)
    types: dict[str, Any] = dict.fromkeys(function.arg_names, "*fp32")
    types |= {"p_table": "*i32", **dict.fromkeys(("xs", "ys", "gs", "dxs"), ("i64",) * layers)}
    words = [c.network, f"K={c.k}", c.x, c.y, f"M={c.m}", *["channels_last"] * c.last, *["d_offset"] * c.offset]
    options = multi.options(tile.many_warps, c.k) if c.kernel == "forward" else {}
    itemsize = 0 if len(part.blocks) > 1 else _BYTES[c.y if c.kernel == "forward" else c.x]
    return Build(
        f"mix_quantize_many {c.kernel}", " ".join(words), function, types, constants, _budget(c, part.blocks), tile.many_warps,
        arch=c.arch, itemsize=itemsize, outputs=c.m if c.kernel == "forward" else 1, options=options,
    )  # fmt: skip


def builds(quick: bool) -> Iterator[Build]:
    yield from map(_build, _configs(quick))

"""The configurations of mix_quantize: layouts, numbers of candidates, dtypes, noise, and gradients of offsets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

from .. import candidates, finish, launch, quantize, quantize_grad
from ..layout import Layout
from .build import PROCESSORS, Budget, Build

_GRIDS: dict[int, tuple[tuple[float, ...], tuple[float, ...]]] = {
    1: ((15,), (8,)),
    3: ((1, 3, 15), (0.5, 1.5, 7.5)),
    5: ((3, 7, 15, 63, 255), (0, 0, 0, 0, 0)),
    8: ((0, 2, 6, 14, 30, 62, 254, -1), (0, 1, 3, 7, 15, 31, 127, 0)),
}

LAYOUTS = {
    "flat": Layout(2**26, 1, 2**26, 1, 2**26),
    "huge flat": Layout(2**33, 1, 2**33, 1, 2**33),
    "rows": Layout(512 * 4608, 512, 4608, 1, 512 * 4608),
    "short rows": Layout(960 * 9, 960, 9, 1, 960 * 9),
    "planes": Layout(32 * 256 * 3136, 256, 3136, 1, 32 * 256 * 3136),
    "channels": Layout(32 * 256 * 3136, 256, 1, 1, 32 * 256 * 3136),
    "joint flat": Layout(32 * 256 * 3136, 1, 32 * 256 * 3136, 3, 256),
    "joint rows": Layout(512 * 4608, 512, 4608, 3, 4608),
}


@dataclass(frozen=True)
class Config:
    """One configuration. dtype is that of x, output and gradient; offset says whether the backward pass sums for d_offset."""

    kernel: str
    layout: str
    k: int
    dtype: str = "bf16"
    noise: bool = False
    offset: bool = False
    shared: bool = False
    arch: int = 90


SLOTS = {
    "forward": (13, 4.2),
    "forward joint": (16, 4.5),
    "forward short rows": (30, 4.5),
    "forward one clip": (12, 3.3),
    "forward joint one clip": (17, 3.3),
    "forward short rows one clip": (32, 3.3),
    "backward": (16, 11.2),
    "backward joint": (25, 11.2),
    "backward short rows": (33, 11.2),
    "backward one clip": (21, 3.5),
    "backward joint one clip": (38, 3.5),
    "backward short rows one clip": (36, 3.5),
}
"""Slots: a constant and a part for each candidate, by kernel, by what is special about the layout, and by one clip for all candidates."""

NOISE_SLOTS = 80


def _configs(quick: bool) -> Iterator[Config]:
    for kernel in ("forward", "backward"):
        backward = kernel == "backward"
        yield from (Config(kernel, layout, 5, offset=backward) for layout in LAYOUTS)
        yield from (Config(kernel, layout, 5, "fp32", offset=backward) for layout in ("flat", "rows"))
        yield Config(kernel, "rows", 8, "fp32")
        yield Config(kernel, "flat", 5, noise=True)
        yield Config(kernel, "flat", 5, arch=80)
        yield from (Config(kernel, layout, 5, offset=backward, shared=True) for layout in ("flat", "channels"))
        if quick:
            continue
        yield from (Config(kernel, layout, 5, "fp32", offset=backward, shared=True) for layout in LAYOUTS)
        yield from (Config(kernel, layout, 5, offset=backward, shared=True) for layout in LAYOUTS if layout not in ("flat", "channels"))
        yield from (Config(kernel, layout, 5, shared=True, arch=80) for layout in ("flat", "channels"))
        yield from (Config(kernel, layout, k, shared=True) for layout in ("flat", "rows", "channels") for k in (1, 3, 8))
        others = [layout for layout in LAYOUTS if layout not in ("flat", "rows")]
        yield from (Config(kernel, layout, 5, "fp32", offset=backward) for layout in others)
        yield from (Config(kernel, layout, k, dtype) for layout in ("flat", "rows") for k in (1, 3) for dtype in ("bf16", "fp32"))
        yield from (Config(kernel, layout, 8) for layout in ("flat", "rows", "channels"))
        yield Config(kernel, "rows", 3, "fp32", noise=True)
        yield from (Config(kernel, layout, 5, "fp32", arch=80) for layout in ("rows", "channels", "joint rows"))
    yield from (Config("backward", layout, 5, dtype) for layout in ("flat", "channels") for dtype in ("bf16", "fp32"))
    yield from (Config("finish", layout, 5, offset=True) for layout in ("flat", "rows"))


def _budget(c: Config, tile: launch.Tile, itemsize: int) -> Budget:
    if c.kernel == "finish":
        return Budget(128, shared=4096)
    special = "joint" if "joint" in c.layout else "short rows" if c.layout == "short rows" else ""
    constant, each = SLOTS[" ".join(word for word in (c.kernel, special, "one clip" * c.shared) if word)]
    wide = tile.vector * itemsize == 16
    return Budget(tile.registers, constant + c.k * each + c.noise * NOISE_SLOTS, 4096, (r"LDG\S*\.128", r"STG\S*\.128") if wide else ())


def _build(c: Config) -> Build:
    steps, zero_point = _GRIDS[c.k]
    layout = LAYOUTS[c.layout]
    groups = tuple(k % layout.groups for k in range(c.k))
    v = launch.view(layout)
    device = launch.Device(PROCESSORS[c.arch], c.arch)
    itemsize = 4 if c.dtype == "fp32" else 2
    outputs = layout.groups
    if c.kernel == "forward":
        tile = launch.forward(v, itemsize, device, candidates.state(steps, zero_point, groups, c.shared), c.noise)
        function, warps = quantize.mix_quantize_fwd_kernel, tile.warps
        constants = candidates.constants(v, tile, steps, zero_point, groups, c.noise, c.shared)
    else:
        state = candidates.state(steps, zero_point, groups, c.shared, True, c.offset)
        tile, outputs = launch.backward(v, itemsize, device, state, c.noise, c.offset), 1
        function, warps = quantize_grad.mix_quantize_bwd_kernel, tile.warps
        common = candidates.constants(v, tile, steps, zero_point, groups, c.noise, c.shared)
        constants = {**common, **quantize_grad.grad_constants(v, tile, steps, zero_point, groups, (0,) * c.k, c.offset, c.shared)}
    budget = _budget(c, tile, itemsize)
    if c.kernel == "finish":
        final = launch.finish(v.channels, tile.splits_outer * tile.splits_inner)
        function, warps, itemsize = finish.mix_quantize_bwd_kernel_finish, final.finish_warps, 0
        constants = finish.finish_constants(final, steps, groups, c.offset)
    sizes = asdict(v)
    streams = dict.fromkeys(("p_x", "p_y", "p_g", "p_dx"), f"*{c.dtype}")
    types = {name: "*fp32" if name.startswith("p_") else "i64" if sizes.get(name, 0) >= 2**31 else "i32" for name in function.arg_names}
    types |= {**streams, "p_seed": "*i64" if c.noise else "*fp32"}
    words = [c.layout, f"K={c.k}", c.dtype, *["one clip"] * c.shared, *["noise"] * c.noise, *["d_offset"] * c.offset]
    name = f"mix_quantize {c.kernel}"
    return Build(name, " ".join(words), function, types, constants, budget, warps, arch=c.arch, itemsize=itemsize, outputs=outputs)


def builds(quick: bool) -> Iterator[Build]:
    yield from map(_build, _configs(quick))

"""The configurations of mix_quantize: layouts, numbers of candidates, dtypes, noise, and gradients of offsets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

from .. import candidates, launch, quantize, quantize_grad
from ..layout import Layout
from .build import PROCESSORS, Budget, Build

_GRIDS: dict[int, tuple[tuple[float, ...], tuple[float, ...]]] = {
    1: ((15,), (8,)),
    3: ((1, 3, 15), (0.5, 1.5, 7.5)),
    5: ((3, 7, 15, 63, 255), (0, 0, 0, 0, 0)),
    8: ((0, 3, 7, 15, 31, 63, 255, -1), (0, 2, 4, 8, 16, 32, 128, 0)),
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
    arch: int = 90


@dataclass(frozen=True)
class Costs:
    """Registers and slots: a constant, a part for each candidate, and what noise adds."""

    registers: int
    registers_each: int
    slots: float
    slots_each: float
    registers_noise: int = 0
    slots_noise: float = 0


COSTS = {
    "forward": Costs(64, 8, 12, 5, 80, 80),
    "forward joint flat": Costs(64, 8, 18, 5),
    "forward joint rows": Costs(64, 8, 18, 5),
    "forward channels": Costs(128, 12, 12, 5),
    "forward short rows": Costs(100, 8, 30, 5),
    "backward": Costs(100, 16, 20, 11.5, 32, 90),
    "backward joint flat": Costs(100, 16, 30, 11.5),
    "backward joint rows": Costs(100, 16, 30, 11.5),
    "backward channels": Costs(255, 0, 20, 11.5),
    "backward short rows": Costs(255, 0, 35, 11.5),
}
"""By kernel, or by kernel and layout where that differs, with a margin of 10 to 20 %."""


def _configs(quick: bool) -> Iterator[Config]:
    for kernel in ("forward", "backward"):
        backward = kernel == "backward"
        yield from (Config(kernel, layout, 5, offset=backward) for layout in LAYOUTS)
        yield from (Config(kernel, layout, 5, "fp32", offset=backward) for layout in ("flat", "rows"))
        yield Config(kernel, "rows", 8, "fp32")
        yield Config(kernel, "flat", 5, noise=True)
        yield Config(kernel, "flat", 5, arch=80)
        if quick:
            continue
        others = [layout for layout in LAYOUTS if layout not in ("flat", "rows")]
        yield from (Config(kernel, layout, 5, "fp32", offset=backward) for layout in others)
        yield from (Config(kernel, layout, k, dtype) for layout in ("flat", "rows") for k in (1, 3) for dtype in ("bf16", "fp32"))
        yield from (Config(kernel, layout, 8) for layout in ("flat", "rows", "channels"))
        yield Config(kernel, "rows", 3, "fp32", noise=True)
        yield from (Config(kernel, layout, 5, "fp32", arch=80) for layout in ("rows", "channels", "joint rows"))
    yield from (Config("backward", layout, 5, dtype) for layout in ("flat", "channels") for dtype in ("bf16", "fp32"))
    yield from (Config("finish", layout, 5, offset=True) for layout in ("flat", "rows"))


def _budget(c: Config, v: launch.View) -> Budget:
    if c.kernel == "finish":
        return Budget(128, shared=4096)
    costs = COSTS.get(f"{c.kernel} {c.layout}", COSTS[c.kernel])
    # bf16 channels side by side take 8 bytes, and rows of 9 elements are not aligned
    wide = v.align == 16 and not (v.unit and c.dtype != "fp32")
    return Budget(
        costs.registers + c.k * costs.registers_each + c.noise * costs.registers_noise,
        costs.slots + c.k * costs.slots_each + c.noise * costs.slots_noise,
        4096,
        (r"LDG\S*\.128", r"STG\S*\.128") if wide else (),
    )


def _build(c: Config) -> Build:
    steps, zero_point = _GRIDS[c.k]
    layout = LAYOUTS[c.layout]
    groups = tuple(k % layout.groups for k in range(c.k))
    v = launch.view(layout)
    device = launch.Device(PROCESSORS[c.arch], c.arch)
    itemsize = 4 if c.dtype == "fp32" else 2
    outputs = layout.groups
    if c.kernel == "forward":
        tile = launch.forward(v, itemsize, device)
        function, warps = quantize.mix_quantize_fwd_kernel, tile.warps
        constants = candidates.constants(v, tile, steps, zero_point, groups, c.noise)
    else:
        tile, outputs = launch.backward(v, itemsize, device), 1
        function, warps = quantize_grad.mix_quantize_bwd_kernel, tile.warps
        shared = candidates.constants(v, tile, steps, zero_point, groups, c.noise)
        constants = {**shared, **quantize_grad.grad_constants(tile, steps, (0,) * c.k, c.offset)}
    if c.kernel == "finish":
        final = launch.finish(v.channels, tile.splits_outer * tile.splits_inner)
        function, warps, itemsize = quantize_grad.mix_quantize_bwd_kernel_finish, final.finish_warps, 0
        constants = quantize_grad.finish_constants(final, steps, groups, c.offset)
    sizes = asdict(v)
    streams = dict.fromkeys(("p_x", "p_y", "p_g", "p_dx"), f"*{c.dtype}")
    types = {name: "*fp32" if name.startswith("p_") else "i64" if sizes.get(name, 0) >= 2**31 else "i32" for name in function.arg_names}
    types |= {**streams, "p_seed": "*i64" if c.noise else "*fp32"}
    words = [c.layout, f"K={c.k}", c.dtype, *["noise"] * c.noise, *["d_offset"] * c.offset]
    name = f"mix_quantize {c.kernel}"
    return Build(name, " ".join(words), function, types, constants, _budget(c, v), warps, arch=c.arch, itemsize=itemsize, outputs=outputs)


def builds(quick: bool) -> Iterator[Build]:
    yield from map(_build, _configs(quick))

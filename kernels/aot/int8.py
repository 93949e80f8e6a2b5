"""The configurations of the convolution on integer codes: blocks, kernels of one and of more taps, input dtypes, groups, odd channels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .. import int8, launch_int8
from ..launch import Device
from ..launch_int8 import Shape
from .build import PROCESSORS, Budget, Build

SHAPES = {
    "1x1": Shape(64, 256, 14, 14, 256, (1, 1)),
    "1x1 many filters": Shape(64, 256, 14, 14, 2048, (1, 1)),
    "1x1 few filters": Shape(64, 256, 56, 56, 64, (1, 1)),
    "1x1 stride": Shape(64, 512, 28, 28, 512, (1, 1), (2, 2)),
    "1x1 odd channels": Shape(64, 77, 28, 28, 130, (1, 1)),
    "3x3": Shape(64, 128, 28, 28, 128, (3, 3), padding=(1, 1)),
    "3x3 many filters": Shape(256, 256, 14, 14, 256, (3, 3), padding=(1, 1)),
    "3x3 small": Shape(1, 512, 7, 7, 512, (3, 3), padding=(1, 1)),
    "3x3 few filters": Shape(64, 64, 56, 56, 32, (3, 3), padding=(1, 1)),
    "3x3 dilated": Shape(16, 128, 28, 28, 128, (3, 3), padding=(2, 2), dilation=(2, 2)),
    "3x3 odd channels": Shape(64, 77, 28, 28, 130, (3, 3), padding=(1, 1)),
    "3x3 groups": Shape(64, 128, 28, 28, 128, (3, 3), padding=(1, 1), groups=4),
    "7x7 three channels": Shape(32, 3, 224, 224, 64, (7, 7), (2, 2), (3, 3)),
}
REGISTERS = {
    (128, 256, 8): 255,
    (128, 128, 8): 192,
    (128, 128, 4): 255,
    (128, 64, 4): 176,
    (64, 64, 4): 128,
    (128, 32, 4): 144,
    (64, 32, 4): 96,
}
"""By rows, filters and warps of a block; 255 where channels are not side by side in groups of 16, and every code has an address."""


def _types(function: Any, given: Mapping[str, str]) -> dict[str, str]:
    types = {name: "*fp32" if name.startswith("p_") else "i32" for name in function.arg_names}
    return {**types, **given}


def _encode(shape: str, steps: int, dtype: str, arch: int, channels_last: bool = True) -> Build:
    s = SHAPES[shape]
    tile = launch_int8.encode(s, Device(PROCESSORS[arch], arch))
    constants = int8.encode_constants(tile, steps) | {"x_c" if channels_last else "x_w": 1}
    strides = ("x_n", "x_h", "x_w" if channels_last else "x_c")
    aligned = ("channels", *strides) if s.channels % 16 == 0 else ()
    wide = (r"LDG\S*\.128", r"STG\S*\.(128|64)") if aligned and channels_last else ()
    types = _types(int8.encode_kernel, {"p_x": f"*{dtype}", "p_s": "*i8"})
    case = f"{shape} n={steps} {dtype}" + ("" if channels_last else " contiguous")
    budget = Budget(72, shared=16384, require=wide)
    return Build("int8 encode", case, int8.encode_kernel, types, constants, budget, tile.encode_warps, 3, arch, aligned)


def _product(shape: str, steps: int, dtype: str, arch: int, channels_last: bool = True) -> Build:
    s = SHAPES[shape]
    tile = launch_int8.product(s, channels_last, 4 if dtype == "fp32" else 2, Device(PROCESSORS[arch], arch))
    constants = int8.product_constants(s, tile, steps, bias=True) | {"y_f" if channels_last else "y_p": 1}
    vector = s.channels // s.groups % 16 == 0
    strides = ("y_n", "y_p") if channels_last else ("y_n", "y_f", "pixels")
    aligned = ((*strides, "filters") if s.filters % 16 == 0 else ()) + (("channels", "run") if vector else ())
    dots = "IGMMA" if arch == 90 else "IMMA"
    require = (dots, r"LDGSTS\S*BYPASS\S*\.128", r"STG\S*\.128") if vector else (dots,)
    budget = Budget(REGISTERS[tile.block_m, tile.block_n, tile.warps] if vector else 255, require=require)
    types = {"p_a": f"*{dtype}" if tile.inline else "*i8", "p_w": "*i8", "p_total": "*i32", "p_y": f"*{dtype}"}
    words = [shape, f"n={steps}", dtype, *["contiguous"] * (not channels_last), f"{tile.block_m}x{tile.block_n}x{tile.block_k}"]
    words += [f"w{tile.warps}", *["inline"] * bool(tile.inline)]
    function = int8.conv_int8_kernel
    return Build(
        "int8 product", " ".join(words), function, _types(function, types), constants, budget, tile.warps, tile.stages, arch, aligned
    )


def builds(quick: bool) -> Iterator[Build]:
    yield _encode("3x3", 255, "bf16", 90)
    yield _product("1x1", 255, "bf16", 90)
    yield _product("3x3", 255, "bf16", 90)
    yield _product("3x3", 15, "bf16", 80)
    if quick:
        return
    yield _encode("3x3", 255, "bf16", 90, channels_last=False)
    yield _product("3x3", 255, "bf16", 90, channels_last=False)
    for arch in (90, 80):
        yield from (_encode(shape, 15, dtype, arch) for shape in ("3x3", "7x7 three channels") for dtype in ("bf16", "fp32"))
        yield from (_product(shape, 255, "bf16", arch) for shape in SHAPES)
        yield from (_product(shape, 255, "fp32", arch) for shape in SHAPES if "1x1" in shape)
        yield from (_product(shape, 15, "bf16", arch) for shape in ("1x1", "3x3"))

"""The configurations of the mixed convolution's gradients: layers of ResNets and what differs from them, dtypes, numbers of quantizers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .. import conv_grad_input, conv_grad_pack, conv_grad_weight, launch, launch_conv_grad
from ..reference_conv import Geometry
from .build import PROCESSORS, Budget, Build

STEPS = (3.0, 15.0, 255.0, 7.0, 63.0, 1.0, 31.0, 127.0)
_SIZES = ("filters", "channels", "columns", "all_columns", "all_filters", "run", "total", "w_f", "w_t")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Layer:
    """A convolution of a batch of 32."""

    channels: int
    filters: int
    size: int
    kernel: int
    stride: int = 1
    groups: int = 1

    @property
    def geometry(self) -> Geometry:
        pad = self.kernel // 2
        return Geometry((self.stride, self.stride), (pad, pad), (1, 1), self.groups)

    def input(self, dtype: str) -> torch.Tensor:
        return torch.empty(32, self.channels, self.size, self.size, dtype=DTYPES[dtype], device="meta")

    def output(self, dtype: str) -> torch.Tensor:
        h, w = self.geometry.output_size(self.size, self.size, (self.kernel, self.kernel))
        return torch.empty(32, self.filters, h, w, dtype=DTYPES[dtype], device="meta")


LAYERS = {
    "3x3 64→64 56²": Layer(64, 64, 56, 3),
    "1x1 64→256 56²": Layer(64, 256, 56, 1),
    "3x3 256→256 14²": Layer(256, 256, 14, 3),
    "1x1 512→2048 7²": Layer(512, 2048, 7, 1),
    "3x3 128→128 56² /2": Layer(128, 128, 56, 3, 2),
    "1x1 256→512 56² /2": Layer(256, 512, 56, 1, 2),
    "7x7 3→64 224² /2": Layer(3, 64, 224, 7, 2),
    "3x3 256→256 14² /32": Layer(256, 256, 14, 3, 1, 32),
}


@dataclass(frozen=True)
class Config:
    kernel: str
    layer: str
    m: int = 3
    dtype: str = "bf16"
    sampled: bool = False
    x: str | None = None
    arch: int = 90


def _configs(quick: bool) -> Iterator[Config]:
    few = ["3x3 64→64 56²", "1x1 512→2048 7²", "3x3 128→128 56² /2", "7x7 3→64 224² /2"]
    for kernel in ("dx", "dw"):
        yield from (Config(kernel, layer) for layer in (few if quick else LAYERS))
        yield Config(kernel, "3x3 256→256 14²", sampled=True)
        yield Config(kernel, "3x3 64→64 56²", arch=80)
        yield Config(kernel, "3x3 64→64 56²", dtype="fp32")
        if quick:
            continue
        yield from (Config(kernel, layer, m) for layer in LAYERS for m in (1, 2))
        yield from (Config(kernel, layer, m, arch=arch) for layer in few for m in (4, 5, 8) for arch in (80, 90))
        yield from (Config(kernel, layer, dtype="fp32", arch=arch) for layer in LAYERS for arch in (80, 90))
        yield from (Config(kernel, layer, 1, "fp32") for layer in few)
        yield from (Config(kernel, layer, sampled=True, arch=arch) for layer in LAYERS for arch in (80, 90))
        yield from (Config(kernel, layer, arch=80) for layer in LAYERS)
        yield from (Config(kernel, layer, dtype="fp16") for layer in few)
        yield from (Config(kernel, layer, x="fp32") for layer in few)
        yield Config(kernel, "3x3 64→64 56²", dtype="fp32", sampled=True)


REGISTERS = {"dx": {1: 168, 2: 208}, "dw": {1: 152, 2: 208}}
"""By M for 16-bit products; 255 where a program holds more."""


def _budget(c: Config, layer: Layer) -> Budget:
    """Products of less than 64 rows, of few channels, are not made by warp groups."""
    warp_groups = c.arch == 90 and (c.kernel == "dx" or layer.channels // layer.groups > 32)
    wide = (r"LDG\S*\.128",) if layer.channels // layer.groups % 8 == 0 and layer.groups == 1 else ()
    registers = 255 if c.sampled or c.dtype == "fp32" else REGISTERS[c.kernel].get(c.m, 255)
    return Budget(registers, require=("HGMMA" if warp_groups else "HMMA", *wide))


def _build(c: Config) -> Build:
    layer = LAYERS[c.layer]
    g, x, grad = layer.geometry, layer.input(c.x or c.dtype), layer.output(c.dtype)
    device = launch.Device(PROCESSORS[c.arch], c.arch)
    steps, zero, kernel = STEPS[: c.m], (0.0,) * c.m, (layer.kernel, layer.kernel)
    streams = {"p_x": f"*{c.x or c.dtype}", "p_dx": f"*{c.x or c.dtype}", "p_g": f"*{c.dtype}", "p_v": f"*{c.dtype}", "p_quantizer": "*i32"}
    precision = "tf32" if c.dtype == "fp32" else "ieee"
    if c.kernel == "dx":
        shape = conv_grad_input.input_shape(x, grad, c.m, c.sampled, g)
        tile = launch_conv_grad.input_tile(shape, device)
        columns = _columns(shape.filters, tile.dx_k, c)
        blocks = -(-columns // tile.dx_k)
        function, warps, stages = conv_grad_input.mixed_conv_dx_kernel, tile.dx_warps, tile.dx_stages
        constants = conv_grad_input.constants(tile, kernel, columns, steps, zero, c.sampled, g) | {
            "ALIGN_G": math.gcd(columns, 16), "ALIGN_X": math.gcd(shape.channels, 16), "LAST": True, "PRECISION": precision,
            "BT": 1 << (blocks - 1).bit_length(),
        }  # fmt: skip
    else:
        weight = conv_grad_weight.weight_shape(x, grad, kernel, c.m, c.sampled, g)
        tile_w = launch_conv_grad.weight_tile(weight, device)
        columns = _columns(weight.filters, tile_w.dw_n, c)
        function, warps, stages = conv_grad_weight.mixed_conv_dw_kernel, tile_w.dw_warps, tile_w.dw_stages
        constants = conv_grad_weight.constants(weight, tile_w, columns, steps, zero, c.sampled, g) | {
            "COLUMNS": 1 if weight.merged else layer.kernel, "ALIGN_X": math.gcd(weight.run, layer.channels, 16),
            "ALIGN_G": math.gcd(columns, 16), "PRECISION": precision,
        }  # fmt: skip
    types = {name: "*fp32" if name.startswith("p_") else "i32" for name in function.arg_names} | streams
    words = [c.layer, f"M={c.m}", c.dtype, *[f"x {c.x}"] * (c.x is not None), *["sampled"] * c.sampled]
    name = f"mixed_conv2d {c.kernel}"
    return Build(name, " ".join(words), function, types, constants, _budget(c, layer), warps, stages, c.arch)


def _columns(filters: int, block: int, c: Config) -> int:
    """Filters of a group, or the columns that they take when sorted and padded."""
    return (filters + c.m * (block - 1)) // block * block if c.sampled else filters


def _beside(sampled: bool, last: bool) -> Iterator[Build]:
    """The kernels before and after the products."""
    table = dict.fromkeys(("p_filter", "p_quantizer"), "*i32")
    streams = dict.fromkeys(("p_w", "p_v", "p_g", "p_sorted", "p_dw"), "*bf16")

    def build(kernel: str, function: Any, budget: Budget, **constants: Any) -> Build:
        types = {name: "*fp32" if name.startswith("p_") else "i32" for name in function.arg_names} | table | streams
        return Build(f"mixed_conv2d {kernel}", "M=3 bf16" + " sampled" * sampled, function, types, constants, budget, divisible=_SIZES)

    small = Budget(128, shared=16384)
    yield build("dx weights", conv_grad_pack.pack_grad_kernel, small, w_c=1, M=3, SAMPLED=sampled, TAPS=9, BN=64, BK=32)
    yield build("dw finish", conv_grad_weight.mixed_conv_dw_kernel_finish, small, M=3, SAMPLED=sampled, TAPS=9, WIDTH=1, BF=64, BLOCK=512)
    if sampled:
        yield build("sorted dy", conv_grad_pack.sort_grad_kernel, small, LAST=last, BLOCK=32, BP=16, BC=128)
    else:
        yield build("dx finish", conv_grad_input.mixed_conv_dx_kernel_finish, small, M=3, STEPS=STEPS[:3], BLOCK=1024)


def builds(quick: bool) -> Iterator[Build]:
    yield from map(_build, _configs(quick))
    for sampled, last in ((False, True), (True, True), (True, False)):
        yield from _beside(sampled, last)

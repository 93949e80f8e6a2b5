"""The configurations of the mixed convolution: representative layers of a ResNet, dtypes, numbers of quantizers, joint and sampled."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from .. import conv, conv_pack, launch_conv
from ..launch import Device
from ..launch_conv import ConvShape, ConvTile
from ..reference_conv import Geometry
from . import conv_grad
from .build import PROCESSORS, SHARED_LIMIT, Budget, Build

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
STEPS = (3.0, 15.0, 255.0, 7.0, 63.0)


@dataclass(frozen=True)
class Layer:
    """A convolution of a square image."""

    channels: int
    filters: int
    size: int
    kernel: int = 3
    stride: int = 1
    groups: int = 1
    batch: int = 64

    @property
    def geometry(self) -> Geometry:
        padding = self.kernel // 2
        return Geometry((self.stride, self.stride), (padding, padding), (1, 1), self.groups)

    @property
    def name(self) -> str:
        return f"{self.kernel}x{self.kernel} {self.channels}→{self.filters} {self.size}²" + (f" /{self.stride}" if self.stride > 1 else "")


LAYERS = (
    Layer(64, 64, 56),
    Layer(64, 256, 56, 1),
    Layer(256, 256, 14),
    Layer(512, 2048, 7, 1),
    Layer(3, 64, 224, 7, 2),
    Layer(128, 128, 56, 3, 2),
)
OTHERS = (Layer(40, 80, 28, 5), Layer(256, 256, 56, 3, 1, 32), Layer(24, 24, 56), Layer(512, 512, 7, 3, 1, 1, 1), Layer(160, 160, 14, 1))


@dataclass(frozen=True)
class Config:
    layer: Layer
    dtype: str = "bf16"
    m: int = 3
    sampled: bool = False
    arch: int = 90
    x_dtype: str = ""
    steps: tuple[float, ...] = STEPS
    tf32: bool = True


def _configs(quick: bool) -> Iterator[Config]:
    yield from map(Config, LAYERS[:5])
    yield Config(LAYERS[2], sampled=True)
    yield Config(LAYERS[2], "fp32")
    yield Config(LAYERS[2], arch=80)
    yield Config(LAYERS[0], "fp16", m=1)
    if quick:
        return
    for layer in LAYERS:
        for arch in (80, 90):
            yield from (Config(layer, dtype, m, False, arch) for dtype in DTYPES for m in (1, 3))
            yield from (Config(layer, dtype, 3, True, arch) for dtype in DTYPES)
    for layer in OTHERS:
        yield from (Config(layer, sampled=sampled) for sampled in (False, True))
    yield from (Config(LAYERS[2], dtype, m, arch=arch) for dtype in DTYPES for m in (2, 4, 5) for arch in (80, 90))
    yield from (Config(LAYERS[2], x_dtype="fp32", sampled=sampled) for sampled in (False, True))
    yield from (Config(LAYERS[2], steps=(3, 15, -1), sampled=sampled) for sampled in (False, True))
    yield Config(LAYERS[2], steps=(0, 15, 255))
    yield from (Config(LAYERS[2], "fp32", sampled=sampled, tf32=False) for sampled in (False, True))


def _shape(c: Config) -> tuple[ConvShape, ConvTile]:
    layer, g = c.layer, c.layer.geometry
    height, width = g.output_size(layer.size, layer.size, (layer.kernel, layer.kernel))
    s = conv.shape(
        layer.batch * height * width, layer.filters, layer.channels, (layer.kernel, layer.kernel), 1 if c.sampled else c.m,
        DTYPES[c.x_dtype or c.dtype], DTYPES[c.dtype], g,
    )  # fmt: skip
    s = replace(s, tensor_cores=c.tf32)
    return s, launch_conv.forward(s, Device(PROCESSORS[c.arch], c.arch))


def _budget(c: Config, s: ConvShape, tile: ConvTile) -> Budget:
    product = {("fp32", 80): "HMMA.*TF32", ("fp32", 90): "HGMMA.*TF32"}.get((c.dtype, c.arch), "HGMMA" if c.arch == 90 else "HMMA")
    if not c.tf32:
        product = "FFMA"
    # the weights' tiles are always wide; x is where its channels are
    loads = r"LDGSTS\S*\.128"
    programs = 2 if tile.conv_registers == 128 else 1
    # the largest step, once per program
    forbid = ("FRND",) if {0, -1} & {*c.steps} else ("FRND", "FMNMX")
    return Budget(tile.conv_registers, None, SHARED_LIMIT[c.arch] // programs, (product, loads), forbid)


def _product(c: Config) -> Build:
    s, tile = _shape(c)
    layer = c.layer
    steps = c.steps[: c.m]
    function = conv.mixed_conv_fwd_kernel
    constants = {
        **conv.constants(s, tile, steps, (0.0,) * c.m, c.sampled, layer.channels, (layer.kernel, layer.kernel), layer.geometry),
        "PRECISION": "tf32" if c.dtype == "fp32" and c.tf32 else "ieee",
    }  # fmt: skip
    types = {name: "*fp32" if name.startswith("p_") else "i32" for name in function.arg_names}
    types |= dict.fromkeys(("p_v", "p_outside", "p_y"), f"*{c.dtype}") | {"p_x": f"*{c.x_dtype or c.dtype}"}
    if c.sampled:
        types |= {"p_filter": "*i32", "p_quantizer": "*i32"}
    words = [layer.name, c.dtype, f"M={c.m}", *["sampled"] * c.sampled, *["x fp32"] * bool(c.x_dtype)]
    words += ["no TF32"] * (not c.tf32) + ["full"] * (-1 in steps) + ["pruned"] * (0 in steps)
    return Build(
        "mixed_conv2d forward", " ".join(words), function, types, constants, _budget(c, s, tile), tile.conv_warps, tile.conv_stages, c.arch,
        options={"maxnreg": tile.conv_registers},
    )  # fmt: skip


def _packing(c: Config) -> Iterator[Build]:
    """The kernels before the product: the weight in blocks, where it is channels_last, and the table of filters."""
    s, tile = _shape(c)
    name = f"{c.layer.name} {c.dtype} M={c.m}" + " sampled" * c.sampled
    function = conv_pack.pack_kernel
    tables = dict.fromkeys(("p_filter", "p_quantizer"), "*i32" if c.sampled else "*fp32")
    types = {name: "*fp32" if name.startswith("p_") else "i32" for name in function.arg_names} | tables
    types |= dict.fromkeys(("p_v", "p_outside"), f"*{c.dtype}")
    constants: dict[str, Any] = {**conv_pack.pack_constants(s, tile, c.steps[: c.m], (0.0,) * c.m, c.sampled, c.layer.kernel**2), "w_c": 1}
    budget = Budget(192, None, 8192, (r"STG\S*\.128", *[r"LDG\S*\.128"] * (c.layer.channels % 16 == 0)))
    sizes = ("channels", "w_f", "w_t") if c.layer.channels % 16 == 0 else ()
    yield Build("mixed_conv2d weights", name, function, types, constants, budget, conv_pack.pack_warps(tile), 3, c.arch, sizes)
    if c.sampled:
        function = conv_pack.filter_table_kernel
        types = {"p_choice": "*i64", "p_filter": "*i32", "p_quantizer": "*i32", "filters": "i32", "tiles": "i32"}
        constants = dict(conv_pack.table_constants(s.filters, c.m, tile.block_n))
        yield Build("mixed_conv2d filter table", name, function, types, constants, Budget(128, shared=8192), 4, 3, c.arch)


def builds(quick: bool) -> Iterator[Build]:
    yield from map(_product, _configs(quick))
    for layer, arch in ((LAYERS[0], 90), (LAYERS[4], 90), (LAYERS[3], 80)):
        yield from _packing(Config(layer, arch=arch))
    yield from _packing(Config(LAYERS[3], sampled=True))
    yield from conv_grad.builds(quick)

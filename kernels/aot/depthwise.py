"""The configurations of the depthwise mixed convolution: layers of MobileNetV2 and V3 sizes, numbers of candidates and groups, layouts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .. import depthwise, depthwise_grad, finish, launch, launch_depthwise
from ..depthwise_tile import candidate_constants
from ..launch_depthwise import Shape
from .build import PROCESSORS, Budget, Build

_STEPS = (3.0, 15.0, 255.0, 7.0, 63.0)


@dataclass(frozen=True)
class Config:
    """One layer: channels, input size, kernel, stride; k activation candidates in `groups` groups; unit: channels_last."""

    kernel: str
    channels: int
    size: int
    window: int = 3
    stride: int = 1
    k: int = 1
    groups: int = 1
    dtype: str = "bf16"
    unit: bool = True
    offset: bool = False
    arch: int = 90

    @property
    def shape(self) -> Shape:
        pad = self.window // 2
        out = (self.size + 2 * pad - self.window) // self.stride + 1
        size, out_size, window, stride, padding = ((n, n) for n in (self.size, out, self.window, self.stride, pad))
        return Shape(128, self.channels, size, out_size, window, stride, padding, (1, 1), self.groups, self.unit, 16 if self.unit else 1)


def _configs(quick: bool) -> Iterator[Config]:
    for kernel in ("forward", "backward"):
        yield Config(kernel, 32, 112)
        yield Config(kernel, 144, 56, stride=2, k=3)
        yield Config(kernel, 960, 7, k=3, dtype="fp32", offset=True)
        yield Config(kernel, 240, 28, window=5, k=3)
        if quick:
            continue
        yield Config(kernel, 192, 28, k=3, unit=False)
        yield Config(kernel, 384, 14, k=3)
        yield Config(kernel, 384, 14, k=5)
        yield Config(kernel, 384, 14, k=3, groups=3)
        yield Config(kernel, 96, 112, stride=2, dtype="fp32")
        yield Config(kernel, 672, 14, window=5, stride=2, k=3, dtype="fp32")
        yield Config(kernel, 96, 56, window=7, k=3)
        yield Config(kernel, 96, 56, window=7, dtype="fp32")
        yield Config(kernel, 384, 14, k=3, arch=80)
    yield Config("mix", 960, 7, k=5)
    yield Config("finish", 960, 7, k=3)


def _budget(c: Config) -> Budget:
    return Budget(255)


def _build(c: Config) -> Build:
    shape, device = c.shape, launch.Device(PROCESSORS[c.arch], c.arch)
    steps, zero = _STEPS[: c.k], (0.0,) * c.k
    groups = tuple(k % c.groups for k in range(c.k))
    candidates = candidate_constants(steps, zero, groups)
    itemsize, warps = 4 if c.dtype == "fp32" else 2, 4
    if c.kernel == "forward":
        tile = launch_depthwise.forward(shape, device)
        function, constants, warps = (
            depthwise.depthwise_fwd_kernel,
            {**launch_depthwise.constants(shape, tile), **candidates},
            tile.strip_warps,
        )
    elif c.kernel == "backward":
        tile = launch_depthwise.backward(shape, device)
        extra = depthwise_grad.grad_constants(shape, tile, steps, c.offset)[0]
        constants = {**launch_depthwise.constants(shape, tile), **candidates, **extra}
        function, warps = depthwise_grad.depthwise_bwd_kernel, tile.strip_warps
    elif c.kernel == "mix":
        constants = {**depthwise.weight_constants(c.channels, shape.taps, 1, c.channels, False), **candidates, "M": c.groups}
        function, itemsize = depthwise.depthwise_weight_kernel, 0
    else:
        final = launch.finish(1, 1056)
        function, constants, itemsize, warps = (
            finish.mix_quantize_bwd_kernel_finish, finish.finish_constants(final, steps, groups, c.offset), 0, final.finish_warps
        )  # fmt: skip
    images = dict.fromkeys(("p_x", "p_y", "p_z", "p_d"), f"*{c.dtype}")
    types = {name: images.get(name, "*fp32" if name.startswith("p_") else "i32") for name in function.arg_names}
    words = [f"{c.channels}x{c.size}", f"{c.window}x{c.window}/{c.stride}", f"K={c.k}", c.dtype, *[f"M={c.groups}"] * (c.groups > 1)]
    words += [*["contiguous"] * (not c.unit), *["d_offset"] * c.offset]
    return Build(f"depthwise {c.kernel}", " ".join(words), function, types, constants, _budget(c), warps, arch=c.arch, itemsize=itemsize)


def builds(quick: bool) -> Iterator[Build]:
    yield from map(_build, _configs(quick))

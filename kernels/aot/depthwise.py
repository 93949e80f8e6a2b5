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
    """One layer, and what its kernel may use: registers, and issue slots per element of y or dx.

    k activation candidates in `groups` groups; unit: channels_last. Slots and registers have a margin of about a tenth. A layer of stride 1
    in bf16 is bound by an H200's memory up to 31 slots in the forward and 47 in the backward pass; quantizing, convolving and summing in
    passes of their own would move two to three times the bytes.
    """

    kernel: str
    channels: int
    size: int
    registers: int
    slots: float | None = None
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
    yield Config("forward", 32, 112, 104, 35)
    yield Config("forward", 144, 56, 184, 120, stride=2, k=3)
    yield Config("forward", 960, 7, 112, 49, k=3, dtype="fp32")
    yield Config("backward", 32, 112, 184, 65)
    yield Config("backward", 144, 56, 208, 62, stride=2, k=3)
    yield Config("backward", 960, 7, 192, 89, k=3, dtype="fp32", offset=True)
    yield Config("mix", 960, 7, 144, k=5)
    yield Config("finish", 960, 7, 64, k=3)
    yield Config("forward", 384, 14, 112, 51, k=3, arch=80)
    yield Config("backward", 384, 14, 192, 89, k=3, arch=80)
    if quick:
        return
    yield Config("forward", 384, 14, 112, 51, k=3)
    yield Config("forward", 384, 14, 112, 63, k=5)
    yield Config("forward", 384, 14, 152, 73, k=3, groups=3)
    yield Config("forward", 192, 28, 88, 64, k=3, unit=False)
    yield Config("forward", 96, 112, 152, 69, stride=2, dtype="fp32")
    yield Config("forward", 240, 28, 184, 79, window=5, k=3)
    yield Config("forward", 672, 14, 232, 153, window=5, stride=2, k=3, dtype="fp32")
    yield Config("forward", 96, 56, 176, 141, window=7, k=3)
    yield Config("backward", 384, 14, 192, 89, k=3)
    yield Config("backward", 384, 14, 192, 117, k=5)
    yield Config("backward", 384, 14, 192, 151, k=3, groups=3)
    yield Config("backward", 192, 28, 144, 101, k=3, unit=False)
    yield Config("backward", 96, 112, 200, 36, stride=2, dtype="fp32")
    yield Config("backward", 240, 28, 255, 161, window=5, k=3)
    yield Config("backward", 672, 14, 192, 83, window=5, stride=2, k=3, dtype="fp32")
    yield Config("backward", 96, 56, 255, 240, window=7, k=3)
    yield Config("backward", 96, 56, 255, 210, window=7, dtype="fp32")
    yield Config("backward", 384, 14, 255, 260, k=5, groups=5)
    yield Config("backward", 96, 56, 255, 240, window=5, k=2, groups=2)


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
    return Build(
        f"depthwise {c.kernel}",
        " ".join(words),
        function,
        types,
        constants,
        Budget(c.registers, c.slots, shared=4096),
        warps,
        arch=c.arch,
        itemsize=itemsize,
    )


def builds(quick: bool) -> Iterator[Build]:
    yield from map(_build, _configs(quick))

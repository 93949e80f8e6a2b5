"""What a user asked for, as cases: kernels, shapes, bits, types, directions and baselines, each checked with a one-line message."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from qprune.errors import InputError, SpaceError
from qprune.space import check_bits

from . import mixing, shapes, training
from .cases import DIRECTIONS, Case
from .convolution import Depthwise, Joint
from .integer import Integer
from .many import Many
from .shapes import NETWORKS, ConvShape

KERNELS = ("training", "mix_quantize", "multi", "mixed_conv2d", "depthwise", "int8")
BASELINES = ("eager", "branches", "layers", "compile", "cudnn", "reference", "float")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DEFAULT_SHAPES = {
    "cpu": {
        "training": ("resnet20",),
        "mix_quantize": ("512x4608", "64x16x32x32", "64x64x8x8"),
        "multi": ("resnet20",),
        "mixed_conv2d": ("16x16x32x32:16x3x3/1", "16x64x8x8:128x1x1/1"),
        "depthwise": ("16x64x16x16:64x3x3/1g64", "16x64x16x16:64x3x3/2g64"),
        "int8": ("8x32x16x16:32x3x3/1",),
    },
    "cuda": {
        "training": ("resnet20",),
        "mix_quantize": ("256x64x112x112", "256x256x56x56", "256x64x56x56", "256x128x28x28", "4096x4608"),
        "multi": ("resnet18", "resnet50", "mobilenetv2"),
        "mixed_conv2d": ("resnet18", "resnet50"),
        "depthwise": ("mobilenetv2",),
        "int8": ("resnet18", "resnet50"),
    },
}


_CONVOLUTIONS: dict[str, Callable[..., Case]] = {"mixed_conv2d": Joint, "depthwise": Depthwise, "int8": Integer}


@dataclass(frozen=True)
class Request:
    """Empty or None: what suits the device. batch: images of a named network."""

    kernels: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ()
    w_bits: tuple[int, ...] = ()
    a_bits: tuple[int, ...] = ()
    dtype: str = ""
    directions: tuple[str, ...] = ()
    baselines: tuple[str, ...] | None = None
    device: str = ""
    batch: int = 0

    def checked(self) -> Request:
        """With defaults filled in. Raises InputError naming the option."""
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        _known("--device", (device,), ("cpu", "cuda"))
        if device == "cuda" and not torch.cuda.is_available():
            raise InputError("--device: expected cpu, since torch sees no CUDA device, got cuda")
        gpu = device == "cuda"
        _known("--kernel", self.kernels, KERNELS)
        _known("--dtype", (self.dtype,) if self.dtype else (), tuple(DTYPES))
        _known("--direction", self.directions, tuple(DIRECTIONS))
        _known("--baselines", self.baselines or (), BASELINES)
        for option, bits in (("--w-bits", self.w_bits), ("--a-bits", self.a_bits)):
            try:
                check_bits(option, bits or (8,))
            except SpaceError as error:
                raise InputError(str(error)) from None
        if self.batch < 0:
            raise InputError(f"--batch: expected a positive number, got {self.batch}")
        all_directions = ("forward", "backward", "both") if gpu else ("forward", "both")
        return replace(
            self,
            device=device,
            kernels=self.kernels or (KERNELS if gpu else KERNELS[:2]),
            dtype=self.dtype or ("bf16" if gpu else "fp32"),
            directions=self.directions or all_directions,
            baselines=("eager", "branches", "compile", "float", "cudnn") if self.baselines is None else self.baselines,
            batch=self.batch or (256 if gpu else 2),
        )

    @property
    def default_set(self) -> bool:
        """Whether nothing was asked for in particular: then the table also has what surrounds the kernels."""
        return not self.kernels and not self.shapes


def words(option: str, text: str) -> tuple[str, ...]:
    """a,b,c → ("a", "b", "c")."""
    found = tuple(word.strip() for word in text.split(",")) if text else ()
    if "" in found:
        raise InputError(f"{option}: expected words separated by commas, got {text!r}")
    return found


def numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in words(option, text))
    except ValueError:
        raise InputError(f"{option}: expected numbers like 2,4,8, got {text!r}") from None


def _known(option: str, values: Sequence[str], known: Sequence[str]) -> None:
    for value in values:
        if value not in known:
            raise InputError(f"{option}: expected some of {', '.join(known)}, got {value!r}")


def select(request: Request) -> Iterator[tuple[Case | training.Case, tuple[str, ...]]]:
    """Cases with the directions to measure, in order. `request` is checked. Raises InputError where a shape does not suit a kernel."""
    for kernel in request.kernels:
        texts = request.shapes or DEFAULT_SHAPES[request.device][kernel]
        for text in texts:
            for case in _of_kernel(kernel, text, request):
                if isinstance(case, training.Case):
                    yield case, ("both",)
                elif directions := tuple(d for d in request.directions if d in case.directions):
                    yield case, directions


def _of_kernel(kernel: str, text: str, request: Request) -> Iterator[Case | training.Case]:
    dtype = DTYPES[request.dtype]
    w_bits = request.w_bits or (2, 3, 4, 8)
    a_bits = request.a_bits or ((8,) if kernel == "int8" else (2, 4, 8))
    if kernel == "training":
        if text != "resnet20":
            raise InputError(
                f"--shapes: expected resnet20 for training, got {text!r} (an ImageNet step: python -m benchmarks.imagenet_step)"
            )
        yield from training.CASES
    elif kernel == "multi":
        yield Many(shapes.check_network(text), w_bits, dtype)
    elif kernel == "mix_quantize":
        yield from _mixings(text, request, dtype)
    else:
        for shape in _convolutions(text, request.batch, depthwise=kernel == "depthwise"):
            yield _CONVOLUTIONS[kernel](shape, w_bits, a_bits, dtype)


def _mixings(text: str, request: Request, dtype: torch.dtype) -> Iterator[Case]:
    if text in NETWORKS:
        inputs = dict.fromkeys((s.channels, s.height, s.width) for s in shapes.convolutions(text, 1)[1:])
        found: list[tuple[int, ...]] = [(request.batch, *x) for x in inputs]
    else:
        found = [shapes.tensor(text)]
    for shape in found:
        default = (2, 3, 4, 6, 8) if len(shape) == 2 or request.device == "cuda" else (2, 4, 8)
        yield mixing.Mixing(shape, (request.w_bits if len(shape) == 2 else request.a_bits) or default, dtype)


def _convolutions(text: str, batch: int, depthwise: bool) -> list[ConvShape]:
    """Of a network: without the first layer, whose bits are not searched."""
    if text in NETWORKS:
        found = [s for s in shapes.convolutions(text, batch)[1:] if s.depthwise == depthwise]
        if not found:
            raise InputError(f"--shapes: expected a network with depthwise convolutions, such as mobilenetv2, got {text!r}")
        return found
    shape = shapes.convolution(text)
    if shape.depthwise != depthwise:
        kind = "a depthwise convolution like 16x64x16x16:64x3x3/1g64" if depthwise else "a convolution that is not depthwise"
        raise InputError(f"--shapes: expected {kind}, got {text!r}")
    return [shape]


def of(kernel: str, device: str) -> list[tuple[Case, str, str]]:
    """(case, direction, implementation) of one operation on its default shapes, for pytest."""
    chosen = select(Request(kernels=(kernel,), device=device).checked())
    pairs = [(case, direction) for case, directions in chosen if isinstance(case, Case) for direction in directions]
    return [(case, direction, name) for case, direction in pairs for name in case.implementations]


def label(value: Case | str) -> str:
    """What pytest calls a parameter."""
    return value.name if isinstance(value, Case) else value

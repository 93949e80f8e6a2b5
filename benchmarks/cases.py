"""What a case is: one operation on one shape, its implementations, one call of each, and the check that comes before any timing."""

from __future__ import annotations

import abc
import contextlib
import itertools
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from qprune.grids import input_grid, weight_grid
from qprune.kernels import backend

from .measure import WrongResultError, kept_bytes

INDUCTOR = "inductor"
DIRECTIONS = {"forward": "forward", "backward": "backward", "both": "forward + backward"}
Function = Callable[..., Any]
Call = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Work:
    """What has to be done whatever the implementation: logical bytes read and written, and operations of dot products."""

    bytes: int
    flops: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.flops + other.flops)


def weight_grids(bits: Sequence[int]) -> tuple[list[float], list[float]]:
    """n and z of the weight candidates."""
    n, z = zip(*(weight_grid("lsq", b) for b in bits), strict=True)
    return list(n), list(z)


def input_grids(bits: Sequence[int]) -> tuple[list[float], list[float]]:
    """n and z of the activation candidates."""
    n, z = zip(*(input_grid(b) for b in bits), strict=True)
    return list(n), list(z)


class Case(abc.ABC):
    """One operation on one shape, in `dtype`. Everything else about it is a field of the subclass."""

    kernel: ClassVar[str]
    implementations: ClassVar[tuple[str, ...]]
    """Names; of several with the same first part ("compile-eager", "compile-reference") the table shows the fastest."""
    unchecked: ClassVar[tuple[str, ...]] = ("cudnn",)
    """Implementations of something else, there for comparison: the plain convolution."""
    labels: ClassVar[tuple[str, ...]]
    """What the leaves are called in messages."""
    directions: ClassVar[tuple[str, ...]] = ("forward", "backward", "both")
    dtype: torch.dtype

    @property
    @abc.abstractmethod
    def name(self) -> str: ...

    @abc.abstractmethod
    def tensors(self, device: str) -> tuple[Tensor, ...]:
        """The leaves: x first, then the parameters; the same numbers every time."""

    @abc.abstractmethod
    def implementation(self, name: str, compiler: str) -> Function:
        """A differentiable function of the leaves, or a list of results."""

    @abc.abstractmethod
    def work(self, direction: str) -> Work: ...

    @abc.abstractmethod
    def smaller(self) -> Case:
        """The same on a shape that takes milliseconds, for smoke tests."""

    @property
    def x_bytes(self) -> int:
        """Of the one tensor that an elementwise operation works on; 0 for others."""
        return 0

    def missing(self) -> str:
        """Why this case cannot be run here; empty if it can."""
        return ""

    @property
    def item(self) -> int:
        return self.dtype.itemsize

    def limits(self, what: str) -> float:
        """The error that is still taken for rounding, as a share of the norm. Half precision moves parameter gradients more: they are sums
        of numbers that were rounded."""
        exact = self.dtype in (torch.float32, torch.float64)
        return 5e-3 if exact else 2e-2 if what in ("result", "dx", "dweight") else 5e-2

    def compare(self, what: str, got: Tensor, want: Tensor) -> str:
        """How far `got` is off, in words; empty if it agrees."""
        error = float((got - want).norm() / want.norm().clamp_min(1e-30))
        return "" if error <= self.limits(what) else f"{what} differs by {error:.2g} of its norm"

    def autocast(self, device: str) -> contextlib.AbstractContextManager[Any]:
        """float32 parameters, activations in the case's dtype: as in mixed-precision training."""
        if self.dtype in (torch.float32, torch.float64):
            return contextlib.nullcontext()
        return torch.autocast(device, self.dtype)


def random(shape: Sequence[int], device: str, seed: int = 0) -> Tensor:
    g = torch.Generator(device).manual_seed(seed)
    return torch.randn(tuple(shape), generator=g, device=device)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


_compiled = itertools.count()


def compiled(function: Function, compiler: str) -> Function:
    """torch.compile of the function for one shape. The compiler keeps what it made with the function's code, looks through it at every call
    and gives up after a few shapes, so every case has code of its own."""
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_compiled)}")
    method = getattr(function, "__self__", None)
    own = types.FunctionType(code, function.__globals__, code.co_name, function.__defaults__, function.__closure__)
    found: Function = torch.compile(own if method is None else own.__get__(method), dynamic=False, backend=compiler)
    return found


@contextlib.contextmanager
def _backend(name: str) -> Iterator[None]:
    with backend("reference" if name == "reference" else None):
        yield


def call(case: Case, name: str, direction: str, device: str = "cpu", compiler: str = INDUCTOR) -> Call:
    """A function that runs the implementation once in one of the DIRECTIONS; it returns results, or gradients, or both. Gradients of leaves
    that the implementation does not use are left out."""
    with _backend(name):
        function, leaves = case.implementation(name, compiler), case.tensors(device)
    leaves = tuple(t.requires_grad_(direction != "forward") if t.is_floating_point() else t for t in leaves)
    gradients: list[Tensor] = []

    def run() -> tuple[Tensor, ...]:
        with case.autocast(device):
            out = function(*leaves)
        return (out,) if isinstance(out, Tensor) else tuple(out)

    def backward(out: tuple[Tensor, ...], keep: bool) -> tuple[Tensor, ...]:
        if not gradients:
            gradients.extend(torch.empty_like(t).copy_(random(t.shape, device, 7 + i)) for i, t in enumerate(out))
        found = torch.autograd.grad(out, leaves, gradients, retain_graph=keep, allow_unused=True)
        return tuple(t for t in found if t is not None)

    def forward_only() -> tuple[Tensor, ...]:
        with torch.no_grad(), _backend(name):
            return run()

    def both() -> tuple[Tensor, ...]:
        with _backend(name):
            out = run()
            return *out, *backward(out, keep=False)

    def backward_only() -> tuple[Tensor, ...]:
        # a compiled backward pass gives its memory away unless it is told that it will run again
        with _backend(name), torch._functorch.config.patch(donated_buffer=False):  # type: ignore[no-untyped-call]
            if not held:
                held.append(run())
            return backward(held[0], keep=True)

    held: list[tuple[Tensor, ...]] = []
    return {"forward": forward_only, "both": both, "backward": backward_only}[direction]


def reference(case: Case, direction: str, device: str = "cpu") -> tuple[Tensor, ...]:
    """What the definition gives."""
    return call(case, "reference", direction, device)()


def check(case: Case, name: str, got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    """Raise WrongResultError unless the results, or gradients, of an implementation agree with those of the definition."""
    results = max(len(want) - len(case.labels), 1)
    labels = ["result"] * results + [f"d{label}" for label in case.labels] if len(want) > 1 else ["result"]
    if len(want) == len(case.labels) > 1:
        labels = [f"d{label}" for label in case.labels]
    for what, a, b in zip(labels, got, want, strict=True):
        found = case.compare(what, a.detach().double().reshape(b.shape), b.detach().double())
        if found:
            raise WrongResultError(f"{case.name}, {name}: {found}")


def kept(case: Case, name: str, device: str = "cpu") -> int:
    """Bytes that the implementation keeps for its backward pass, without the parameters; each storage counts once."""
    with _backend(name):
        function, leaves = case.implementation(name, INDUCTOR), case.tensors(device)
    leaves = tuple(t.requires_grad_() if t.is_floating_point() else t for t in leaves)

    def forward() -> Any:
        with _backend(name), case.autocast(device):
            return function(*leaves)

    return kept_bytes(forward, leaves[1:])

"""The switches of a run: where it computes, in which precision and memory layout, and how its steps are launched."""

from __future__ import annotations

import platform
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qprune.errors import BackendError
from qprune.passes import following
from qprune.ranks import ALONE, Ranks

AMP: dict[str, torch.dtype | None] = {"": None, "bf16": torch.bfloat16, "fp16": torch.float16}
COMPILER = "inductor"
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")


class Switches(Protocol):
    """The options of a run that are about speed (see `qprune.options.RunOptions`)."""

    @property
    def device(self) -> str: ...
    @property
    def tf32(self) -> bool | None: ...
    @property
    def cuda_graph(self) -> bool: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def sync_bn(self) -> bool: ...


def is_device(text: object) -> bool:
    """Is it auto, cpu, cuda or cuda:N? Whether this machine has it is another question."""
    return isinstance(text, str) and _DEVICE.fullmatch(text) is not None


def device_of(text: str) -> torch.device:
    """The device for a word of `is_device`: auto is the present CUDA GPU if there is one, else the CPU; cuda the present one. Raises
    BackendError for a GPU that is not there."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if text == "cpu" or (text == "auto" and not count):
        return torch.device("cpu")
    asked = torch.device("cuda" if text == "auto" else text)
    if not count:
        raise BackendError(f"device: {text!r} is asked for, and torch finds no CUDA GPU here; take cpu or auto")
    index = torch.cuda.current_device() if asked.index is None else asked.index
    if index >= count:
        raise BackendError(f"device: {text!r} is asked for, and this machine has {count} CUDA GPUs, from cuda:0")
    return torch.device("cuda", index)


def described(device: torch.device) -> str:
    """The name of the hardware."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()


def check(switches: Switches, ranks: Ranks = ALONE) -> torch.device:
    """The device. Raises BackendError if it is not there, or if it, or the ranks together, cannot do what is asked for."""
    device = device_of(switches.device)
    if switches.sync_bn and device.type != "cuda":
        raise BackendError(f"sync_bn: torch synchronises normalisations on CUDA GPUs only, and the run computes on {device}; leave it out")
    if not ranks.alone:
        if switches.batch_size % ranks.count:
            raise BackendError(
                f"batch_size: {switches.batch_size} samples, those of all processes, cannot be shared equally by {ranks.count}; choose a "
                "multiple"
            )
        if switches.cuda_graph:
            raise BackendError("cuda_graph: the exchange between processes cannot be recorded; leave it out, or run one process")
        if device.type == "cuda" and (":" in switches.device or ranks.local >= torch.cuda.device_count()):
            raise BackendError(
                f"device: every process needs a GPU of its own; this is process {ranks.local} of a machine with "
                f"{torch.cuda.device_count()}, and {switches.device!r} is asked for; take auto, cuda or cpu, and as many processes as GPUs"
            )
    if switches.cuda_graph and device.type != "cuda":
        raise BackendError(f"cuda_graph: needs a CUDA GPU, and the run computes on {device}; leave it out, or choose another device")
    return device


@contextmanager
def switched(switches: Switches) -> Iterator[torch.device]:
    """Within, the device is the present one of its kind, and TF32 is as asked for; None leaves that to torch, whose convolutions use it and
    whose matrix products do not."""
    device = check(switches)
    places = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # type: ignore[attr-defined]
    before = [place.fp32_precision for place in places]
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        try:
            if switches.tf32 is not None:
                for place in places:
                    place.fp32_precision = "tf32" if switches.tf32 else "ieee"
            yield device
        finally:
            for place, value in zip(places, before, strict=True):
                place.fp32_precision = value


@contextmanager
def compiled(model: nn.Module, on: bool = True) -> Iterator[None]:
    """Within, calls of the model go through torch.compile; its class, its hooks and the keys of its state_dict stay."""
    if on:
        torch.compiler.reset()  # what other models were compiled to counts towards the limit of variants of one function
        with warnings.catch_warnings():
            # of torch, for a class of its own, when the compiler is imported
            warnings.filterwarnings("ignore", message="`torch.jit.script_method` is deprecated", category=DeprecationWarning)
            model.compile(backend=COMPILER)
    try:
        yield
    finally:
        model._compiled_call_impl = None  # type: ignore[assignment]


def laid_out(x: Tensor, channels_last: bool) -> Tensor:
    """x [B, C, H, W] in that layout, other x as they are."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return x.contiguous(memory_format=layout) if x.dim() == 4 else x


NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@contextmanager
def synchronised(model: nn.Module, on: bool = True) -> Iterator[None]:
    """Within, batch normalisations take their statistics from the batches of all ranks (torch.nn.SyncBatchNorm). The modules stay the same,
    with their hooks and their place; only their class is another one meanwhile."""
    norms = [module for module in model.modules() if type(module) in NORMS] if on else []
    kinds = [type(norm) for norm in norms]
    try:
        for norm in norms:
            norm.__class__ = nn.SyncBatchNorm  # type: ignore[assignment]
            norm.process_group = None  # type: ignore[assignment]
        yield
    finally:
        for norm, kind in zip(norms, kinds, strict=True):
            norm.__class__ = kind
            norm.__dict__.pop("process_group", None)


class Contiguous:
    """The batches (x, y) of a loader whose x are in channels_last, with x in the plain layout."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.following(0)

    def following(self, done: int) -> Iterator[tuple[Tensor, Tensor]]:
        """A pass without its first `done` batches."""
        for x, y in following(self.loader, done):
            yield laid_out(x, channels_last=False), y


class LossScale:
    """Keeps float16's gradients from underflow: the loss is scaled for the backward pass, by a factor that falls when gradients overflow
    and rises when they did not for long (torch.amp.GradScaler). Updates whose gradients overflow are to be left out.

    skipped   how many were
    in_a_row  how many of these since the last update that was made; more than `limit` are no matter of scale: its start, 2^16, is 1 then
    """

    limit = 20

    def __init__(self, device: torch.device) -> None:
        self.scaler = torch.amp.GradScaler(device.type)
        self.skipped = self.in_a_row = 0

    def scaled(self, loss: Tensor) -> Tensor:
        scaled: Tensor = self.scaler.scale(loss)
        return scaled

    def unscale(self, optimizers: Iterable[torch.optim.Optimizer], nonfinite: Callable[[], str | None]) -> str | None:
        """Divide the gradients of all parameters by the factor, and adapt it. Returns what `nonfinite` then finds, the name of a parameter
        whose gradient is not finite: the update is to be left out."""
        for optimizer in optimizers:
            self.scaler.unscale_(optimizer)
        found = nonfinite()
        self.scaler.update()
        self.in_a_row = self.in_a_row + 1 if found else 0
        self.skipped += found is not None
        return found

    @property
    def hopeless(self) -> bool:
        return self.in_a_row > self.limit

    def state_dict(self) -> dict[str, Any]:
        return {"scaler": self.scaler.state_dict(), "skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scaler.load_state_dict(state["scaler"])
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]


def loss_scale(dtype: torch.dtype | None, device: torch.device) -> LossScale | None:
    """For float16; other formats have the exponents of float32."""
    return LossScale(device) if dtype == torch.float16 else None

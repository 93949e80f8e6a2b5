"""The switches of a run: where it computes, in which precision, in which memory layout."""

from __future__ import annotations

import platform
import re

import torch

from qprune.errors import BackendError

_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")


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

"""Numbers that are known beforehand, as tensors that are made once: a copy from the host in every step would wait for the device."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


@functools.lru_cache(maxsize=65536)
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The numbers as a vector on a device. The same tensor every time: not to be changed."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)

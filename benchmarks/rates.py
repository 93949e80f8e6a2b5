"""What this machine can do at most, measured in the run itself: the bandwidth of a copy and the rate of a matrix product."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from .measure import alternate


def measure(device: str, quick: bool = False) -> dict[str, Any]:
    """copy: bytes per second, read and written. matmul: flops per second; float32 on a CPU, bf16 on a GPU."""
    gpu = device == "cuda"
    size = (1 << 30) if gpu else (32 << 20) if quick else (128 << 20)
    side = 8192 if gpu else 512 if quick else 1024
    dtype = torch.bfloat16 if gpu else torch.float32
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    functions = {"copy": lambda: target.copy_(source), "matmul": lambda: a @ b}
    timings = alternate(functions, 3 if quick else 10, device)
    seconds = {name: statistics.median(values) for name, values in timings.rounds.items()}
    rates: dict[str, Any] = {"copy": 2 * size / seconds["copy"], "matmul": 2 * side**3 / seconds["matmul"]}
    return {**rates, "matmul of": f"{side} x {side} {str(dtype).removeprefix('torch.')}", "copy of": f"{size >> 20} MiB"}

"""Clocks, rounds that alternate between implementations so that a slow minute of the machine is slow for all of them, and bytes kept."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Function = Callable[[], Any]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class WrongResultError(Exception):
    """An implementation disagrees with the definition: its time means nothing."""


class CudaClock:
    """Seconds of GPU time since the first call, for anything that reads a clock before and after the work (pytest-benchmark's `timer`).

    Times are added up in a Python float: elapsed_time is a float32 of milliseconds and would lose microseconds within minutes.
    """

    def __init__(self) -> None:
        self.previous: Any = None
        self.seconds = 0.0

    def __call__(self) -> float:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        if self.previous is not None:
            self.seconds += self.previous.elapsed_time(event) * 1e-3
        self.previous = event
        return self.seconds


def clock(device: str) -> Callable[[], float]:
    return CudaClock() if device == "cuda" else time.perf_counter


def flush_cache(device: str) -> Callable[[], None]:
    """What to do before a round so that it does not find its input in the cache of a GPU (60 MB on an H100)."""
    if device != "cuda":
        return lambda: None
    buffer = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")

    def flush() -> None:
        buffer.zero_()

    return flush


@dataclass(frozen=True)
class Timings:
    """Seconds per call of each implementation, one entry per round; entries of the same round were measured next to each other."""

    rounds: dict[str, list[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.rounds[name])

    def ratio(self, name: str, baseline: str) -> float:
        """Median over rounds of time / baseline's time."""
        return statistics.median(a / b for a, b in zip(self.rounds[name], self.rounds[baseline], strict=True))

    def fastest(self, names: list[str]) -> str:
        return min(names, key=self.median)


def alternate(functions: Mapping[str, Function], rounds: int, device: str = "cpu", least: float = 0.02) -> Timings:
    """Time the functions in turn, `rounds` times, each time beginning with another one.

    On a CPU a round repeats a call for at least `least` seconds; on a GPU it is one call after a cache flush.
    """
    now, flush = clock(device), flush_cache(device)
    calls: dict[str, int] = {}
    for name, function in functions.items():
        function()
        start = now()
        function()
        calls[name] = 1 if device == "cuda" else max(1, min(1000, round(least / max(now() - start, 1e-7))))
    names, seconds = list(functions), {name: [0.0] * rounds for name in functions}
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            function = functions[name]
            flush()
            start = now()
            for _ in range(calls[name]):
                function()
            seconds[name][i] = (now() - start) / calls[name]
    return Timings(seconds)


def peak_bytes(function: Function) -> int:
    """The most memory that a call on a GPU takes on top of what is there before it."""
    function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated()) - before


def kept_bytes(forward: Callable[[], Tensor], exclude: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass of forward(), each storage once, without those of `exclude`."""
    skip = {t.untyped_storage().data_ptr() for t in exclude}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no address is used twice

    def pack(t: Tensor) -> Tensor:
        alive.append(t)
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = forward()
    del out
    return sum(size for address, size in kept.items() if address not in skip)

"""What a phase of a run takes: time, processor time, and the most memory at once."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

MEASURES = {
    "cuda": "the most that torch had allocated on the GPU during the phase",
    "rss": "the highest resident memory of the process during the phase, code and libraries included",
    "process": "the highest resident memory of the process since its start, since this system cannot reset it",
}


@dataclass(frozen=True)
class Usage:
    """seconds      of wall-clock time
    cpu_seconds  of processor time, over all threads of the process
    memory       the most bytes at once
    before       bytes in use when the phase began; 0 where unknown
    measure      which bytes: a key of MEASURES
    """

    seconds: float
    cpu_seconds: float
    memory: int
    before: int
    measure: str


class Meter:
    """Measures phases; `phases` holds their Usage by name, the last of those that had one name."""

    def __init__(self) -> None:
        self.phases: dict[str, Usage] = {}
        self._going: tuple[str, Usage, float, float] | None = None

    @contextmanager
    def phase(self, name: str, earlier: Usage | None = None) -> Iterator[None]:
        """What happens within is measured; nothing is recorded of a phase that raises. earlier: what the phase took in another process,
        to which this adds."""
        measure, before = _begin()
        start = Usage(0.0, 0.0, 0, before, measure) if earlier is None else earlier
        self._going = (measure, start, time.perf_counter(), time.process_time())
        try:
            yield
            self.phases[name] = self.so_far()
        finally:
            self._going = None

    def so_far(self) -> Usage:
        """What the phase that is being measured took until now."""
        assert self._going is not None
        measure, earlier, wall, cpu = self._going
        seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
        memory = max(earlier.memory, _highest(measure)) if earlier.measure == measure else earlier.memory
        return Usage(earlier.seconds + seconds, earlier.cpu_seconds + cpu_seconds, memory, earlier.before, earlier.measure)

    def as_dict(self) -> dict[str, dict[str, float | int | str]]:
        return {name: asdict(usage) for name, usage in self.phases.items()}


def _begin() -> tuple[str, int]:
    """(measure, bytes in use), with the high-water mark set to what is in use."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return "cuda", torch.cuda.memory_allocated()
    _give_back()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: VmHWM becomes VmRSS
        return "rss", _status("VmRSS")
    except (OSError, ValueError):
        return "process", 0


def _highest(measure: str) -> int:
    if measure == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    if measure == "rss":
        return _status("VmHWM")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(key)


def _give_back() -> None:
    """Let glibc return freed memory, so that one phase's does not count for the next."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)

"""How fast tensors are summed over the ranks of a job: `torchrun --nproc-per-node 2 -m benchmarks.allreduce`.

Bandwidth is that of nccl-tests' "bus bandwidth": 2 (N - 1) / N of the bytes, over the seconds; latency that of eight bytes, over log2(N).
"""

from __future__ import annotations

import statistics
import sys
import time

import torch
import torch.distributed as dist

from qprune import ranks
from qprune.ranks import Ranks
from qprune.scale import BUCKET, Link

SMALL = 8


def _seconds(size: int, who: Ranks, device: torch.device, rounds: int) -> float:
    """Median over rounds of the slowest rank's seconds for one sum of so many bytes."""
    tensor = torch.zeros(size // 4, device=device)
    found = []
    for number in range(rounds + 1):
        dist.barrier(group=who.group)
        started = time.perf_counter()
        dist.all_reduce(tensor, group=who.group)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = max(who.gathered(time.perf_counter() - started))
        if number:
            found.append(seconds)
    return statistics.median(found)


def measure(who: Ranks, device: torch.device, size: int = BUCKET, rounds: int = 5) -> Link:
    """Of this job; without limits for one process."""
    if who.alone:
        return Link()
    small, large = _seconds(SMALL, who, device, 4 * rounds), _seconds(size, who, device, rounds)
    sent = 2 * (who.count - 1) / who.count * size
    return Link(sent / max(large - small, 1e-9), small / max(1.0, torch.tensor(float(who.count)).log2().item()))


def main() -> int:
    with ranks.joined() as who:
        if who.alone:
            sys.stderr.write("start it with torchrun --nproc-per-node 2 (or more)\n")
            return 2
        device = torch.device("cuda", who.local) if torch.cuda.is_available() else torch.device("cpu")
        link = measure(who, device)
        if who.main:
            print(f"{who.count} ranks on {device.type}: {link.bandwidth / 1e9:.2f} GB/s, latency {link.latency * 1e6:.0f} µs")
    return 0


if __name__ == "__main__":
    sys.exit(main())

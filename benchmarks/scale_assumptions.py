"""What the tables of a search on 1 to 64 GPUs rest on besides the roofline; nothing here was measured on a GPU."""

from __future__ import annotations

from dataclasses import dataclass

from qprune.scale import Link

from .table import markdown_table


@dataclass(frozen=True)
class Assumptions:
    """Seconds, bytes, shares and numbers.

    slower       a real step takes so many times the roofline's
    operation    seconds in which the host asks for one operation
    operations   of a step, by network, counted on a CPU: `python -m benchmarks.operations`
    nvlink       bytes per second that a GPU sends to others of its node (H200 data sheet: 900 GB/s, both directions together)
    network      bytes per second that a node sends: eight adapters of 400 Gb/s
    ethernet     the same with one adapter of 100 Gb/s for the node
    reached      share of these that sums reach
    latency      seconds of a sum of a few numbers between two GPUs
    node         GPUs of a node
    memory       bytes of a GPU (H200 data sheet: 141 GB); usable: share of it for tensors, besides the CUDA context and fragmentation
    workers      processes per GPU that read images; worker: images per second of each, half of what Pillow alone decodes and resizes on a
                 core (results/data-cpu.json): files, flips, normalisation, batches and larger images take their share
    checkpoint   seconds; twice what was measured with a search of this network on a CPU (results/checkpoint-cpu.json)
    epochs       of float training, search, fine-tuning, uniform baseline
    parameters, gates, ranges, buffers   numbers, as `prepare` makes them for 4 weight and 4 input widths per layer
    """

    slower: float = 2.0
    operation: float = 8e-6
    operations: tuple[tuple[str, int], ...] = (("float", 731), ("search", 3503), ("fixed", 2139))
    nvlink: float = 450e9
    network: float = 400e9
    ethernet: float = 12.5e9
    reached: float = 0.75
    latency: float = 20e-6
    node: int = 8
    memory: float = 141e9
    usable: float = 0.92
    workers: int = 12
    worker: float = 400.0
    checkpoint: float = 3.0
    epochs: tuple[int, ...] = (90, 30, 60, 90)
    parameters: int = 25_557_032
    gates: int = 416
    ranges: int = 107_258
    buffers: int = 55_007

    def link(self, ranks: int, slow: bool = False) -> Link:
        """A ring crosses every node once in and once out, with all of its adapters together."""
        inside = ranks <= self.node
        return Link(self.reached * (self.nvlink if inside else self.ethernet if slow else self.network), self.latency)


ASSUMED = Assumptions()


def assumptions(given: Assumptions = ASSUMED) -> str:
    """What the tables rest on, and where it is from."""
    sheet, assumed = "data sheet", "assumed"
    lines = [
        ("a step on the GPU", f"{given.slower:g} times the roofline's", "roofline: `benchmarks/steps.py`, predicted; factor: assumed"),
        ("the host asks for one operation in", f"{given.operation * 1e6:g} µs", assumed),
        (
            "operations of a step: float, search, fixed bits",
            ", ".join(f"{count:,}" for _, count in given.operations),
            "counted on a CPU, `python -m benchmarks.operations`",
        ),
        ("NVLink, one direction", f"{given.nvlink / 1e9:g} GB/s", sheet),
        ("network of a node of 8 GPUs", f"{given.network / 1e9:g} GB/s", "eight adapters of 400 Gb/s, " + sheet),
        ("of these, sums reach", f"{given.reached:.0%}", assumed),
        ("a small sum between two GPUs; every doubling adds as much", f"{given.latency * 1e6:g} µs", assumed),
        ("memory of an H200", f"{given.memory / 1e9:g} GB, {given.usable:.0%} of it usable", f"{sheet}; share: {assumed}"),
        ("processes that read images, per GPU", f"{given.workers} of {given.worker:g} images/s", assumed + "; see Data below"),
        ("checkpoint of the search", f"{given.checkpoint:g} s", assumed + ", from what was measured on a CPU below"),
        (
            "parameters; gates; ranges of quantizers",
            f"{given.parameters:,}; {given.gates:,}; {given.ranges:,}",
            "counted, 4 weight and 4 input widths per layer",
        ),
        ("epochs: float, search, fine-tuning, uniform baseline", ", ".join(map(str, given.epochs)), "chosen"),
    ]
    return markdown_table(("what", "value", "from"), [list(line) for line in lines], left=("what", "value", "from"))

"""What a search of ResNet-50 on ImageNet costs on 1 to 64 GPUs: the tables of docs/scale.md.

    python -m benchmarks.scale            # print them
    python -m benchmarks.scale --write    # and put them into docs/scale.md

Nothing here is measured on a GPU. Steps come from bytes, flops and instructions (benchmarks/steps.py), the model of scale from
qprune/scale.py, everything else is an assumption named in `Assumptions`, or was measured on a CPU where that is said.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qprune import scale
from qprune.scale import Link, Parts, Plan, Size, StepCost

from . import predict, shapes, steps
from .machine import ROOT
from .table import markdown_table

NETWORK, NORMS, IMAGES, VALIDATION = "resnet50", 53, 1_281_167, 50_000
RANKS = (1, 2, 4, 8, 16, 32, 64)
EPOCHS = {"float": 90, "search": 30, "finetune": 60, "uniform": 90}
NETWORK_OF = {"float": "float", "search": "search", "finetune": "fixed", "uniform": "fixed"}
GLOBAL_BATCH, RANK_BATCH = 1024, 256
BEGIN, END = "<!-- tables: python -m benchmarks.scale --write -->", "<!-- end of the tables -->"
DOCUMENT = ROOT / "docs" / "scale.md"


@dataclass(frozen=True)
class Assumptions:
    """What the tables rest on besides the roofline.

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
    workers      processes per GPU that read images; worker: images per second of each (Pillow alone decodes, crops and resizes 767 of
                 500 x 375 pixels on a core of the CPU named below; flips, normalisation, batches, files and larger images take their share)
    checkpoint   seconds (2.8 measured on that CPU, busy with other work, with a search of this network: 206 MB)
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
    parameters: int = 25_557_032
    gates: int = 416
    ranges: int = 107_258
    buffers: int = 55_007

    def link(self, ranks: int, slow: bool = False) -> Link:
        """A ring crosses every node once in and once out, with all of its adapters together."""
        inside = ranks <= self.node
        return Link(self.reached * (self.nvlink if inside else self.ethernet if slow else self.network), self.latency)


ASSUMED = Assumptions()


def roofline(name: str, images: int) -> float:
    """Seconds of a step of the float network, of the search (factorised form), or of the network at fixed bits."""
    if name == "float":
        return steps.plain(NETWORK, images)
    return steps.search("shared", NETWORK, images) if name == "search" else fixed(images)


def fixed(images: int) -> float:
    """A step at fixed bits: weights and inputs are quantized once, and every convolution is one of the library."""
    plain = steps.plain(NETWORK, images)
    others = shapes.convolutions(NETWORK, images, distinct=False)[1:]
    quantized = sum(sum(p.seconds(predict.H200) for p in predict.mix(shape.x_elements, 1)) for shape in others)
    return plain + quantized + predict.seconds(predict.weights(shapes.weights(NETWORK), 1))


def step_cost(name: str, given: Assumptions) -> StepCost:
    """Through the roofline's steps of 32 and of 256 images."""
    cost = StepCost.through((32, given.slower * roofline(name, 32)), (256, given.slower * roofline(name, 256)))
    return replace(cost, host=dict(given.operations)[name] * given.operation)


def parts(ranks: int, given: Assumptions = ASSUMED, slow: bool = False) -> Parts:
    costs = {name: step_cost(name, given) for name in ("float", "search", "fixed")}
    trained = {"float": given.parameters, "search": given.parameters + given.gates + given.ranges, "fixed": given.parameters + given.ranges}
    return Parts(
        step={phase: costs[name] for phase, name in NETWORK_OF.items()},
        evaluation={phase: costs[name].per_image / 3 for phase, name in NETWORK_OF.items()},
        gradients={phase: float(scale.NUMBER * trained[name]) for phase, name in NETWORK_OF.items()},
        checkpoint=dict.fromkeys(NETWORK_OF, given.checkpoint),
        loading=1 / given.worker,
        workers=given.workers,
        link=given.link(ranks, slow),
    )


def size(recompute: bool = False, given: Assumptions = ASSUMED) -> Size:
    """Of the search: bytes that the roofline's model keeps for the backward pass, and the largest layer's gradient of input and output."""
    kept = steps.kept(NETWORK, 1, mixed=not recompute)
    largest = max(2 * (shape.x_elements + shape.y_elements) for shape in shapes.convolutions(NETWORK, 1))
    image = 4 * 3 * 224 * 224
    return Size(given.parameters, given.gates + given.ranges, given.buffers, given.parameters, kept + largest, image)


def plan(ranks: int, batch: int) -> Plan:
    return Plan(IMAGES, batch, EPOCHS, VALIDATION, ranks)


def scaling(batches: Sequence[int], given: Assumptions = ASSUMED) -> str:
    """One line per number of GPUs, with its batch over all of them: the search step, in milliseconds, and hours."""
    lines, first = [], 0.0
    for ranks, batch in zip(RANKS, batches, strict=True):
        found, of = parts(ranks, given), plan(ranks, batch)
        step, times = scale.step(found, of, "search"), scale.run(found, of)
        rate = batch / step.seconds
        first = first or rate
        lines.append([
            str(ranks), str(batch // ranks), _ms(step.computing), _ms(summed(found, ranks)), _ms(step.communication), _ms(step.seconds),
            f"{rate:,.0f}", f"{rate / first / ranks:.0%}", step.dominant, _hours(times["search"]), _hours(times["total"]),
        ])  # fmt: skip
    columns = (
        "GPUs", "images a GPU", "computing", "communication", "not hidden", "step", "images/s", "of linear", "takes most", "search, h",
        "run, h",
    )  # fmt: skip
    return markdown_table(columns, lines, left=("takes most",))


def summed(found: Parts, ranks: int) -> float:
    """Seconds in which the gradients of a search step are summed, if nothing else is done."""
    size = found.gradients["search"]
    return found.link.all_reduce(size, ranks, math.ceil(size / scale.BUCKET))


def variants(given: Assumptions = ASSUMED) -> str:
    """The search step under other assumptions, and what takes most of it."""
    lines = []
    for ranks in RANKS:
        usual = parts(ranks, given)
        recorded = {name: replace(cost, host=0.0) for name, cost in usual.step.items()}
        others = (
            usual,
            replace(usual, workers=4),
            parts(ranks, given, slow=True),
            replace(usual, agreements=scale.AGREEMENTS + 2 * NORMS),
            replace(usual, step=recorded),
        )
        found = [scale.step(other, plan(ranks, GLOBAL_BATCH), "search") for other in others]
        lines.append([str(ranks), *(f"{_ms(step.seconds)} {step.dominant}" for step in found)])
    columns = ("GPUs", "as above", "4 processes read", "100 Gb/s between nodes", "synchronised normalisations", "CUDA graphs")
    return markdown_table(columns, lines, left=columns[1:])


def data_bound(given: Assumptions = ASSUMED) -> str:
    """How many processes keep a GPU busy, by phase."""
    lines = []
    for phase, name in (("float", "float"), ("search", "search"), ("finetune", "fixed bits")):
        rate = RANK_BATCH / parts(1, given).step[phase].seconds(RANK_BATCH)
        lines.append([name, f"{rate:,.0f}", *(f"{rate / worker:.0f}" for worker in (200, 400, 800))])
    columns = ("step of", "images/s of a GPU", "processes at 200 images/s each", "at 400", "at 800")
    return markdown_table(columns, lines, left=("step of",))


def communication(given: Assumptions = ASSUMED) -> str:
    lines = []
    for ranks in RANKS[1:]:
        found, slow = parts(ranks, given), parts(ranks, given, slow=True)
        size, small = found.gradients["search"], found.link.all_reduce(0, ranks)
        sent = 2 * (ranks - 1) / ranks * size
        times = (summed(found, ranks), summed(slow, ranks), small, 2 * NORMS * small)
        lines.append([str(ranks), f"{sent / 1e6:.0f}", str(math.ceil(size / scale.BUCKET)), *map(_ms, times)])
    columns = (
        "GPUs",
        "MB that each sends",
        "buckets",
        "ms",
        "ms with 100 Gb/s",
        "ms of one agreement",
        "ms of 53 synchronised normalisations",
    )
    return markdown_table(columns, lines, left=())


def memory(given: Assumptions = ASSUMED) -> str:
    lines = []
    for images in (16, 64, 256, 512, 1024):
        found = scale.memory(size(given=given), images, 8, item=2)
        lean = sum(scale.memory(size(True, given), images, 8, item=2).values())
        lines.append(
            [str(images), *(f"{value / 1e9:.2f}" for value in found.values()), f"{sum(found.values()) / 1e9:.1f}", f"{lean / 1e9:.1f}"]
        )
    names = list(scale.memory(size(given=given), 1, 8, item=2))
    return markdown_table(("images a GPU", *names, "together", "with recompute"), lines, left=())


def fitting(given: Assumptions = ASSUMED) -> str:
    lines = []
    for name, total in (("H200, 141 GB", given.memory), ("80 GB", 80e9), ("24 GB", 24e9)):
        found = [scale.largest_batch(size(recompute, given), given.usable * total, 8, item=2) for recompute in (False, True)]
        lines.append([name, *map(str, found)])
    return markdown_table(("GPU", "images", "with recompute"), lines, left=("GPU",))


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}" if seconds < 0.01 else f"{seconds * 1e3:.1f}"


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f}"


def document(given: Assumptions = ASSUMED) -> str:
    """The tables, in Markdown."""
    strong = scaling([GLOBAL_BATCH] * len(RANKS), given)
    weak = scaling([RANK_BATCH * ranks for ranks in RANKS], given)
    texts = [
        f"Strong scaling, {GLOBAL_BATCH} images in a step over all GPUs. Milliseconds of a step of the search:",
        strong,
        f"Weak scaling, {RANK_BATCH} images on every GPU:",
        weak,
        "The first table's step under other assumptions, one at a time, milliseconds:",
        variants(given),
        "Processes that read images, for every GPU at 256 images, so that it does not wait:",
        data_bound(given),
        "Communication of a step of the search:",
        communication(given),
        "Memory of a GPU in the search, GB, several GPUs:",
        memory(given),
        f"The largest batch of a GPU, {given.usable:.0%} of its memory being usable:",
        fitting(given),
    ]
    return "\n\n".join(texts)


def put(text: str, tables: str) -> str:
    """The document with these tables between its marks."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{rest.split(END)[1]}"


def main(arguments: Sequence[str] | None = None, path: Path = DOCUMENT) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description="A search of ResNet-50 on 1 to 64 GPUs, predicted.")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/scale.md")
    if parser.parse_args(arguments).write:
        path.write_text(put(path.read_text(), document()))
    else:
        print(document())
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What a search of ResNet-50 on ImageNet costs on 1 to 64 GPUs: the tables of docs/scale.md.

    python -m benchmarks.scale            # print them
    python -m benchmarks.scale --write    # and put them into docs/scale.md

Nothing here is measured on a GPU. Steps come from bytes, flops and instructions (benchmarks/steps.py), the model of scale from
qprune/scale.py, everything else is an assumption named in scale_assumptions.py, or was measured on a CPU where that is said.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from qprune import scale
from qprune.scale import Parts, Plan, Size, StepCost

from . import predict, scale_measured, shapes, steps
from .machine import ROOT
from .scale_assumptions import ASSUMED, Assumptions, assumptions
from .table import markdown_table

NETWORK, NORMS, IMAGES, VALIDATION = "resnet50", 53, 1_281_167, 50_000
RANKS = (1, 2, 4, 8, 16, 32, 64)
NETWORK_OF = {"float": "float", "search": "search", "finetune": "fixed", "uniform": "fixed"}
GLOBAL_BATCH, RANK_BATCH = 1024, 256
DOCUMENT = ROOT / "docs" / "scale.md"


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


def plan(ranks: int, batch: int, given: Assumptions = ASSUMED) -> Plan:
    return Plan(IMAGES, batch, dict(zip(NETWORK_OF, given.epochs, strict=True)), VALIDATION, ranks)


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


def document(given: Assumptions = ASSUMED) -> dict[str, str]:
    """The generated parts of the document, in Markdown, by name."""
    scaled = [
        f"Strong scaling, {GLOBAL_BATCH} images in a step over all GPUs; times in milliseconds of a step of the search:",
        scaling([GLOBAL_BATCH] * len(RANKS), given),
        f"Weak scaling, {RANK_BATCH} images on every GPU:",
        scaling([RANK_BATCH * ranks for ranks in RANKS], given),
        "The first table's step under other assumptions, one at a time, in milliseconds:",
        variants(given),
    ]
    sizes = [memory(given), f"Images that fit, {given.usable:.0%} of the memory being usable:", fitting(given)]
    return {
        "check": scale_measured.runs(),
        "driver": scale_measured.driver(),
        "checkpoints": scale_measured.checkpoints(),
        "data": "\n\n".join(
            [
                scale_measured.loading(),
                f"Processes that a GPU would need at {RANK_BATCH} images, by the steps that are predicted below:",
                data_bound(given),
            ]
        ),
        "assumptions": assumptions(given),
        "scaling": "\n\n".join(scaled),
        "communication": communication(given),
        "memory": "\n\n".join(sizes),
    }


def put(text: str, parts_of_it: Mapping[str, str]) -> str:
    """The document with these texts between the marks of their names."""
    for name, new in parts_of_it.items():
        begin, end = f"<!-- {name}: python -m benchmarks.scale --write -->", f"<!-- end of {name} -->"
        before, rest = text.split(begin)
        text = f"{before}{begin}\n\n{new}\n\n{end}{rest.split(end)[1]}"
    return text


def main(arguments: Sequence[str] | None = None, path: Path = DOCUMENT) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description="A search of ResNet-50 on 1 to 64 GPUs, predicted.")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/scale.md")
    if parser.parse_args(arguments).write:
        path.write_text(put(path.read_text(), document()))
    else:
        print("\n\n".join(f"## {name}\n\n{text}" for name, text in document().items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())

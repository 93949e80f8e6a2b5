"""Print what the model of predict.py expects: `python -m benchmarks.roofline [--network resnet50] [--routes] [--copy 4.3e12] …`.

With --routes it prints, for every shape of the ImageNet networks, which route a joint convolution should take: rows of
(taps, input channels, output channels, quantizers): route, per group, as Python. With --rates FILE it takes the rates that a run measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from . import predict, shapes, steps
from .predict import H200, Gpu
from .targets import TARGETS

NETWORKS = ("resnet18", "resnet50", "mobilenetv2")
NOTE = "Predicted from bytes, flops and instructions, not measured."


def _microseconds(*values: float) -> list[str]:
    return [f"{value * 1e6:.0f}" for value in values]


def operations(name: str, batch: int, gpu: Gpu) -> Table:
    """Bytes, flops and microseconds of every operation on each distinct convolution of a network."""
    table = Table(title=f"{name}, batch {batch}, bf16, microseconds forward / backward", caption=NOTE, title_justify="left")
    columns = (
        "layer",
        "of",
        "MB x",
        "GFLOP",
        "mix K=5",
        "plain conv",
        "shared",
        "sampled M=3",
        "joint library",
        "joint fused",
        "route",
        "int8",
    )
    for column in columns:
        table.add_column(column, justify="left" if column in ("layer", "route") else "right")
    for s in shapes.convolutions(name, batch):
        start = [str(s), str(s.count), f"{s.x_elements * 2 / 1e6:.0f}", f"{s.flops / 1e9:.0f}"]
        mixing = " / ".join(_microseconds(*(p.seconds(gpu) for p in predict.mix(s.x_elements, 5))))
        plain = " / ".join(_microseconds(*predict.library(s, gpu)))
        if s.depthwise:
            found = predict.depthwise(s, 3, gpu)
            table.add_row(*start, mixing, plain, " / ".join(_microseconds(found.forward, found.backward)), "", "", "", "depthwise", "")
            continue
        routes = (predict.shared(s, 3, gpu), predict.sampled(s, 3, gpu), predict.joint_library(s, 3, gpu), predict.joint_fused(s, 3, gpu))
        cells = [" / ".join(_microseconds(r.forward, r.backward)) for r in routes]
        table.add_row(*start, mixing, plain, *cells, predict.joint_route(s, 3, gpu), *_microseconds(predict.int8(s, gpu)))
    return table


def search_steps(name: str, batch: int, gpu: Gpu) -> Table:
    table = Table(title=f"training step of {name}, batch {batch}, bf16", caption=NOTE, title_justify="left")
    for column in ("step", "ms", "against plain"):
        table.add_column(column, justify="left" if column == "step" else "right")
    plain = steps.plain(name, batch, gpu)
    table.add_row("plain", f"{plain * 1e3:.1f}", "1.00")
    for form in ("shared", "sampled", "chosen", "joint", "branches"):
        found = steps.search(form, name, batch, gpu)
        table.add_row(form, f"{found * 1e3:.1f}", f"{found / plain:.2f}")
    return table


def targets(gpu: Gpu) -> Table:
    table = Table(title="targets on an H200", caption=NOTE, title_justify="left")
    for column in ("target", "bound", "predicted", "then"):
        table.add_column(column)
    for target in TARGETS:
        value = target.predicted(gpu)
        table.add_row(target.what, target.goal, target.show(value), target.met(value))
    return table


def route_table(gpu: Gpu = H200, batch: int = 256, quantizers: Sequence[int] = (2, 3, 4)) -> dict[tuple[int, int, int, int], str]:
    """(taps, input channels, output channels, quantizers) → route, channels per group. Of shapes that differ in size the largest counts."""
    found: dict[tuple[int, int, int, int], tuple[int, str]] = {}
    for name in NETWORKS:
        for s in shapes.convolutions(name, batch):
            for m in () if s.depthwise else quantizers:
                key = (s.taps, s.channels // s.groups, s.filters // s.groups, m)
                if s.rows > found.get(key, (0, ""))[0]:
                    found[key] = (s.rows, predict.joint_route(s, m, gpu))
    return {key: found[key][1] for key in sorted(found)}


def as_python(table: Mapping[tuple[int, int, int, int], str]) -> str:
    """The source of `MEASURED` in kernels/routes.py."""
    return "\n".join(["MEASURED = {", *(f'    {key}: "{route}",' for key, route in table.items()), "}"])


def gpu_from(rates: dict[str, Any] | None, **values: float | None) -> Gpu:
    """The H200 of the model, with measured rates (bytes and flops per second) and single values put in their place."""
    measured = {name: float(rates[name]) for name in ("copy", "matmul") if rates and rates.get(name)}
    given = {name: value for name, value in values.items() if value is not None}
    return replace(H200, **{**measured, **given}, name=str(rates["name"]) if rates and "name" in rates else H200.name)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description="Predicted times of every operation on a GPU.")
    parser.add_argument(
        "--network", choices=tuple(shapes.NETWORKS), action="append", help="whose layers (default: ResNet-18 and -50, MobileNetV2)"
    )
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--routes", action="store_true", help="print the table of routes as Python, nothing else")
    parser.add_argument("--rates", type=Path, metavar="FILE", help="take the copy bandwidth and matmul rate from a file of results")
    numbers = [field.name for field in fields(Gpu) if field.name != "name"]
    for name in numbers:
        parser.add_argument(f"--{name}", type=float, help=f"default {getattr(H200, name):g}")
    options = parser.parse_args(arguments)
    rates = json.loads(options.rates.read_text())["machine"].get("rates") if options.rates else None
    gpu = gpu_from(rates, **{name: getattr(options, name) for name in numbers})
    if options.routes:
        print(as_python(route_table(gpu, options.batch)))
        return 0
    console = Console(soft_wrap=True, width=200)
    console.print(f"{gpu}")
    for name in options.network or NETWORKS:
        console.print(operations(name, options.batch, gpu))
    console.print(search_steps("resnet18", options.batch, gpu))
    console.print(targets(gpu))
    return 0


if __name__ == "__main__":
    sys.exit(main())

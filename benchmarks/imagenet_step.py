"""One training step of ResNet-18 at 224 x 224, batch 256, bf16: plain, at fixed 4/4 bits, and searches in their three forms.

    python -m benchmarks.imagenet_step --out benchmarks/results/step.json
    python -m benchmarks.imagenet_step --network resnet20 --side 32 --batch 2 --dtype fp32 --rounds 1      # anywhere, in seconds

A step is forward, backward and SGD on all parameters. Forms: 4 weight widths per filter and 3 activation widths, `shared` (factorised),
`sampled` (straight-through gates, which need the weight's gradient for every activation width), `chosen` (the same with choices drawn
outside, as score-function methods do) and `joint`. Implementations: `eager` (PyTorch operations, candidates mixed before the convolution),
`branches` (a convolution for each of the 12 pairs), `compile` (torch.compile of eager), `qprune`, `graph` (that, or the plain step, as a
CUDA graph), `search` (a whole step of qprune.Search as a CUDA graph, gates and budget included), `lean` (the same, mixing inputs again in
the backward pass).
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from qprune import Budget, Search, SearchSpace, prepare, sample_gates, set_gates
from qprune.gates import gates
from qprune.geometry import weighted_layers
from qprune.prepare import calibrate

from . import machine, rates, table, training
from .baselines import eager_network
from .measure import DEVICE, WrongResultError, alternate
from .rows import quantiles
from .shapes import NETWORKS
from .training import A_BITS, W_BITS, Step

FORMS = ("float", "fixed", "shared", "sampled", "chosen", "joint")
IMPLEMENTATIONS = ("eager", "branches", "compile", "qprune", "graph", "search", "lean")
ORDER = (
    "float/eager", "shared/graph", "shared/qprune", "joint/graph", "chosen/graph", "float/graph", "shared/branches", "joint/qprune",
    "shared/search", "shared/lean", "joint/search", "sampled/graph", "chosen/search", "sampled/search", "joint/lean", "sampled/qprune",
    "shared/eager", "joint/eager", "float/compile", "shared/compile", "joint/compile", "chosen/qprune", "fixed/qprune", "fixed/graph",
    "fixed/eager", "fixed/compile", "sampled/eager", "sampled/compile", "joint/branches",
)  # fmt: skip
"""What matters most comes first, since time may run out."""
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Setup:
    network: str = "resnet18"
    side: int = 224
    batch: int = 256
    dtype: str = "bf16"
    device: str = DEVICE
    rounds: int = 20


def space(form: str) -> SearchSpace:
    if form == "fixed":
        return SearchSpace.fixed(4, 4)
    return SearchSpace(W_BITS, A_BITS, granularity="filter", joint=form in ("sampled", "chosen", "joint"))


def _batch(setup: Setup) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator(setup.device).manual_seed(0)
    x = torch.randn(setup.batch, 3, setup.side, setup.side, generator=g, device=setup.device)
    classes = 10 if setup.side < 64 else 1000
    y = torch.randint(classes, (setup.batch,), generator=g, device=setup.device)
    return x.contiguous(memory_format=torch.channels_last), y


def _model(form: str, setup: Setup, x: torch.Tensor) -> nn.Module:
    """The network with the candidates of a form; the first convolution and the last layer stay float."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = NETWORKS[setup.network][0]()
    net = net.to(setup.device).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    if form == "float":
        return net
    names = [name for name, _ in weighted_layers(net)]
    rules = {names[0]: None, names[-1]: None}
    model = prepare(net, space(form), rules=rules, example_inputs=x[:2].float())
    calibrate(model, [x[:8]])
    if form == "sampled":
        set_gates(model, mode="sampled")
        sample_gates(model, torch.Generator().manual_seed(0))
    if form == "chosen":
        g = torch.Generator().manual_seed(0)
        set_gates(model, mode="fixed")
        for _, gate in gates(model):
            gate.choice.copy_(torch.randint(gate.logits.size(-1), gate.choice.shape, generator=g))
    return model.to(setup.device).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload, no-any-return]


def _eager(form: str, style: str, setup: Setup, x: torch.Tensor) -> nn.Module:
    model = _model(form, setup, x)
    return model if form == "float" else eager_network(model, style)


def build(form: str, implementation: str, setup: Setup) -> Callable[[], Any]:
    """One step as a call. Noise of sampled gates is drawn once, for every implementation alike."""
    x, y = _batch(setup)
    dtype = DTYPES[setup.dtype]
    if implementation in ("eager", "branches", "compile"):
        model = _eager(form, "branches" if implementation == "branches" else "mixing", setup, x)
        step = Step(model, (x, y), dtype=dtype)
        if implementation == "compile":
            step.model = torch.compile(model, dynamic=False)  # type: ignore[assignment]
        return step
    step = Step(_model(form, setup, x), (x, y), dtype=dtype)
    if implementation == "graph":
        return graphed(step)
    if implementation in ("search", "lean"):
        search = Search(step.model, Budget(bops="w4a4"), cuda_graph=setup.device == "cuda", recompute=implementation == "lean")
        return lambda: search.step(step.loss, batch=(x, y))
    return step


def graphed(step: Step) -> Callable[[], None]:
    """The step as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    step.optimizer.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def suits(name: str, device: str) -> bool:
    """Whether a device can run form/implementation."""
    form, implementation = name.split("/")
    if implementation == "graph":
        return device == "cuda"
    allowed = {
        "float": ("eager", "compile"), "fixed": ("eager", "compile", "qprune"),
        "sampled": ("eager", "compile", "qprune", "search"), "chosen": ("qprune", "search"),
    }  # fmt: skip
    return implementation in allowed.get(form, IMPLEMENTATIONS)


def check(form: str, setup: Setup) -> None:
    """Raise WrongResultError unless qprune's layers agree with the eager ones on a small batch."""
    small = replace(setup, batch=min(setup.batch, 8))
    ours, eager = build(form, "qprune", small), build(form, "eager", small)
    assert isinstance(ours, Step) and isinstance(eager, Step)
    # eager code divides by the step in the activation's own precision, which moves codes of 8 bits
    training.check(f"{setup.network}, {form}", ours, eager, limit=5e-3 if setup.dtype == "fp32" else 6e-2)


def _row(form: str, implementation: str, setup: Setup) -> dict[str, Any]:
    return {
        "kernel": "imagenet_step", "case": f"{setup.network} step, {form}", "form": form, "implementation": implementation, "unit": "ms",
        "batch": setup.batch, "side": setup.side, "dtype": setup.dtype,
    }  # fmt: skip


def measure(form: str, implementation: str, setup: Setup) -> dict[str, Any]:
    """Milliseconds and peak memory of one implementation, as a row."""
    row = _row(form, implementation, setup)
    gpu = setup.device == "cuda"
    before = 0
    try:
        if gpu:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        step = build(form, implementation, setup)
        for _ in range(2):
            step()
        peak = int(torch.cuda.max_memory_allocated()) - before if gpu else None
        seconds = alternate({implementation: step}, setup.rounds, setup.device, least=0.0).rounds[implementation]
    except torch.cuda.OutOfMemoryError:
        return {**row, "skipped": "out of memory", "values": {}}
    except Exception as error:  # one implementation that fails must not cost the times of the others
        return {**row, "skipped": f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:160]}", "values": {}, "failed": True}
    finally:
        torch.compiler.reset()
    median = statistics.median(seconds) * 1e3
    band = quantiles(seconds)
    return {
        **row, "ms": median, "value": median, "values": {implementation: median}, "band": band and [1e3 * b for b in band],
        "rounds": setup.rounds, "peak_bytes": peak,
    }  # fmt: skip


def run(setup: Setup, wanted: Sequence[str], seconds: float) -> Iterator[dict[str, Any]]:
    """Rows in ORDER, each form checked before its first row; none begins after `seconds` (0: no limit). The plain step comes again at the
    end: if its two times differ, so did the machine."""
    start, checked = time.perf_counter(), {"float": ""}
    for name in [*(n for n in ORDER if n in wanted), *(["float/eager"] if "float/eager" in wanted and setup.rounds > 1 else [])]:
        form, implementation = name.split("/")
        if seconds and time.perf_counter() - start > seconds:
            return
        if form not in checked:
            try:
                check(form, setup)
                checked[form] = ""
            except WrongResultError as error:
                checked[form] = str(error)
        if checked[form]:
            yield {**_row(form, implementation, setup), "skipped": checked[form], "values": {}, "failed": True}
        else:
            yield measure(form, implementation, setup)


def as_table(rows: Sequence[dict[str, Any]], described: dict[str, Any]) -> Table:
    found = Table(title=machine.headline(described), title_justify="left")
    for column in ("form", "implementation", "ms", "20 to 80 %", "against plain", "peak memory, GiB"):
        found.add_column(column, justify="left" if column in ("form", "implementation") else "right")
    plain = next((row["ms"] for row in rows if (row["form"], row["implementation"]) == ("float", "eager") and "ms" in row), None)
    for row in rows:
        if "skipped" in row:
            found.add_row(row["form"], row["implementation"], row["skipped"])
            continue
        band = " to ".join(f"{b:.1f}" for b in row["band"]) if row["band"] else ""
        ratio = f"{row['ms'] / plain:.2f}" if plain else ""
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.2f}"
        found.add_row(row["form"], row["implementation"], f"{row['ms']:.1f}", band, ratio, peak)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.imagenet_step", description="One training step, plain and searching.")
    parser.add_argument("--network", choices=tuple(NETWORKS), default="resnet18")
    parser.add_argument("--side", type=int, default=224, help="height and width of the images")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16", help="of activations")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", default="", help="form/implementation, several with commas (default: all that this device can run)")
    parser.add_argument("--seconds", type=float, default=0.0, help="begin nothing after so many seconds")
    parser.add_argument("--out", type=Path, help="write the numbers to this JSON file")
    options = parser.parse_args(arguments)
    known = [name for name in ORDER if suits(name, DEVICE)]
    wanted = options.only.split(",") if options.only else known
    if unknown := [name for name in wanted if name not in known]:
        parser.error(f"--only: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    setup = Setup(options.network, options.side, options.batch, options.dtype, DEVICE, options.rounds)
    described = machine.describe(DEVICE)
    described["rates"] = {"name": described["device"], **rates.measure(DEVICE, quick=True)}
    command = " ".join(["python -m benchmarks.imagenet_step", *(sys.argv[1:] if arguments is None else arguments)])
    found: list[dict[str, Any]] = []
    for row in run(setup, wanted, options.seconds):
        found.append(row)
        if options.out is not None:
            table.write_json(options.out, found, described, command)
        print(f"{row['form']}/{row['implementation']}: {row.get('skipped') or format(row['ms'], '.1f') + ' ms'}", file=sys.stderr)
    Console().print(as_table(found, described))
    return int(any(row.get("failed") for row in found))


if __name__ == "__main__":
    sys.exit(main())

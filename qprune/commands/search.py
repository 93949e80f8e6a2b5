"""qprune search: from float training to the report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qprune.commands import shared
from qprune.commands.given import Given, show
from qprune.commands.resumable import agreed, watched
from qprune.console import result_table


def search(
    context: typer.Context,
    overrides: shared.Overrides = None,
    config: shared.Config = None,
    print_config: shared.PrintConfig = False,
    data: shared.Data = "digits",
    data_dir: shared.DataDir = "",
    data_options: shared.DataOptions = None,
    model: shared.Model = "resnet8",
    weights: shared.Weights = "",
    budget: Annotated[str, typer.Option(help='"w3a3" (a uniform network), "2%" (of float), or bops=…,size=…,macs=….')] = "w3a3",
    method: Annotated[str, typer.Option(help="edmips, darts, zur, slimmable, sbs or annc.")] = "edmips",
    out: shared.Out = Path("runs/search"),
    seeds: Annotated[int, typer.Option(help="Repetitions; the table then shows means and 95 % intervals.")] = 1,
    seed: shared.FirstSeed = 0,
    w_bits: Annotated[str, typer.Option(help="Candidate weight bits; 0 = pruned, 32 = float. Default: 2,3,4,6 (sbs: 2,4,8).")] = "",
    a_bits: shared.ABits = "",
    pairs: Annotated[str, typer.Option(help="Joint candidates instead, weight/activation bits: 2/2,2/4,8/8.")] = "",
    granularity: Annotated[str, typer.Option(help="Weight bits per layer or per filter. Default: filter for zur, else layer.")] = "",
    quantizer: Annotated[str, typer.Option(help="Of zur: nice or uniq.")] = "",
    loop: Annotated[str, typer.Option(help="steps; for zur also epochs: logits and weights in turns, in stages.")] = "steps",
    method_options: Annotated[list[str] | None, typer.Option("--set", help="An option of the method, name=value; may be repeated.")] = None,
    edge_bits: shared.EdgeBits = 8,
    float_epochs: Annotated[int, typer.Option(help="Epochs of float training.")] = 40,
    search_epochs: shared.SearchEpochs = 20,
    finetune_epochs: Annotated[int, typer.Option(help="Epochs of fine-tuning after the search.")] = 30,
    batch_size: shared.BatchSize = 64,
    lr: shared.FloatRate = 0.1,
    search_lr: shared.SearchRate = 0.02,
    finetune_lr: shared.FinetuneRate = 0.03,
    arch_lr: shared.GateRate = 0.02,
    convention: shared.Convention = "product",
    deterministic: shared.Deterministic = False,
    device: shared.Device = "auto",
    amp: shared.Amp = "",
    channels_last: shared.ChannelsLast = True,
    compile: shared.Compile = False,
    tf32: shared.Tf32 = None,
    cuda_graph: Annotated[bool, typer.Option("--cuda-graph", help="Replay the steps of the search as CUDA graphs.")] = False,
    accumulate: shared.Accumulate = 1,
    sync_bn: shared.SyncBn = False,
    threads: shared.Threads = 0,
    overwrite: shared.Overwrite = False,
    resume: shared.Resume = False,
    checkpoint_minutes: shared.CheckpointMinutes = 10.0,
    keep: shared.Keep = 3,
    rank_timeout: shared.RankTimeout = 10.0,
    onnx: Annotated[bool, typer.Option("--onnx/--no-onnx", help="Write model.onnx at the end.")] = True,
) -> None:
    """Train a float network, search its bits within a budget, fine-tune, and compare with the uniform network of at least that cost."""
    from qprune import seeds as repeated
    from qprune.config import comparable
    from qprune.options import RunOptions
    from qprune.ranks import joined

    shared.set_threads(threads)
    with joined(rank_timeout) as ranks:
        options = agreed(Given(context, RunOptions, "a run"), context, ranks, comparable)
        if print_config:
            if ranks.main:
                show(options)
            return
        with watched(out, options.seeds, options.batch_size, ranks) as (watcher, stop):
            result = repeated.run(
                options, out, watcher, overwrite, resume=resume, minutes=checkpoint_minutes, keep=keep, stop=stop, ranks=ranks,
            )  # fmt: skip
    if ranks.main:
        if onnx:
            from qprune.exporting import add_onnx

            result = add_onnx(out)
        shared.console.print(result_table(result))
        shared.console.print(result["summary"]["verdict"])
        shared.console.print(f"Report: {out / 'report.html'}")

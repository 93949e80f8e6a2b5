"""qprune compare: methods and baselines side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qprune.commands import shared
from qprune.commands.given import Given, show


def compare(
    context: typer.Context,
    overrides: shared.Overrides = None,
    config: shared.Config = None,
    print_config: shared.PrintConfig = False,
    data: shared.Data = "digits",
    data_dir: shared.DataDir = "",
    data_options: shared.DataOptions = None,
    model: shared.Model = "resnet8",
    weights: shared.Weights = "",
    budgets: Annotated[str, typer.Option(help='"w3a3,w2a2"; budgets with commas are separated by semicolons.')] = "w3a3,w2a2",
    methods: Annotated[
        str, typer.Option(help="Search methods, and uniform, uniform-above, prune-then-quantize, uniform-zur, uniform-sbs.")
    ] = "edmips,darts,zur,uniform,prune-then-quantize",
    seeds: Annotated[int, typer.Option(help="Runs of every method at every budget.")] = 5,
    seed: shared.FirstSeed = 0,
    w_bits: Annotated[str, typer.Option(help="Candidate weight bits, 0 = pruned. Default: each method's own.")] = "",
    a_bits: shared.ABits = "",
    settings: Annotated[list[str] | None, typer.Option("--set", help="An option of one method, zur.samples=4; may be repeated.")] = None,
    edge_bits: shared.EdgeBits = 8,
    float_epochs: Annotated[int, typer.Option(help="Epochs of float training, once per seed.")] = 40,
    search_epochs: shared.SearchEpochs = 20,
    finetune_epochs: Annotated[int, typer.Option(help="Epochs of fine-tuning; baselines train for both in total.")] = 30,
    batch_size: shared.BatchSize = 64,
    lr: shared.FloatRate = 0.1,
    search_lr: shared.SearchRate = 0.02,
    finetune_lr: shared.FinetuneRate = 0.03,
    arch_lr: shared.GateRate = 0.02,
    convention: shared.Convention = "product",
    out: shared.Out = Path("runs/compare"),
    workers: Annotated[int, typer.Option(help="Processes of one thread; 0 = only report on what is done.")] = 1,
) -> None:
    """Run methods and baselines on the same data, network, budgets and seeds; write one table and one figure. The same command goes on
    with a comparison that was interrupted."""
    from qprune.compare.options import CompareOptions
    from qprune.compare.run import run
    from qprune.study.progress import StudyBar

    options = Given(context, CompareOptions, "a comparison").options()
    if print_config:
        show(options)
        return
    with StudyBar(shared.console, "cells") as bar:
        result = run(options, out, workers, bar.watch)
    shared.console.print((out / "table.md").read_text(), highlight=False, markup=False)
    for sentence in result["sentences"]:
        shared.console.print(sentence)
    if result["errors"]:
        shared.console.print(f"{len(result['errors'])} cells failed; the report says why, and the same command tries them again.")
    shared.console.print(f"Report: {out / 'report.html'}")

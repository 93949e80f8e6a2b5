"""qprune compare: methods and baselines side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qprune import arguments
from qprune.commands import shared


def compare(
    data: shared.Data = "digits",
    data_dir: shared.DataDir = "",
    data_option: shared.DataOptions = None,
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
    setting: Annotated[list[str] | None, typer.Option("--set", help="An option of one method, zur.samples=4; may be repeated.")] = None,
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

    options = CompareOptions(
        data=data, data_dir=data_dir, data_options=arguments.settings(data_option or ()), model=model, weights=weights,
        budgets=arguments.words(budgets), methods=arguments.words(methods), seeds=seeds, seed=seed,
        w_bits=arguments.bits(w_bits), a_bits=arguments.bits(a_bits), settings=arguments.method_settings(setting or ()),
        edge_bits=edge_bits, float_epochs=float_epochs, search_epochs=search_epochs, finetune_epochs=finetune_epochs,
        batch_size=batch_size, lr=lr, search_lr=search_lr, finetune_lr=finetune_lr, arch_lr=arch_lr, convention=convention,
    )  # fmt: skip
    with StudyBar(shared.console, "cells") as bar:
        result = run(options, out, workers, bar.watch)
    shared.console.print((out / "table.md").read_text(), highlight=False, markup=False)
    for sentence in result["sentences"]:
        shared.console.print(sentence)
    if result["errors"]:
        shared.console.print(f"{len(result['errors'])} cells failed; the report says why, and the same command tries them again.")
    shared.console.print(f"Report: {out / 'report.html'}")

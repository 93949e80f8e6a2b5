"""qprune study: a grid of configurations times seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qprune.commands import shared
from qprune.commands.given import Given, show


def study(
    context: typer.Context,
    overrides: shared.Overrides = None,
    config: shared.Config = None,
    print_config: shared.PrintConfig = False,
    data: shared.Data = "digits",
    data_dir: shared.DataDir = "",
    data_options: shared.DataOptions = None,
    model: shared.Model = "resnet8",
    weights: shared.Weights = "",
    kind: Annotated[str, typer.Option(help="What varies: bits of one layer's filters, or widths of the stages.")] = "bits",
    layer: Annotated[str, typer.Option(help="bits: the layer whose filters are shared out between the pairs.")] = "conv1",
    pairs: Annotated[str, typer.Option(help="bits: candidates, weight/activation bits.")] = "2/2,3/3,4/4",
    step: Annotated[int, typer.Option(help="bits: filters that move at once.")] = 2,
    others: Annotated[str, typer.Option(help="bits: the pair of all other convolutions.")] = "3/3",
    ratios: Annotated[str, typer.Option(help="widths: shares of filters that a stage may keep.")] = "0.25,0.5,0.75,1",
    seeds: Annotated[int, typer.Option(help="Runs of every configuration.")] = 5,
    seed: shared.FirstSeed = 0,
    float_epochs: Annotated[int, typer.Option(help="Epochs of float training, once per seed.")] = 20,
    epochs: Annotated[int, typer.Option(help="Epochs of every trial.")] = 5,
    batch_size: shared.BatchSize = 64,
    lr: Annotated[float, typer.Option(help="Learning rate of the trials.")] = 0.03,
    convention: Annotated[str, typer.Option(help="bits: how bit operations are counted, product, zur or uniq.")] = "zur",
    quantizer: Annotated[str, typer.Option(help="bits: nice or uniq, of weights and activations.")] = "nice",
    out: shared.Out = Path("runs/study"),
    storage: Annotated[str, typer.Option(help="A shared database, postgresql://…; default: study.db in the folder.")] = "",
    name: Annotated[str, typer.Option(help="Name in that database; default: the folder's name.")] = "",
    workers: Annotated[int, typer.Option(help="Processes on this machine; 0 = only report on what is done.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="Two seeds, two epochs, a coarse grid.")] = False,
) -> None:
    """Train every configuration of a grid with several seeds: do heterogeneous networks differ by more than seeds do? The same command
    goes on with a study that was interrupted."""
    from qprune.study.options import StudyOptions
    from qprune.study.progress import StudyBar
    from qprune.study.run import run

    both = ("weight_quantizer", "input_quantizer")
    options = Given(context, StudyOptions, "a study", {"quantizer": both}).options()
    options = options.quick() if quick else options
    if print_config:
        show(options)
        return
    with StudyBar(shared.console) as bar:
        result = run(options, out, storage or None, name or None, workers, bar.watch)
    shared.console.print(result["sentence"])
    if result["errors"]:
        shared.console.print(f"{len(result['errors'])} trials failed; the report says why, and the same command tries them again.")
    shared.console.print(f"Report: {out / 'report.html'}")

"""qprune train: a float network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qprune.commands import shared
from qprune.commands.given import Given, show
from qprune.commands.resumable import agreed, watched


def train(
    context: typer.Context,
    overrides: shared.Overrides = None,
    config: shared.Config = None,
    print_config: shared.PrintConfig = False,
    data: shared.Data = "digits",
    data_dir: shared.DataDir = "",
    data_options: shared.DataOptions = None,
    model: shared.Model = "resnet8",
    weights: shared.Weights = "",
    out: shared.Out = Path("runs/float"),
    epochs: Annotated[int, typer.Option(help="Passes over the training part.")] = 40,
    batch_size: shared.BatchSize = 64,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Seed of the weights and the batches.")] = 0,
    deterministic: shared.Deterministic = False,
    device: shared.Device = "auto",
    amp: shared.Amp = "",
    channels_last: shared.ChannelsLast = True,
    compile: shared.Compile = False,
    tf32: shared.Tf32 = None,
    accumulate: shared.Accumulate = 1,
    sync_bn: shared.SyncBn = False,
    threads: shared.Threads = 0,
    overwrite: shared.Overwrite = False,
    resume: shared.Resume = False,
    checkpoint_minutes: shared.CheckpointMinutes = 10.0,
    keep: shared.Keep = 3,
    rank_timeout: shared.RankTimeout = 10.0,
) -> None:
    """Train a float network and save it as model.safetensors."""
    from qprune import training
    from qprune.config import completed
    from qprune.ranks import joined

    shared.set_threads(threads)
    with joined(rank_timeout) as ranks:
        options = agreed(Given(context, training.TrainOptions, training.FORM.called), context, ranks, completed)
        if print_config:
            if ranks.main:
                show(options)
            return
        with watched(out, 1, options.batch_size, ranks) as (watcher, stop):
            result = training.run(
                options, out, watcher, overwrite, resume=resume, minutes=checkpoint_minutes, keep=keep, stop=stop, ranks=ranks,
            )  # fmt: skip
    if ranks.main:
        shared.console.print(f"test accuracy {result['test_accuracy']:.2%}, saved in {out / training.MODEL}")

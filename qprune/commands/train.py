"""qprune train: a float network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from qprune import arguments
from qprune.commands import shared
from qprune.console import Bars


def train(
    data: shared.Data = "digits",
    data_dir: shared.DataDir = "",
    data_option: shared.DataOptions = None,
    model: shared.Model = "resnet8",
    weights: shared.Weights = "",
    out: shared.Out = Path("runs/float"),
    epochs: Annotated[int, typer.Option(help="Passes over the training part.")] = 40,
    batch_size: shared.BatchSize = 64,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Seed of the weights and the batches.")] = 0,
    threads: shared.Threads = 0,
    overwrite: shared.Overwrite = False,
) -> None:
    """Train a float network and save it as model.safetensors."""
    from qprune.checkpoint import save
    from qprune.seeds import open_folder
    from qprune.tasks import train as training
    from qprune.tasks.sources import Named, network_of, task_of

    shared.set_threads(threads)
    named = Named(data, data_dir, arguments.settings(data_option or ()), model, weights, batch_size)
    task = task_of(named)
    torch.manual_seed(seed)
    net = network_of(named, task)
    open_folder(out, overwrite)
    loader = task.loader("train", batch_size, torch.Generator().manual_seed(seed))
    with Bars(shared.console, 1) as bars:
        bars.phase("float", seed, epochs * len(loader))
        training.fit(net, loader, epochs, lr=lr, progress=lambda step, total, loss: bars.step({"loss": loss}))
    save(net, out / "model.safetensors")
    accuracy = training.evaluate(net, task.loader("test", 256))[1]
    shared.console.print(f"test accuracy {accuracy:.2%}, saved in {out / 'model.safetensors'}")

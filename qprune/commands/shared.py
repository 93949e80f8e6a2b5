"""What several commands have: options of the same name and meaning, and the console."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

console = Console(soft_wrap=True, markup=False, emoji=False)  # names of folders may have brackets
Out = Annotated[Path, typer.Option(help="Folder for the results.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a run that the folder already holds.")]
Model = Annotated[
    str,
    typer.Option(
        help="resnet8, resnet20, resnet56, thin_resnet, mobilenet, lenet5; torchvision:name, timm:name; or your own, module:function."
    ),
]
Data = Annotated[str, typer.Option(help="digits, synthetic, cifar10, cifar100, imagefolder; or your own, module:function.")]
DataDir = Annotated[str, typer.Option(help="Folder with the files of cifar10, cifar100 or imagefolder.")]
DataOptions = Annotated[list[str] | None, typer.Option("--data-option", help="An option of the data, name=value; may be repeated.")]
Weights = Annotated[str, typer.Option(help="The network's weights to begin with: .safetensors, or a state_dict of torch.save.")]
Threads = Annotated[int, typer.Option(help="CPU threads; 0 = as many as torch chooses.")]
ABits = Annotated[str, typer.Option(help="Candidate activation bits.")]
EdgeBits = Annotated[int, typer.Option(help="Bits of the first and the last layer.")]
FirstSeed = Annotated[int, typer.Option(help="First seed.")]
SearchEpochs = Annotated[int, typer.Option(help="Epochs of search.")]
BatchSize = Annotated[int, typer.Option(help="Samples per step, of all processes together.")]
FloatRate = Annotated[float, typer.Option(help="Learning rate of float training.")]
SearchRate = Annotated[float, typer.Option(help="Learning rate of weights in the search.")]
FinetuneRate = Annotated[float, typer.Option(help="Learning rate of fine-tuning.")]
GateRate = Annotated[float, typer.Option(help="Learning rate of the gates.")]
Convention = Annotated[str, typer.Option(help="How bit operations are counted: product, zur or uniq.")]
Device = Annotated[str, typer.Option(help="auto (a CUDA GPU if there is one), cpu, cuda or cuda:N.")]
Amp = Annotated[str, typer.Option(help="bf16 or fp16: train in mixed precision. Default: float32.")]
ChannelsLast = Annotated[bool, typer.Option("--channels-last/--no-channels-last", help="Layout of images and weights.")]
Compile = Annotated[bool, typer.Option("--compile", help="Train through torch.compile.")]
Deterministic = Annotated[bool, typer.Option("--deterministic", help="The same seed gives the same bits again on one device.")]
Tf32 = Annotated[bool | None, typer.Option("--tf32/--no-tf32", help="Tensor cores for float32 on GPUs. Default: convolutions only.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with the run in the folder, with the options it began with; begin it if there is none.")
]
CheckpointMinutes = Annotated[float, typer.Option(help="Minutes between checkpoints; 0 = only at the end of epochs.")]
Keep = Annotated[int, typer.Option(help="How many checkpoints to keep.")]
Accumulate = Annotated[int, typer.Option(help="Parts of a batch, one after the other, for one update: the memory of a part.")]
SyncBn = Annotated[bool, typer.Option("--sync-bn", help="Under torchrun: batch statistics of all processes together (GPUs).")]
RankTimeout = Annotated[float, typer.Option(help="Under torchrun: minutes that a process waits for the others.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Options by the names that --print-config shows; they count before the file's.", metavar="KEY=VALUE"),
]
Config = Annotated[Path | None, typer.Option(help="A YAML file with options; flags and KEY=VALUE count before it.")]
PrintConfig = Annotated[bool, typer.Option("--print-config", help="Print all options as such a file, and do nothing.")]


def set_threads(threads: int) -> None:
    """0: as many as torch chooses."""
    if threads > 0:
        torch.set_num_threads(threads)

"""qprune bench: the operations, checked and timed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from qprune.commands import shared


def bench(
    kernel: Annotated[
        str, typer.Option(help="Some of training, mix_quantize, multi, mixed_conv2d, depthwise, int8. Default: by device.")
    ] = "",
    shapes: Annotated[str, typer.Option(help="resnet18, resnet50, mobilenetv2, resnet20, or 256x64x56x56, 256x64x56x56:64x3x3/1, …")] = "",
    w_bits: Annotated[str, typer.Option(help="Candidate weight bits.")] = "",
    a_bits: shared.ABits = "",
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16. Default: fp32 on a CPU, bf16 on a GPU.")] = "",
    direction: Annotated[str, typer.Option(help="Some of forward, backward, both.")] = "",
    baselines: Annotated[str | None, typer.Option(help="Some of eager, branches, layers, compile, cudnn, reference, float.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "",
    batch: Annotated[int, typer.Option("--batch", "--batch-size", help="Images of a named network, or of a step of --end-to-end.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Three rounds.")] = False,
    seconds: Annotated[float, typer.Option(help="Begin no case after so many seconds.")] = 0.0,
    out: Annotated[Path | None, typer.Option(help="Write the numbers to this JSON file.")] = None,
    against: Annotated[Path | None, typer.Option(help="Show what moved since this JSON file.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
    aot: Annotated[bool, typer.Option("--aot", help="Compile the kernels for GPUs and print what they use, instead.")] = False,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 = two.")] = 0,
    end_to_end: Annotated[
        bool, typer.Option("--end-to-end", help="Measure the parts of a search, predict a whole run from them, and make it, instead.")
    ] = False,
    model: Annotated[str, typer.Option(help="--end-to-end: the network, as qprune search takes it.")] = "resnet20",
    method: Annotated[str, typer.Option(help="--end-to-end: the search method.")] = "edmips",
    image_size: Annotated[int, typer.Option(help="--end-to-end: pixels of a side.")] = 32,
    steps: Annotated[int, typer.Option(help="--end-to-end: of an epoch.")] = 20,
    epochs: Annotated[int, typer.Option(help="--end-to-end: of float training, of the search and of fine-tuning.")] = 1,
    accumulate: Annotated[int, typer.Option(help="--end-to-end: parts that a batch is split into.")] = 1,
    amp: Annotated[str, typer.Option(help="--end-to-end: bf16 or fp16.")] = "",
) -> None:
    """Check and time the kernels against eager PyTorch, torch.compile and plain convolutions; or a whole search on made-up data."""
    from qprune.benchmarks import bench as benchmark
    from qprune.benchmarks.selection import Request, numbers, words

    if aot:
        raise typer.Exit(benchmark.print_compiled(quick))
    benchmark.set_threads(threads)
    command = " ".join(["qprune bench", *sys.argv[2:]])
    if end_to_end:
        from qprune.benchmarks import endtoend

        usual = endtoend.Request()
        whole = endtoend.Request(
            model, batch or usual.batch, steps, image_size, method, device or usual.device, amp, epochs, accumulate,
            2 if quick else usual.rounds,
        )  # fmt: skip
        raise typer.Exit(endtoend.run(whole, out, shared.console.print, command))
    request = Request(
        words("--kernel", kernel), words("--shapes", shapes), numbers("--w-bits", w_bits), numbers("--a-bits", a_bits), dtype,
        words("--direction", direction), None if baselines is None else words("--baselines", baselines), device, batch,
    )  # fmt: skip
    raise typer.Exit(benchmark.run(request, benchmark.Output(out, against, markdown, quick, seconds), shared.console, command))

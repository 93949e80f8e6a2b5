"""The command line: qprune search, export, compare, study, train, cost, report, bench."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from qprune import arguments
from qprune.console import Bars, cost_table, export_table, result_table
from qprune.errors import QPruneError
from qprune.resume.signals import Stopped

app = typer.Typer(
    help="Choose how many bits every filter and activation of a convolutional network gets, within a budget.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
console = Console(soft_wrap=True)
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
DataOption = Annotated[list[str] | None, typer.Option("--data-option", help="An option of the data, name=value; may be repeated.")]
Weights = Annotated[str, typer.Option(help="The network's weights to begin with: .safetensors, or a state_dict of torch.save.")]
Threads = Annotated[int, typer.Option(help="CPU threads; 0 = as many as torch chooses.")]
ABits = Annotated[str, typer.Option(help="Candidate activation bits.")]
EdgeBits = Annotated[int, typer.Option(help="Bits of the first and the last layer.")]
FirstSeed = Annotated[int, typer.Option(help="First seed.")]
SearchEpochs = Annotated[int, typer.Option(help="Epochs of search.")]
BatchSize = Annotated[int, typer.Option(help="Samples per step.")]
FloatRate = Annotated[float, typer.Option(help="Learning rate of float training.")]
SearchRate = Annotated[float, typer.Option(help="Learning rate of weights in the search.")]
FinetuneRate = Annotated[float, typer.Option(help="Learning rate of fine-tuning.")]
GateRate = Annotated[float, typer.Option(help="Learning rate of the gates.")]
Convention = Annotated[str, typer.Option(help="How bit operations are counted: product, zur or uniq.")]


@app.command()
def search(
    context: typer.Context,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Options by the names that --print-config shows; they count before the file's.", metavar="KEY=VALUE"),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A YAML file with options; flags and KEY=VALUE count before it.")] = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print all options as such a file, and do nothing.")] = False,
    data: Data = "digits",
    data_dir: DataDir = "",
    data_option: DataOption = None,
    model: Model = "resnet8",
    weights: Weights = "",
    budget: Annotated[str, typer.Option(help='"w3a3" (a uniform network), "2%" (of float), or bops=…,size=…,macs=….')] = "w3a3",
    method: Annotated[str, typer.Option(help="edmips, darts, zur, slimmable, sbs or annc.")] = "edmips",
    out: Out = Path("runs/search"),
    seeds: Annotated[int, typer.Option(help="Repetitions; the table then shows means and 95 % intervals.")] = 1,
    seed: FirstSeed = 0,
    w_bits: Annotated[str, typer.Option(help="Candidate weight bits; 0 = pruned, 32 = float. Default: 2,3,4,6 (sbs: 2,4,8).")] = "",
    a_bits: ABits = "",
    pairs: Annotated[str, typer.Option(help="Joint candidates instead, weight/activation bits: 2/2,2/4,8/8.")] = "",
    granularity: Annotated[str, typer.Option(help="Weight bits per layer or per filter. Default: filter for zur, else layer.")] = "",
    quantizer: Annotated[str, typer.Option(help="Of zur: nice or uniq.")] = "",
    loop: Annotated[str, typer.Option(help="steps; for zur also epochs: logits and weights in turns, in stages.")] = "steps",
    setting: Annotated[list[str] | None, typer.Option("--set", help="An option of the method, name=value; may be repeated.")] = None,
    edge_bits: EdgeBits = 8,
    float_epochs: Annotated[int, typer.Option(help="Epochs of float training.")] = 40,
    search_epochs: SearchEpochs = 20,
    finetune_epochs: Annotated[int, typer.Option(help="Epochs of fine-tuning after the search.")] = 30,
    batch_size: BatchSize = 64,
    lr: FloatRate = 0.1,
    search_lr: SearchRate = 0.02,
    finetune_lr: FinetuneRate = 0.03,
    arch_lr: GateRate = 0.02,
    convention: Convention = "product",
    deterministic: Annotated[bool, typer.Option("--deterministic", help="The same seed gives the same bits again on one device.")] = False,
    device: Annotated[str, typer.Option(help="auto (a CUDA GPU if there is one), cpu, cuda or cuda:N.")] = "auto",
    amp: Annotated[str, typer.Option(help="bf16 or fp16: train in mixed precision. Default: float32.")] = "",
    channels_last: Annotated[bool, typer.Option("--channels-last/--no-channels-last", help="Layout of images and weights.")] = True,
    compiled: Annotated[bool, typer.Option("--compile", help="Train through torch.compile.")] = False,
    tf32: Annotated[
        bool | None, typer.Option("--tf32/--no-tf32", help="Tensor cores for float32 on GPUs. Default: convolutions only.")
    ] = None,
    cuda_graph: Annotated[bool, typer.Option("--cuda-graph", help="Replay the steps of the search as CUDA graphs.")] = False,
    threads: Threads = 0,
    overwrite: Overwrite = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in the folder, with the options it began with; begin it if there is none.")
    ] = False,
    checkpoint_minutes: Annotated[float, typer.Option(help="Minutes between checkpoints; 0 = only at the end of epochs.")] = 10.0,
    keep: Annotated[int, typer.Option(help="How many checkpoints to keep.")] = 3,
    onnx: Annotated[bool, typer.Option("--onnx/--no-onnx", help="Write model.onnx at the end.")] = True,
) -> None:
    """Train a float network, search its bits within a budget, fine-tune, and compare with the uniform network of at least that cost."""
    from qprune import config as configuration
    from qprune import seeds as repeated
    from qprune.options import RunOptions
    from qprune.resume.folder import check_same, stored_options
    from qprune.resume.signals import Stop
    from qprune.watch import TENSORBOARD, Several, TensorBoard, has_tensorboard

    _set_threads(threads)
    values: dict[str, Any] = {
        "data": data, "data_dir": data_dir, "data_options": arguments.settings(data_option or ()), "model": model, "weights": weights,
        "budget": budget, "method": method, "w_bits": arguments.bits(w_bits), "a_bits": arguments.bits(a_bits),
        "pairs": arguments.pairs(pairs), "granularity": granularity, "quantizer": quantizer, "loop": loop,
        "method_options": arguments.settings(setting or ()),
        "edge_bits": edge_bits, "float_epochs": float_epochs, "search_epochs": search_epochs, "finetune_epochs": finetune_epochs,
        "batch_size": batch_size, "lr": lr, "search_lr": search_lr, "finetune_lr": finetune_lr, "arch_lr": arch_lr,
        "seed": seed, "seeds": seeds, "convention": convention, "deterministic": deterministic,
        "device": device, "amp": amp, "channels_last": channels_last, "compile": compiled, "tf32": tf32, "cuda_graph": cuda_graph,
    }  # fmt: skip
    flags = {name: value for name, value in values.items() if _given(context, name)}
    given = configuration.merged(config, overrides or (), flags)
    began = stored_options(out) if resume else None
    if began is not None:
        check_same(began, out, configuration.comparable(began, given), threads)
    options = began or RunOptions(**configuration.over(values, given))
    if print_config:
        typer.echo(configuration.dump(options), nl=False)
        return
    if began is not None and (out / "result.json").exists():
        console.print(f"{out} holds a finished run.")
    stop = Stop()
    with stop.listening(), Bars(console, options.seeds, options.batch_size) as bars:
        watcher = Several([bars, TensorBoard(out / TENSORBOARD)] if has_tensorboard() else [bars])
        result = repeated.run(
            options, out, watcher, overwrite, resume=resume, minutes=checkpoint_minutes, keep=keep, stop=stop,
        )  # fmt: skip
    if onnx:
        from qprune.exporting import add_onnx

        result = add_onnx(out)
    console.print(result_table(result))
    console.print(result["summary"]["verdict"])
    console.print(f"Report: {out / 'report.html'}")


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="The folder of a finished qprune search.")],
    formats: Annotated[str, typer.Option("--format", help="Some of onnx, qonnx, packed, torch, safetensors; or all.")] = "onnx",
    out: Annotated[Path | None, typer.Option(help="Folder for the files. Default: export in the run's folder.")] = None,
    seed: Annotated[int | None, typer.Option(help="Which of the run's seeds; default: the first.")] = None,
    samples: Annotated[int, typer.Option(help="Test samples on which files are compared with PyTorch.")] = 64,
    threads: Threads = 0,
) -> None:
    """Write the network of a run in other formats, and compare what the files compute with PyTorch on the run's test data."""
    from qprune.errors import ExportError
    from qprune.exporting import export_run, formats_of

    _set_threads(threads)
    place, files = export_run(folder, formats_of(formats), out, seed, samples)
    console.print(export_table(files))
    written = [file.file for file in files if file.error is None]
    if written:
        console.print(f"In {place}: {', '.join(written)}")
    failed = [f"{file.format}: {file.error}" for file in files if file.error is not None]
    if failed:
        raise ExportError("; ".join(failed))


@app.command()
def compare(
    data: Data = "digits",
    data_dir: DataDir = "",
    data_option: DataOption = None,
    model: Model = "resnet8",
    weights: Weights = "",
    budgets: Annotated[str, typer.Option(help='"w3a3,w2a2"; budgets with commas are separated by semicolons.')] = "w3a3,w2a2",
    methods: Annotated[
        str, typer.Option(help="Search methods, and uniform, uniform-above, prune-then-quantize, uniform-zur, uniform-sbs.")
    ] = "edmips,darts,zur,uniform,prune-then-quantize",
    seeds: Annotated[int, typer.Option(help="Runs of every method at every budget.")] = 5,
    seed: FirstSeed = 0,
    w_bits: Annotated[str, typer.Option(help="Candidate weight bits, 0 = pruned. Default: each method's own.")] = "",
    a_bits: ABits = "",
    setting: Annotated[list[str] | None, typer.Option("--set", help="An option of one method, zur.samples=4; may be repeated.")] = None,
    edge_bits: EdgeBits = 8,
    float_epochs: Annotated[int, typer.Option(help="Epochs of float training, once per seed.")] = 40,
    search_epochs: SearchEpochs = 20,
    finetune_epochs: Annotated[int, typer.Option(help="Epochs of fine-tuning; baselines train for both in total.")] = 30,
    batch_size: BatchSize = 64,
    lr: FloatRate = 0.1,
    search_lr: SearchRate = 0.02,
    finetune_lr: FinetuneRate = 0.03,
    arch_lr: GateRate = 0.02,
    convention: Convention = "product",
    out: Out = Path("runs/compare"),
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
    with StudyBar(console, "cells") as bar:
        result = run(options, out, workers, bar.watch)
    console.print((out / "table.md").read_text(), highlight=False, markup=False)
    for sentence in result["sentences"]:
        console.print(sentence)
    if result["errors"]:
        console.print(f"{len(result['errors'])} cells failed; the report says why, and the same command tries them again.")
    console.print(f"Report: {out / 'report.html'}")


@app.command()
def study(
    data: Data = "digits",
    data_dir: DataDir = "",
    data_option: DataOption = None,
    model: Model = "resnet8",
    weights: Weights = "",
    kind: Annotated[str, typer.Option(help="What varies: bits of one layer's filters, or widths of the stages.")] = "bits",
    layer: Annotated[str, typer.Option(help="bits: the layer whose filters are shared out between the pairs.")] = "conv1",
    pairs: Annotated[str, typer.Option(help="bits: candidates, weight/activation bits.")] = "2/2,3/3,4/4",
    step: Annotated[int, typer.Option(help="bits: filters that move at once.")] = 2,
    others: Annotated[str, typer.Option(help="bits: the pair of all other convolutions.")] = "3/3",
    ratios: Annotated[str, typer.Option(help="widths: shares of filters that a stage may keep.")] = "0.25,0.5,0.75,1",
    seeds: Annotated[int, typer.Option(help="Runs of every configuration.")] = 5,
    seed: FirstSeed = 0,
    float_epochs: Annotated[int, typer.Option(help="Epochs of float training, once per seed.")] = 20,
    epochs: Annotated[int, typer.Option(help="Epochs of every trial.")] = 5,
    batch_size: BatchSize = 64,
    lr: Annotated[float, typer.Option(help="Learning rate of the trials.")] = 0.03,
    convention: Annotated[str, typer.Option(help="bits: how bit operations are counted, product, zur or uniq.")] = "zur",
    quantizer: Annotated[str, typer.Option(help="bits: nice or uniq, of weights and activations.")] = "nice",
    out: Out = Path("runs/study"),
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

    options = StudyOptions(
        data=data, data_dir=data_dir, data_options=arguments.settings(data_option or ()), model=model, weights=weights,
        kind=kind, layer=layer, pairs=arguments.pairs(pairs), step=step, others=arguments.pair(others),
        ratios=arguments.numbers(ratios), seeds=seeds, seed=seed, float_epochs=float_epochs, epochs=epochs, batch_size=batch_size, lr=lr,
        weight_quantizer=quantizer, input_quantizer=quantizer, convention=convention,
    )  # fmt: skip
    with StudyBar(console) as bar:
        result = run(options.quick() if quick else options, out, storage or None, name or None, workers, bar.watch)
    console.print(result["sentence"])
    if result["errors"]:
        console.print(f"{len(result['errors'])} trials failed; the report says why, and the same command tries them again.")
    console.print(f"Report: {out / 'report.html'}")


@app.command()
def train(
    data: Data = "digits",
    data_dir: DataDir = "",
    data_option: DataOption = None,
    model: Model = "resnet8",
    weights: Weights = "",
    out: Out = Path("runs/float"),
    epochs: Annotated[int, typer.Option(help="Passes over the training part.")] = 40,
    batch_size: BatchSize = 64,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Seed of the weights and the batches.")] = 0,
    threads: Threads = 0,
    overwrite: Overwrite = False,
) -> None:
    """Train a float network and save it as model.safetensors."""
    from qprune.checkpoint import save
    from qprune.seeds import open_folder
    from qprune.tasks import train as training
    from qprune.tasks.sources import Named, network_of, task_of

    _set_threads(threads)
    named = Named(data, data_dir, arguments.settings(data_option or ()), model, weights, batch_size)
    task = task_of(named)
    torch.manual_seed(seed)
    net = network_of(named, task)
    open_folder(out, overwrite)
    loader = task.loader("train", batch_size, torch.Generator().manual_seed(seed))
    with Bars(console, 1) as bars:
        bars.phase("float", seed, epochs * len(loader))
        training.fit(net, loader, epochs, lr=lr, progress=lambda step, total, loss: bars.step({"loss": loss}))
    save(net, out / "model.safetensors")
    accuracy = training.evaluate(net, task.loader("test", 256))[1]
    console.print(f"test accuracy {accuracy:.2%}, saved in {out / 'model.safetensors'}")


@app.command()
def cost(
    model: Model = "resnet8",
    policy: Annotated[Path | None, typer.Option(help="A policy.json; or give --bits.")] = None,
    bits: Annotated[str, typer.Option(help='A uniform policy, "w4a4".')] = "",
    edge_bits: Annotated[int, typer.Option(help="With --bits: bits of the first and the last layer.")] = 8,
    input_shape: Annotated[str, typer.Option(help="Channels x height x width.")] = "3x32x32",
    num_classes: Annotated[int, typer.Option(help="Outputs of the network.")] = 10,
    convention: Annotated[str, typer.Option(help="product, zur or uniq.")] = "product",
    preactivation: Annotated[bool, typer.Option("--preactivation", help="ResNets: the pre-activation form.")] = False,
) -> None:
    """Print what a network costs, layer by layer: float, with uniform bits, or with a policy."""
    from qprune.costing import cost_report

    title, result, geometry = cost_report(model, policy, bits, edge_bits, input_shape, num_classes, convention, preactivation)
    console.print(cost_table(title, result, geometry))


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Write report.html of a run folder, finished or not."""
    from qprune.report import write_report

    console.print(f"Report: {write_report(folder)}")


@app.command()
def bench(
    kernel: Annotated[
        str, typer.Option(help="Some of training, mix_quantize, multi, mixed_conv2d, depthwise, int8. Default: by device.")
    ] = "",
    shapes: Annotated[str, typer.Option(help="resnet18, resnet50, mobilenetv2, resnet20, or 256x64x56x56, 256x64x56x56:64x3x3/1, …")] = "",
    w_bits: Annotated[str, typer.Option(help="Candidate weight bits.")] = "",
    a_bits: ABits = "",
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16. Default: fp32 on a CPU, bf16 on a GPU.")] = "",
    direction: Annotated[str, typer.Option(help="Some of forward, backward, both.")] = "",
    baselines: Annotated[str | None, typer.Option(help="Some of eager, branches, layers, compile, cudnn, reference, float.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "",
    batch: Annotated[int, typer.Option(help="Images of a named network.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Three rounds.")] = False,
    seconds: Annotated[float, typer.Option(help="Begin no case after so many seconds.")] = 0.0,
    out: Annotated[Path | None, typer.Option(help="Write the numbers to this JSON file.")] = None,
    against: Annotated[Path | None, typer.Option(help="Show what moved since this JSON file.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
    aot: Annotated[bool, typer.Option("--aot", help="Compile the kernels for GPUs and print what they use, instead.")] = False,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 = two.")] = 0,
) -> None:
    """Check and time the kernels against eager PyTorch, torch.compile and plain convolutions."""
    from qprune.benchmarks import bench as benchmark
    from qprune.benchmarks.selection import Request, numbers, words

    if aot:
        raise typer.Exit(benchmark.print_compiled(quick))
    benchmark.set_threads(threads)
    request = Request(
        words("--kernel", kernel), words("--shapes", shapes), numbers("--w-bits", w_bits), numbers("--a-bits", a_bits), dtype,
        words("--direction", direction), None if baselines is None else words("--baselines", baselines), device, batch,
    )  # fmt: skip
    command = " ".join(["qprune bench", *sys.argv[2:]])
    raise typer.Exit(benchmark.run(request, benchmark.Output(out, against, markdown, quick, seconds), console, command))


def _given(context: typer.Context, name: str) -> bool:
    """The option of the run was given on the command line."""
    name = {"method_options": "setting", "data_options": "data_option", "compile": "compiled"}.get(name, name)
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _set_threads(threads: int) -> None:
    if threads > 0:
        torch.set_num_threads(threads)


def main() -> None:
    """Run the command line. An error that qprune raises on purpose is one line on standard error, exit code 2."""
    _guarded(app)


def _guarded(command: Callable[..., Any]) -> None:
    try:
        command()
    except QPruneError as error:
        sys.stderr.write(f"qprune: {' '.join(str(error).split())}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("qprune: interrupted\n")
        sys.exit(130)
    except Stopped as stopped:
        sys.stderr.write(f"qprune: {stopped}\n")
        sys.exit(stopped.exit_code)


if __name__ == "__main__":
    main()

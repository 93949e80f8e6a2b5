"""What the command line shows: progress bars and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from qprune.cost import Cost
from qprune.geometry import Geometry
from qprune.result import si

if TYPE_CHECKING:
    from qprune.exporting import Exported

PHASES = {"float": "train float", "search": "search", "finetune": "fine-tune", "uniform": "train uniform"}


class Rate(ProgressColumn):
    """Images per second, over the steps of the last seconds or, of a phase that is over, over all."""

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed * self.batch_size:,.0f} images/s" if speed and self.batch_size else "")


class Bars:
    """One progress bar per phase: steps done, loss, accuracy on validation data, expected cost over budget, mean entropy of the gates,
    images per second, time left.

    batch_size  images of a step; 0: their number is not shown
    """

    def __init__(self, console: Console, seeds: int, batch_size: int = 0) -> None:
        self.seeds = seeds
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=10), MofNCompleteColumn(), TextColumn("{task.fields[values]}"),
            Rate(batch_size),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True), console=console,
            refresh_per_second=4,
        )  # fmt: skip
        self.task: TaskID | None = None
        self.values: dict[str, str] = {}

    def __enter__(self) -> Bars:
        self.progress.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.progress.stop()

    def phase(self, name: str, seed: int, steps: int, done: int = 0) -> None:
        label = PHASES.get(name, name) + (f" (seed {seed})" if self.seeds > 1 else "")
        self.values = {}
        self.task = self.progress.add_task(f"{label:<13}", total=steps, completed=done, values="")

    def step(self, values: Mapping[str, float]) -> None:
        assert self.task is not None
        self._show(values)
        self.progress.advance(self.task)

    def epoch(self, values: Mapping[str, Any]) -> None:
        shown = {"acc": "val_accuracy", "entropy": "entropy"}
        self._show({label: values[name] for label, name in shown.items() if values.get(name) is not None})

    def _show(self, values: Mapping[str, float]) -> None:
        self.values |= {name: f"{name} {value:.2f}" for name, value in values.items()}
        if self.task is not None:
            self.progress.update(self.task, values=" ".join(self.values.values()))


def size(bits: float) -> str:
    return si(bits / 8, "B")


def result_table(result: Mapping[str, Any]) -> Table:
    """float / searched / uniform: accuracy, bit operations, size, mean bits; and the search's time in float epochs."""
    summary = result["summary"]
    ratio = summary["search_in_float_epochs"]
    runs = len(result["runs"])
    taken = [] if ratio is None else [f"search time: {ratio:.1f} float epochs"]
    caption = "; ".join(taken + ([] if runs == 1 else [f"means over {runs} seeds, ± 95 % Student-t interval"]))
    table = Table(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left")
    table.add_column("network")
    for heading in ("test accuracy", "BOPs", "of float", "size", "bits w / a"):
        table.add_column(heading, justify="right")
    for kind in ("float", "searched", "uniform"):
        row = summary[kind]
        interval = "" if row["accuracy_ci95"] is None else f" ± {row['accuracy_ci95']:.2%}"
        share = row["bops"] / summary["float"]["bops"]
        table.add_row(
            row["label"],
            f"{row['accuracy_mean']:.2%}{interval}",
            si(row["bops"]),
            f"{share:.2%}",
            size(row["size_bits"]),
            f"{row['w_bits']:.2f} / {row['a_bits']:.2f}",
        )
    return table


def cost_table(title: str, cost: Cost, geometry: Geometry) -> Table:
    """One row per layer, and the total."""
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    table.add_column("layer")
    for heading in ("filters", "MACs", "w bits", "a bits", "BOPs", "size"):
        table.add_column(heading, justify="right")
    for row in cost.rows:
        filters = str(geometry.layers[row.name].filters)
        table.add_row(
            row.name, filters, si(float(row.macs)), f"{float(row.w_bits):.3g}", f"{float(row.a_bits):.3g}",
            si(float(row.bops)), size(float(row.size_bits)),
        )  # fmt: skip
    table.add_section()
    table.add_row("total", "", si(float(cost.macs)), "", "", f"{float(cost.bops) / 1e6:,.1f} M", size(float(cost.size_bits)))
    return table


def export_table(files: Sequence[Exported]) -> Table:
    """One row per file and per program that ran it: bytes, operators, and how its outputs differ from PyTorch's."""
    samples = ", ".join(str(n) for n in sorted({file.samples for file in files if file.samples}))
    caption = f"against PyTorch on {samples} test samples; differ: by more than 1e-5 · max(1, |value|)" if samples else None
    table = Table(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left")
    table.add_column("format", no_wrap=True)
    for heading in ("size", "nodes"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("run by", no_wrap=True)
    for heading in ("largest", "differ", "top-1"):
        table.add_column(heading, justify="right", no_wrap=True)
    for file in files:
        if file.error is not None:
            table.add_row(file.format, "–")
            continue
        head = (file.format, si(file.bytes, "B"), str(sum(file.operators.values())) if file.operators else "–")
        for i, (program, found) in enumerate(file.parity.items()):
            cells = (f"{found.largest:.2g}", f"{found.share:.2%}", f"{found.agreement:.1%}")
            table.add_row(*(head if i == 0 else ("", "", "")), program, *cells)
    return table

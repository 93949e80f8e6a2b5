"""What the command line shows: progress bars and tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from qprune.cost import Cost
from qprune.geometry import Geometry
from qprune.result import si

if TYPE_CHECKING:
    from qprune.exporting import Exported

PHASES = {"float": "train float", "search": "search", "finetune": "fine-tune", "uniform": "train uniform"}
_MOST = 10_000  # characters of a line, whatever the console's width


class Value(ProgressColumn):
    """A number of the phase by its name, nothing where it is not known."""

    def __init__(self, name: str) -> None:
        super().__init__(Column(no_wrap=True))
        self.name = name

    def is_known(self, tasks: Iterable[Task]) -> bool:
        return any(self.name in task.fields["values"] for task in tasks)

    def render(self, task: Task) -> Text:
        value = task.fields["values"].get(self.name)
        return Text("" if value is None else f"{self.name} {value:.2f}" if abs(value) < 1000 else f"{self.name} {value:.1e}")


class Rate(ProgressColumn):
    """Images per second, over the steps of the last seconds or, of a phase that is over, over all."""

    def __init__(self, batch_size: int) -> None:
        super().__init__(Column(no_wrap=True, justify="right"))
        self.batch_size = batch_size

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed * self.batch_size:,.0f} img/s" if speed and self.batch_size else "")


class Fitting(Progress):
    """Lines that are no wider than the console: columns are left out, the first of `spare` first. What was left out does not come back
    while the console is as wide, so that lines do not flicker."""

    def __init__(self, columns: Sequence[ProgressColumn], spare: Sequence[ProgressColumn], console: Console) -> None:
        self.all, self.spare, self.place, self.left_out, self.width = tuple(columns), tuple(spare), console, 0, console.width
        super().__init__(*columns, console=console, refresh_per_second=4)

    def make_tasks_table(self, tasks: Iterable[Task]) -> Table:
        tasks = list(tasks)
        if self.place.width != self.width:
            self.left_out, self.width = 0, self.place.width
        known = [column for column in self.all if not isinstance(column, Value) or column.is_known(tasks)]
        while True:
            self.columns = tuple(column for column in known if column not in self.spare[: self.left_out])
            table = super().make_tasks_table(tasks)
            if not tasks or self.left_out == len(self.spare) or self._width_of(table) <= self.width:
                return table
            self.left_out += 1

    def _width_of(self, table: Table) -> int:
        return Measurement.get(self.place, self.place.options.update(max_width=_MOST), table).maximum


class Bars:
    """One progress bar per phase: steps done, loss, expected cost over budget, accuracy on validation data, mean entropy of the gates,
    images per second, time left. Where the console is too narrow for all, some are left out.

    batch_size  images of a step; 0: their number is not shown
    """

    def __init__(self, console: Console, seeds: int, batch_size: int = 0) -> None:
        self.seeds = seeds
        label = TextColumn("{task.description}", table_column=Column(no_wrap=True))
        bar, count, rate = BarColumn(bar_width=10), MofNCompleteColumn(table_column=Column(no_wrap=True)), Rate(batch_size)
        loss, cost, accuracy, entropy = (Value(name) for name in ("loss", "cost", "acc", "entropy"))
        time = TimeRemainingColumn(compact=True, elapsed_when_finished=True, table_column=Column(no_wrap=True))
        columns = (label, bar, count, loss, cost, accuracy, entropy, rate, time)
        self.progress = Fitting(columns, (entropy, bar, rate, cost, accuracy, loss), console)
        self.task: TaskID | None = None
        self.values: dict[str, float] = {}

    def __enter__(self) -> Bars:
        self.progress.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.progress.stop()

    def phase(self, name: str, seed: int, steps: int, done: int = 0) -> None:
        label = PHASES.get(name, name) + (f" (seed {seed})" if self.seeds > 1 else "")
        self.values = {}
        self.task = self.progress.add_task(f"{label:<13}", total=steps, completed=done, values=self.values)

    def step(self, values: Mapping[str, float]) -> None:
        assert self.task is not None
        self.values |= values
        self.progress.advance(self.task)

    def epoch(self, values: Mapping[str, Any]) -> None:
        shown = {"acc": "val_accuracy", "entropy": "entropy"}
        self.values |= {label: values[name] for label, name in shown.items() if values.get(name) is not None}


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

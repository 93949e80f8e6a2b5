"""`qprune bench`: measure the cases that were asked for, print a table, save the numbers, compare with earlier ones."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from . import against, machine, rates, rows, selection, table, training
from .cases import DIRECTIONS
from .machine import ROOT
from .measure import WrongResultError
from .rows import Row
from .selection import Request


@dataclass(frozen=True)
class Output:
    """Where results go. seconds: begin no case after so many of them (0: no limit), so that what was measured is kept."""

    out: Path | None = None
    against: Path | None = None
    markdown: bool = False
    quick: bool = False
    seconds: float = 0.0


def measure(request: Request, quick: bool) -> Iterator[Row]:
    """A row after the other, each checked for correctness before it is timed. A case that is wrong or cannot run is a row that says so.
    request: as `checked` returns it."""
    many = 50 if request.device == "cuda" else 15
    baselines = request.baselines or ()
    for case, directions in selection.select(request):
        if isinstance(case, training.Case):
            yield from _unless_it_fails(case.name, rows.of_training(case, baselines, 3 if quick else 9, request.device))
            continue
        for direction in directions:
            row = rows.of_case(case, direction, baselines, 3 if quick else many, request.device)
            yield from _unless_it_fails(f"{case.name}, {DIRECTIONS[direction]}", row)


def _unless_it_fails(name: str, found: Iterator[Row]) -> Iterator[Row]:
    try:
        yield from found
    except WrongResultError as error:
        yield Row(name, 0.0, "", skipped=str(error), failed=True)
    except Exception as error:  # one kernel that does not compile or fit must not cost the results of the others
        first_line = next(iter(str(error).splitlines()), "")[:160]
        yield Row(name, 0.0, "", skipped=f"{type(error).__name__}: {first_line}", failed=True)


def run(request: Request, output: Output, console: Console, command: str) -> int:
    """0, or 1 if a case was wrong or did not run: it has no time then."""
    whole = request.default_set
    request = request.checked()
    old = against.load(output.against) if output.against else None
    list(selection.select(request))
    described = machine.describe(request.device)
    if described["load"] > 0.5 and request.device == "cpu":
        sys.stderr.write(f"this machine is busy (load {described['load']}): parallel code waits for its slowest thread, times will vary\n")
    described["rates"] = {"name": described["device"], **rates.measure(request.device, output.quick)}
    found: list[Row] = []

    def save(complete: bool) -> None:
        described["load after"] = round(os.getloadavg()[0], 2)
        if output.out is not None:
            dicts = [row.as_dict(described["rates"]) for row in found]
            table.write_json(output.out, dicts, described, command, complete=complete)

    complete, start = False, time.perf_counter()
    with _progress() as update:
        for row in _rows(request, output.quick, whole):
            found.append(row)
            update(f"{len(found)} rows, last: {row.case}")
            save(complete=False)
            if output.seconds and time.perf_counter() - start > output.seconds:
                break
        else:
            complete = True
    save(complete)
    if output.markdown:
        print(table.markdown(found, described))
    else:
        for part in table.rich_tables(found, described):
            console.print(part)
    if old is not None:
        console.print(against.rich_table(old, [row.as_dict() for row in found], described))
    if not complete:
        sys.stderr.write(f"stopped after {output.seconds:g} s; the cases after {found[-1].case!r} were not measured\n")
    for row in found:
        if row.failed:
            sys.stderr.write(f"not timed: {row.case}: {row.skipped}\n")
    return int(any(row.failed for row in found))


def _rows(request: Request, quick: bool, whole: bool) -> Iterator[Row]:
    yield from measure(request, quick)
    if whole and request.device == "cpu":
        yield from rows.of_first_use()


class _progress:
    """A line on standard error that says what was measured last."""

    def __enter__(self) -> Callable[[str], None]:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        self.progress = Progress(*columns, console=Console(stderr=True), transient=True)
        task = self.progress.add_task("measuring")
        self.progress.start()
        return lambda text: self.progress.update(task, description=text)

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()


def print_compiled(quick: bool) -> int:
    """The table of ahead-of-time checks, from a process of its own: Triton must not be interpreting. Its exit code."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH", "")])])
    command = [sys.executable, "-m", "qprune.kernels.aot", *(["--quick"] if quick else [])]
    return subprocess.run(command, env=environment, check=False).returncode


def set_threads(threads: int) -> None:
    """0: two, or as many as there are cores."""
    torch.set_num_threads(threads if threads > 0 else min(2, os.cpu_count() or 1))

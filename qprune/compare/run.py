"""A whole comparison in its folder: begin it or take it up, let workers fill its cells, and write what came out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qprune.compare.cell import Comparison
from qprune.compare.options import CompareOptions
from qprune.compare.page import compare_page
from qprune.compare.stored import RESULT, read_cell, read_float
from qprune.compare.summary import float_row, rows_of, sentence
from qprune.compare.tables import cells_csv, markdown, table_csv
from qprune.environment import environment
from qprune.errors import StudyError
from qprune.files import write_atomically
from qprune.plainyaml import dumped
from qprune.study.queue import Progress, Queue, check_stored
from qprune.study.storage import check_sqlite, require_optuna
from qprune.study.worker import Run, run_workers

FORMAT = 1
GROWING = ("seeds", "methods", "budgets", "settings")


@dataclass(frozen=True)
class CompareJob:
    """All that a worker process needs to know."""

    options: CompareOptions
    folder: Path

    def queue(self) -> Queue:
        """The queue of the cells, made if it is not there."""
        seeds = range(self.options.seed, self.options.seed + self.options.seeds)
        points = [(index, seed) for seed in seeds for index in self.options.cells()]
        storage = f"sqlite:///{self.folder / 'queue.db'}"
        return Queue(storage, "compare", points, self.options.as_dict(), growing=GROWING)

    def start(self) -> tuple[Queue, Run]:
        comparison = Comparison(self.options, self.folder)
        comparison.warm_up()
        return self.queue(), comparison.run


def run(options: CompareOptions, folder: Path, workers: int = 1, watch: Callable[[Progress], None] | None = None) -> dict[str, Any]:
    """Begin a comparison, or go on with it, until every cell is filled; returns result.json's content.

    folder   options.yaml, queue.db, float networks, cells/, cells.csv, table.csv, table.md, result.json, report.html
    workers  processes, one thread each; 0 trains nothing and reports on what is done
    watch    is told how far it is, twice a second

    A cell whose process was killed is done again from its start; one that failed is tried again by the next call. Every seed goes through
    all methods before the next begins. A later call may ask for more seeds, methods and budgets. Raises StudyError for other options than
    the comparison was begun with, for files that cannot be used, and if all workers end early; and, before anything is trained, whatever
    a method has against a budget or the network.
    """
    require_optuna()
    if workers < 0:
        raise StudyError(f"workers must not be negative, got {workers}")
    folder = Path(folder).resolve()
    open_folder(folder, options)
    comparison = Comparison(options, folder)
    job = CompareJob(options, folder)
    if workers:
        comparison.check()
    write_atomically(folder / "options.yaml", dumped(options.as_dict()))
    queue = job.queue()
    try:
        if workers:
            queue.fill(retry_failed=True)
            run_workers(job, queue, workers, watch or (lambda progress: None))
        _restore(comparison, queue)
        return write_results(comparison, queue)
    finally:
        queue.close()


def _restore(comparison: Comparison, queue: Queue) -> None:
    """Write the result files that are lost of cells that the queue has as done."""
    for trial in queue.finished():
        index, seed = trial.point
        if index in comparison.cells:
            path = comparison.place(*comparison.cells[index], seed) / RESULT
            if not path.exists():
                write_atomically(path, json.dumps(trial.result, indent=1).encode())


def open_folder(folder: Path, options: CompareOptions) -> None:
    """Raise StudyError unless the folder holds nothing of the kind, or this comparison, or one with less to do."""
    path = folder / "options.yaml"
    if path.exists():
        check_stored(path, options.as_dict(), GROWING)
    elif (folder / "result.json").exists():
        raise StudyError(f"{folder} holds something else than a comparison; choose another folder")
    check_sqlite(folder / "queue.db")


def write_results(comparison: Comparison, queue: Queue) -> dict[str, Any]:
    """Write the tables, result.json and report.html from the cells that are there."""
    options, folder, order = comparison.options, comparison.folder, comparison.cells
    seeds = range(options.seed, options.seed + options.seeds)
    # by budget, as the table shows them
    shown = [(budget, method) for budget in options.budgets for method in options.methods]
    places = [(budget, method, seed) for budget, method in shown for seed in seeds]
    cells = [cell for cell in (read_cell(comparison.place(*place)) for place in places) if cell is not None]
    floats = [facts for facts in (read_float(folder, seed) for seed in seeds) if facts is not None]
    limits = {budget: dict(target.limits) for budget, target in comparison.targets.items()}
    rows, first = rows_of(cells, floats, shown, limits), float_row(floats)
    lines = ([first] if first else []) + rows
    result = {
        "format": FORMAT,
        "kind": "compare",
        "options": options.as_dict(),
        "environment": environment(),
        "limits": limits,
        "cells": {
            "done": len(cells),
            "total": len(places),
            "seconds_total": sum(usage["seconds"] for cell in (*cells, *floats) for usage in cell["usage"].values()),
        },
        "float": first,
        "rows": rows,
        "sentences": [sentence(rows, budget) for budget in options.budgets],
        "errors": [
            {"budget": order[index][0], "method": order[index][1], "seed": seed, "error": text}
            for (index, seed), text in sorted(queue.errors().items())
            if index in order
        ],
    }
    written = {
        "cells.csv": cells_csv(cells),
        "table.csv": table_csv(lines),
        "table.md": markdown(lines),
        "result.json": json.dumps(result, indent=1, allow_nan=False),
        "report.html": compare_page(result),
    }
    for name, text in written.items():
        write_atomically(folder / name, text.encode("utf-8", "replace"))
    return result

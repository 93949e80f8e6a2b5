"""A whole study in its folder: begin or take up the queue, let workers empty it, and write what came out."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qprune.environment import environment
from qprune.errors import StudyError
from qprune.files import write_atomically
from qprune.plainjson import shown
from qprune.plainyaml import dumped
from qprune.study.analysis import METRICS, analyse
from qprune.study.grid import Point
from qprune.study.options import StudyOptions
from qprune.study.page import study_page
from qprune.study.queue import Finished, Progress, Queue, check_stored
from qprune.study.storage import check_sqlite, require_optuna
from qprune.study.trial import Bench
from qprune.study.worker import Job, run_workers

FORMAT = 1
COLUMNS = ("label", "cost", *METRICS, "val_loss", "train_loss", "float_network", "host", "pid")
TEXTS, ACCURACIES = ("label", "float_network", "host"), ("val_accuracy", "test_accuracy")
MOST = 1e30
"""Of any number in a result: sums and means of such are still finite."""


def run(
    options: StudyOptions,
    folder: Path,
    storage: str | None = None,
    name: str | None = None,
    workers: int = 1,
    watch: Callable[[Progress], None] | None = None,
) -> dict[str, Any]:
    """Begin a study, or go on with it, until every point of its grid is done; returns result.json's content.

    folder   of the study: options.yaml, study.db, float networks, trials.csv, result.json, report.html. Processes on other machines need
             the same folder (a shared file system), or they train the float networks for themselves
    storage  URL of a database that several machines share, "postgresql://…"; default: study.db in the folder
    name     of the study in that database; default: the folder's name
    workers  processes on this machine, one thread each; 0 trains nothing and reports on what is done
    watch    is told how far the study is, twice a second

    A trial that was killed is run again; one that failed is tried again by the next call. A later call may ask for more seeds. Raises
    StudyError for options that differ from those that the study was begun with, for a database that cannot be used, and if all workers end
    early.
    """
    require_optuna()
    if workers < 0:
        raise StudyError(f"workers must not be negative, got {workers}")
    folder = Path(folder).resolve()
    open_folder(folder, options, storage)
    bench = Bench(options, folder)
    job = Job(options, folder, storage or f"sqlite:///{folder / 'study.db'}", name or folder.name)
    queue = job.open(bench)
    try:
        if workers:
            queue.fill(retry_failed=True)
            run_workers(job, queue, workers, watch or (lambda progress: None))
        return write_results(options, folder, bench, queue)
    finally:
        queue.close()


def open_folder(folder: Path, options: StudyOptions, storage: str | None) -> None:
    """Make the folder, or check that it holds this study. Raises StudyError, and CheckpointError where nothing can be written."""
    path = folder / "options.yaml"
    if path.exists():
        if check_stored(path, options.as_dict()) != options.as_dict():
            write_atomically(path, dumped(options.as_dict()))
    elif (folder / "result.json").exists():
        raise StudyError(f"{folder} holds something else than a study; choose another folder")
    else:
        write_atomically(path, dumped(options.as_dict()))
    if storage is None:
        check_sqlite(folder / "study.db")


def write_results(options: StudyOptions, folder: Path, bench: Bench, queue: Queue) -> dict[str, Any]:
    """Write trials.csv, result.json and report.html from the trials that are complete."""
    finished, progress, errors = queue.finished(), queue.progress(), queue.errors()
    for trial in finished:
        _check(trial, folder)
    seconds = [trial.seconds for trial in finished]
    result = {
        "format": FORMAT,
        "kind": "study",
        "options": options.as_dict(),
        "environment": environment(),
        "measure": bench.kind.measure,
        "trials": {
            "done": progress.done,
            "total": progress.total,
            "seconds_mean": sum(seconds) / len(seconds) if seconds else None,
            "seconds_total": sum(seconds),
        },
        "errors": [{"label": bench.points[p].label, "seed": seed, "error": text} for (p, seed), text in sorted(errors.items())],
        **analyse(bench.points, finished, options.threshold, bench.kind.measure),
    }
    write_atomically(folder / "trials.csv", _csv(bench.points, finished).encode("utf-8", "replace"))
    write_atomically(folder / "result.json", json.dumps(result, indent=1, allow_nan=False).encode())
    write_atomically(folder / "report.html", study_page(result).encode("utf-8", "replace"))
    return result


def _check(trial: Finished, folder: Path) -> None:
    """Raise StudyError for a result that lacks what is told of a trial."""
    for name in COLUMNS:
        value = trial.result.get(name)
        if not (isinstance(value, str) if name in TEXTS else _is_number(value, 1.0 if name in ACCURACIES else MOST)):
            where = f"configuration {trial.point[0]}, seed {trial.point[1]}"
            raise StudyError(
                f"the result of {where} in the database of {folder} is damaged: {name} is {shown(value)}; restore the database"
            )


def _is_number(value: Any, most: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not abs(value) > most


def _csv(points: Sequence[Point], finished: Sequence[Finished]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("policy", "seed", "homogeneous", *COLUMNS, "seconds"))
    for trial in finished:
        result: Mapping[str, Any] = trial.result
        index, seed = trial.point
        writer.writerow((index, seed, points[index].homogeneous, *(result[column] for column in COLUMNS), f"{trial.seconds:.3f}"))
    return file.getvalue()

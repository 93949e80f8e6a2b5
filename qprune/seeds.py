"""The seeds of a run, one after the other, in one folder: what is there already, what is left, and the result of all."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qprune.config import RUN
from qprune.errors import CheckpointError
from qprune.experiment import Experiment, Watcher
from qprune.files import write_atomically
from qprune.geometry import Geometry, trace_geometry
from qprune.options import RunOptions
from qprune.plainjson import parse
from qprune.ranks import ALONE, Ranks
from qprune.report import write_report
from qprune.result import check_complete, read_result
from qprune.resume.folder import RESULT, SEED
from qprune.resume.session import Session, Terms, session, tidy
from qprune.resume.signals import Stop
from qprune.summary import summarise
from qprune.tasks.sources import network_of, task_of
from qprune.tasks.task import Task

log = logging.getLogger("qprune")
FORMAT = 1


def run(
    options: RunOptions,
    folder: Path,
    watcher: Watcher,
    overwrite: bool = False,
    *,
    resume: bool = False,
    minutes: float = 10.0,
    keep: int = 3,
    stop: Stop | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Run every seed and write the folder: options.yaml, environment.json, metrics.jsonl, policy.json, model.safetensors, result.json,
    report.html.

    The first seed's files lie in the folder itself, those of further seeds in seed-N. Meanwhile, and after a run that was cut short, there
    are checkpoints of every seed, and seed.json with what finished seeds gave. Returns result.json's content.

    overwrite, resume, minutes, keep, stop, ranks: see `Terms`. Raises what `session` does, and whatever the phases raise.
    """
    terms = Terms(overwrite, resume, minutes, keep, stop, ranks)
    with session(folder, options, RUN, options, "search", finished, terms) as work:
        if work.done is not None:
            return work.done
        task = task_of(options)
        geometry = Geometry(trace_geometry(network_of(options, task), task.example()))
        work.begin()
        return _run(work, options, task, geometry, watcher)


def finished(folder: Path) -> dict[str, Any] | None:
    """The result of a run that is over; None if it is not. Writes the report if that is missing. Raises CheckpointError for a damaged
    result."""
    if not (folder / RESULT).exists():
        return None
    result = read_result(folder)
    check_complete(result, folder / RESULT)
    if not (folder / "report.html").exists():
        write_report(folder)
    return dict(result)


def _run(work: Session, options: RunOptions, task: Task, geometry: Geometry, watcher: Watcher) -> dict[str, Any]:
    folder, ranks = work.folder, work.ranks
    runs: list[dict[str, Any]] = []
    limits: dict[str, float] = {}
    for index in range(options.seeds):
        seed = options.seed + index
        place = folder if index == 0 else folder / f"seed-{seed}"
        found = ranks.from_main(_entry, place)
        if found is None:
            states = work.checkpoints(place)
            experiment = Experiment(options, task, seed, place, watcher, checkpoints=states, ranks=ranks)
            found = {"run": experiment.run(), "limits": experiment.limits}
            content = json.dumps(found).encode()
            ranks.from_main(write_atomically, place / SEED, content)
            states.clear()
        runs.append(found["run"])
        limits = found["limits"]
    result = {
        "format": FORMAT,
        "options": options.as_dict(),
        "environment": work.environment(),
        "budget": {"text": options.budget, "limits": limits},
        "layers": [
            {"name": g.name, "kind": g.kind, "filters": g.filters, "macs": g.macs, "weights": g.weights} for g in geometry.layers.values()
        ],
        "runs": runs,
        "summary": summarise(runs, _measure(limits)),
    }
    ranks.from_main(_conclude, result, folder)
    return result


def _measure(limits: Mapping[str, float]) -> str:
    """What the verdict is about."""
    return "bops" if "bops" in limits else next(iter(limits), "")


def _conclude(result: dict[str, Any], folder: Path) -> None:
    write_atomically(folder / RESULT, json.dumps(result, indent=1).encode())
    write_report(folder)
    tidy(folder)


def _entry(place: Path) -> dict[str, Any] | None:
    """What a seed gave that is over; None if it is not, or if its file is damaged."""
    try:
        place.mkdir(parents=True, exist_ok=True)
        found: dict[str, Any] = parse((place / SEED).read_text())
        summarise([found["run"]], _measure(found["limits"]))
        return found
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"cannot use {place}: {error.strerror or error}") from None
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError):  # no JSON, or none that can be summarised
        log.warning("qprune: %s is damaged; this seed is run again", place / SEED)
        return None

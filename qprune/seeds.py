"""The seeds of a run, one after the other, in one folder: what is there already, what is left, and the result of all."""

from __future__ import annotations

import json
import logging
import platform
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from qprune.errors import CheckpointError
from qprune.experiment import Experiment, Watcher
from qprune.files import write_atomically
from qprune.geometry import Geometry, trace_geometry
from qprune.options import OptionError, RunOptions
from qprune.plainjson import parse
from qprune.precision import check, described, device_of
from qprune.ranks import ALONE, Ranks
from qprune.report import write_report
from qprune.result import check_complete, read_result
from qprune.resume.checkpoints import Checkpoints
from qprune.resume.failures import REPLAY
from qprune.resume.folder import (
    ENVIRONMENT,
    OPTIONS,
    RESULT,
    SEED,
    STATES,
    begin,
    check_same,
    held,
    record_options,
    stored_options,
    take_up,
)
from qprune.resume.phase import METRICS
from qprune.resume.randomness import be_deterministic
from qprune.resume.signals import Stop, Stopped
from qprune.summary import summarise
from qprune.tasks.sources import network_of, task_of
from qprune.tasks.task import Task

log = logging.getLogger("qprune")
FORMAT = 1
PROBE = ".probe"
"""Written first; under the name of a file of the run it would pass for a damaged one, if the process ended here."""
OURS = (
    OPTIONS,
    METRICS,
    RESULT,
    SEED,
    ENVIRONMENT,
    REPLAY,
    "policy.json",
    "model.safetensors",
    "model.onnx",
    "checkpoint.safetensors",
    "report.html",
)


def open_folder(folder: Path, overwrite: bool) -> None:
    """Make the run folder, or empty it of an earlier run. Raises CheckpointError if it cannot be written, or holds a run and must not
    be."""
    if not overwrite and any((folder / name).exists() for name in OURS[:3]):
        raise CheckpointError(f"{folder} already holds a run; go on with it (--resume), choose another folder, or pass --overwrite")
    write_atomically(folder / PROBE, b"")
    (folder / PROBE).unlink()
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    for place in (folder, *folder.glob("seed-*")):
        shutil.rmtree(place / STATES, ignore_errors=True)
        for name in OURS:
            (place / name).unlink(missing_ok=True)


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

    resume   go on with the run that the folder holds: with the same options it ends with the numbers that it would have had. The options
             must be those it began with (see qprune.resume.folder). If nothing was begun there, begin
    minutes  between two checkpoints within an epoch, 0 for none; there is one at every epoch's end in any case
    keep     checkpoints that are kept
    stop     who may ask to stop
    ranks    that compute together: all call this, rank 0 has the folder

    Raises CheckpointError for a folder that cannot be written, is damaged or in use, Stopped, and whatever the phases raise.
    """
    if minutes < 0 or keep < 1:
        raise OptionError(f"expected checkpoint minutes from 0 and at least 1 checkpoint to keep, got {minutes} and {keep}")
    with ExitStack() as holding:
        ranks.from_main(holding.enter_context, held(folder))
        try:
            began, done = ranks.from_main(lambda: _begun(options, folder, ranks) if resume else (False, None))
            if done is not None:
                return done
            check(options, ranks)
            if options.deterministic:
                be_deterministic()
            torch.set_num_threads(ranks.from_main(torch.get_num_threads))
            task = task_of(options)
            geometry = Geometry(trace_geometry(network_of(options, task), task.example()))
            if not began:
                ranks.from_main(_begin, options, folder, overwrite, ranks)
            return _run(
                options, task, geometry, folder, watcher, lambda place: Checkpoints(place / STATES, minutes, keep, stop, ranks), ranks
            )  # fmt: skip
        except Stopped as stopped:
            raise Stopped(stopped.number, f"{stopped}; go on with: qprune search --resume --out {folder}") from None


def _begun(options: RunOptions, folder: Path, ranks: Ranks) -> tuple[bool, dict[str, Any] | None]:
    """(whether a run was begun in the folder, its result if it is over). It goes on with as many threads as it began with."""
    began = stored_options(folder)
    if began is None:
        return False, None
    check_same(began, folder, options.as_dict())
    _sweep(folder)
    done = finished(folder)
    if done is None:
        take_up(folder, environment(options.device, ranks))
        if options != began:
            record_options(folder, options)
    else:
        _tidy(folder)
    return True, done


def _begin(options: RunOptions, folder: Path, overwrite: bool, ranks: Ranks) -> None:
    open_folder(folder, overwrite)
    begin(folder, options, environment(options.device, ranks))


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


def _run(
    options: RunOptions, task: Task, geometry: Geometry, folder: Path, watcher: Watcher, checkpoints: Callable[[Path], Checkpoints],
    ranks: Ranks,
) -> dict[str, Any]:  # fmt: skip
    runs: list[dict[str, Any]] = []
    limits: dict[str, float] = {}
    for index in range(options.seeds):
        seed = options.seed + index
        place = folder if index == 0 else folder / f"seed-{seed}"
        found = ranks.from_main(_entry, place)
        if found is None:
            states = checkpoints(place)
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
        "environment": environment(options.device, ranks),
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
    _tidy(folder)


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


def _sweep(folder: Path) -> None:
    """Remove what writes left that were cut short."""
    for place in (folder, *folder.glob("seed-*")):
        for path in (path for name in OURS for path in place.glob(f".{name}.*")):
            path.unlink(missing_ok=True)


def _tidy(folder: Path) -> None:
    """Remove what only an unfinished run needs."""
    for place in (folder, *folder.glob("seed-*")):
        shutil.rmtree(place / STATES, ignore_errors=True)
        (place / SEED).unlink(missing_ok=True)


def environment(device: str = "cpu", ranks: Ranks = ALONE) -> dict[str, str]:
    """Versions and machine, as the report shows them. device: a word of `qprune.precision.device_of`."""
    from qprune import __version__

    found = device_of(device)
    return {
        "qprune": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": version("numpy"),
        "scipy": version("scipy"),
        "device": described(found),
        "computed on": str(found),
        "threads": str(torch.get_num_threads()),
        "processes": str(ranks.count),
    }

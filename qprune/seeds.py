"""Several seeds of a run, compared with uniform networks of equal or higher cost: means, confidence intervals, and a plain verdict."""

from __future__ import annotations

import json
import logging
import math
import platform
import shutil
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from scipy import stats

from qprune.errors import CheckpointError
from qprune.experiment import Experiment, Watcher
from qprune.files import write_atomically
from qprune.geometry import Geometry, trace_geometry
from qprune.options import OptionError, RunOptions
from qprune.plainjson import parse
from qprune.precision import check, described, device_of
from qprune.report import write_report
from qprune.result import read_result
from qprune.resume.checkpoints import Checkpoints
from qprune.resume.failures import REPLAY
from qprune.resume.folder import ENVIRONMENT, OPTIONS, RESULT, SEED, STATES, begin, check_same, held, stored_options, take_up
from qprune.resume.phase import METRICS
from qprune.resume.randomness import be_deterministic
from qprune.resume.signals import Stop, Stopped
from qprune.tasks.sources import network_of, task_of
from qprune.tasks.task import Task

log = logging.getLogger("qprune")
FORMAT = 1
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
KINDS = ("float", "searched", "uniform")
AVERAGED = ("bops", "macs", "size_bits", "index_bits", "codebook_bits", "w_bits", "a_bits")


def student_interval(values: Sequence[float], level: float = 0.95) -> float | None:
    """Half the width of the Student-t confidence interval of the mean; None for fewer than two values."""
    n = len(values)
    if n < 2:
        return None
    mean = sum(values) / n
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    return float(stats.t.ppf((1 + level) / 2, n - 1)) * deviation / math.sqrt(n)


def summarise(runs: Sequence[dict[str, Any]], measure: str = "bops") -> dict[str, Any]:
    """Means and 95 % intervals over seeds of the three networks, the search's time in float epochs, and the verdict in one sentence.

    measure  what the budget limits: "bops", "macs" or "size_bits"
    """
    summary: dict[str, Any] = {}
    for kind in KINDS:
        networks = [run["networks"][kind] for run in runs]
        accuracies = [network["accuracy"] for network in networks]
        summary[kind] = {
            "label": networks[0]["label"],
            "accuracy_mean": sum(accuracies) / len(accuracies),
            "accuracy_ci95": student_interval(accuracies),
            **{key: sum(network[key] for network in networks) / len(networks) for key in AVERAGED},
        }
    ratios = [run["seconds"]["search"] / run["seconds"]["float_epoch"] for run in runs if run["seconds"]["float_epoch"]]
    summary["search_in_float_epochs"] = sorted(ratios)[len(ratios) // 2] if ratios else None
    differences = [run["networks"]["searched"]["accuracy"] - run["networks"]["uniform"]["accuracy"] for run in runs]
    summary["difference_mean"] = sum(differences) / len(differences)
    summary["difference_ci95"] = student_interval(differences)
    summary["verdict"] = verdict(summary, len(runs), measure)
    return summary


def verdict(summary: dict[str, Any], seeds: int, measure: str = "bops") -> str:
    """What the comparison shows, in one plain sentence."""
    mean, interval = summary["difference_mean"], summary["difference_ci95"]
    cheaper = 1 - summary["searched"][measure] / summary["uniform"][measure]
    what = {"bops": "bit operations", "macs": "multiplications", "size_bits": "bits of weights"}[measure]
    cost = f"at the same {what}" if abs(cheaper) <= 5e-4 else f"at {abs(cheaper):.1%} {'fewer' if cheaper > 0 else 'more'} {what}"
    over = "on one seed" if seeds == 1 else f"on average over {seeds} seeds"
    name = summary["uniform"]["label"]
    if mean < 0:
        text = f"The searched network is worse than {name} by {-100 * mean:.2f} points of test accuracy {over}, {cost}"
    elif mean == 0:
        text = f"The searched network equals {name} in test accuracy {over}, {cost}"
    else:
        text = f"The searched network is better than {name} by {100 * mean:.2f} points of test accuracy {over}, {cost}"
    if interval is None:
        return text + "; one seed says nothing about significance."
    if abs(mean) <= interval:
        return text + f"; with a 95 % interval of ±{100 * interval:.2f} points, the difference is not significant."
    return text + f" (95 % interval ±{100 * interval:.2f} points)."


def open_folder(folder: Path, overwrite: bool) -> None:
    """Make the run folder, or empty it of an earlier run. Raises CheckpointError if it cannot be written, or holds a run and must not
    be."""
    if not overwrite and any((folder / name).exists() for name in OURS[:3]):
        raise CheckpointError(f"{folder} already holds a run; go on with it (--resume), choose another folder, or pass --overwrite")
    write_atomically(folder / OPTIONS, b"")
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

    Raises CheckpointError for a folder that cannot be written, is damaged or in use, Stopped, and whatever the phases raise.
    """
    if minutes < 0 or keep < 1:
        raise OptionError(f"expected checkpoint minutes from 0 and at least 1 checkpoint to keep, got {minutes} and {keep}")
    with held(folder):
        try:
            began = stored_options(folder) if resume else None
            if began is not None:
                check_same(began, folder, options.as_dict())
                _sweep(folder)
                done = finished(folder)
                if done is not None:
                    _tidy(folder)
                    return done
                take_up(folder, environment(options.device))
            check(options)
            surroundings = environment(options.device)
            if options.deterministic:
                be_deterministic()
            task = task_of(options)
            geometry = Geometry(trace_geometry(network_of(options, task), task.example()))
            if began is None:
                open_folder(folder, overwrite)
                begin(folder, options, surroundings)
            return _run(options, task, geometry, folder, watcher, lambda place: Checkpoints(place / STATES, minutes, keep, stop))
        except Stopped as stopped:
            raise Stopped(stopped.number, f"{stopped}; go on with: qprune search --resume --out {folder}") from None


def finished(folder: Path) -> dict[str, Any] | None:
    """The result of a run that is over; None if it is not. Writes the report if that is missing. Raises CheckpointError for a damaged
    result."""
    if not (folder / RESULT).exists():
        return None
    result = read_result(folder)
    if not (folder / "report.html").exists():
        write_report(folder)
    return dict(result)


def _run(
    options: RunOptions, task: Task, geometry: Geometry, folder: Path, watcher: Watcher, checkpoints: Callable[[Path], Checkpoints]
) -> dict[str, Any]:
    runs: list[dict[str, Any]] = []
    limits: dict[str, float] = {}
    for index in range(options.seeds):
        seed = options.seed + index
        place = folder if index == 0 else folder / f"seed-{seed}"
        found = _entry(place)
        if found is None:
            states = checkpoints(place)
            experiment = Experiment(options, task, seed, place, watcher, checkpoints=states)
            found = {"run": experiment.run(), "limits": experiment.limits}
            write_atomically(place / SEED, json.dumps(found).encode())
            states.clear()
        runs.append(found["run"])
        limits = found["limits"]
    result = {
        "format": FORMAT,
        "options": options.as_dict(),
        "environment": environment(options.device),
        "budget": {"text": options.budget, "limits": limits},
        "layers": [
            {"name": g.name, "kind": g.kind, "filters": g.filters, "macs": g.macs, "weights": g.weights} for g in geometry.layers.values()
        ],
        "runs": runs,
        "summary": summarise(runs, "bops" if "bops" in limits else next(iter(limits))),
    }
    write_atomically(folder / RESULT, json.dumps(result, indent=1).encode())
    write_report(folder)
    _tidy(folder)
    return result


def _entry(place: Path) -> dict[str, Any] | None:
    """What a seed gave that is over; None if it is not, or if its file is damaged."""
    try:
        place.mkdir(parents=True, exist_ok=True)
        found: dict[str, Any] = parse((place / SEED).read_text())
        return found if {"run", "limits"} <= set(found) else None
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"cannot use {place}: {error.strerror or error}") from None
    except (ValueError, TypeError):
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


def environment(device: str = "cpu") -> dict[str, str]:
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
    }

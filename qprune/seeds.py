"""Several seeds of a run, compared with uniform networks of equal or higher cost: means, confidence intervals, and a plain verdict."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from scipy import stats

from qprune.errors import CheckpointError
from qprune.experiment import Experiment, Watcher
from qprune.files import write_atomically
from qprune.geometry import Geometry, trace_geometry
from qprune.options import RunOptions
from qprune.report import write_report
from qprune.tasks import data, models

FORMAT = 1
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
    ratios = [run["seconds"]["search"] / run["seconds"]["float_epoch"] for run in runs]
    summary["search_in_float_epochs"] = sorted(ratios)[len(ratios) // 2]
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
    ours = ("options.yaml", "metrics.jsonl", "result.json", "policy.json", "model.safetensors", "checkpoint.safetensors", "report.html")
    if not overwrite and any((folder / name).exists() for name in ours[:3]):
        raise CheckpointError(f"{folder} already holds a run; choose another folder, or pass --overwrite")
    write_atomically(folder / "options.yaml", b"")
    for path in [folder / name for name in ours] + [path / name for path in folder.glob("seed-*") for name in ours]:
        path.unlink(missing_ok=True)


def run(options: RunOptions, folder: Path, watcher: Watcher, overwrite: bool = False) -> dict[str, Any]:
    """Run every seed and write the folder: options.yaml, metrics.jsonl, policy.json, model.safetensors, result.json, report.html.

    The first seed's files lie in the folder itself, those of further seeds in seed-N. Returns result.json's content. Raises
    CheckpointError for a folder that cannot be written, and whatever the phases raise.
    """
    open_folder(folder, overwrite)
    write_atomically(folder / "options.yaml", yaml.safe_dump(options.as_dict(), sort_keys=False).encode())
    task = data.load(options.data)
    net = models.for_task(options.model, task)
    geometry = Geometry(trace_geometry(net, task.train.x[:2]))
    runs: list[dict[str, Any]] = []
    limits: dict[str, float] = {}
    for index in range(options.seeds):
        seed = options.seed + index
        place = folder if index == 0 else folder / f"seed-{seed}"
        place.mkdir(exist_ok=True)
        experiment = Experiment(options, task, seed, place, watcher)
        runs.append(experiment.run())
        limits = experiment.limits
    result = {
        "format": FORMAT,
        "options": options.as_dict(),
        "environment": environment(),
        "budget": {"text": options.budget, "limits": limits},
        "layers": [
            {"name": g.name, "kind": g.kind, "filters": g.filters, "macs": g.macs, "weights": g.weights} for g in geometry.layers.values()
        ],
        "runs": runs,
        "summary": summarise(runs, "bops" if "bops" in limits else next(iter(limits))),
    }
    write_atomically(folder / "result.json", json.dumps(result, indent=1).encode())
    write_report(folder)
    return result


def environment() -> dict[str, str]:
    """Versions and machine, as the report shows them."""
    from qprune import __version__

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "qprune": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": version("numpy"),
        "scipy": version("scipy"),
        "device": device,
        "threads": str(torch.get_num_threads()),
    }

"""Whole runs of two processes over gloo: for every method the numbers and the policy of one process with the same batches, on a network
without batch statistics."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import be_one_of_two, two_ranks
from resume_cases import METHODS, options, small_task
from torch import Tensor, nn

from qprune import seeds
from qprune.ranks import ALONE, Ranks, current
from qprune.tasks import data, models
from qprune.tasks.task import Task
from qprune.watch import Several

SHORT = {"float_epochs": 1, "search_epochs": 1}
SEEDS = {"zur": 1}
"""Others than 0: sums come in another order, and where that moves one code over a rounding boundary, two trainings go apart."""
RESULTS = ("loss", "accuracy", "val_accuracy", "cost_ratio", "arch_loss", "likely_loss")


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.relu1 = nn.Conv2d(1, 8, 3, stride=2), nn.ReLU()
        self.conv2, self.relu2 = nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()
        self.conv3, self.relu3 = nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()
        self.fc = nn.Linear(72, 4)
        for layer in (self.conv1, self.conv2, self.conv3):
            nn.init.orthogonal_(layer.weight, gain=2.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.conv1(x))
        x = self.relu3(self.conv3(self.relu2(self.conv2(x))))
        return self.fc(x.flatten(1))


def even_task(*args: Any, **kwargs: Any) -> Task:
    """Twice the images: all batches, and those of halves and eighths of the training data, can be shared by two."""
    task = small_task()
    x, y = task.train[torch.arange(64)]  # type: ignore[index]
    return replace(task, train=data.Split(torch.cat([x, x.flip(-1)]), torch.cat([y, y ^ 1])))


def run(method: str, ranks: Ranks) -> dict[str, Any]:
    """What matters of a run, in rank 0; `mine` of every rank."""
    with tempfile.TemporaryDirectory() as folder:
        result = seeds.run(options(method, seed=SEEDS.get(method, 0), **SHORT), Path(folder) / "run", Several([]), ranks=ranks)
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines() if ranks.main else []
        files = sorted(path.name for path in Path(folder).rglob("*"))
    metrics = [{name: entry[name] for name in RESULTS if name in entry} for entry in map(json.loads, lines)]
    accuracies = [network["accuracy"] for network in result["runs"][0]["networks"].values()]
    return {
        "drawn": torch.initial_seed(),
        "metrics": metrics,
        "files": files,
        "accuracies": accuracies,
        "policy": result["runs"][0]["policy"],
    }


def work(rank: int) -> dict[str, Any]:
    prepare()
    return {method: run(method, current()) for method in METHODS}


def prepare() -> None:
    data.load, models.for_task, seeds.write_report = even_task, lambda *_: Plain(), lambda folder: None  # type: ignore[assignment]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return two_ranks(__file__, tmp_path_factory.mktemp("ranks") / "store")


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_are_as_one(method: str, together: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((data, "load"), (models, "for_task"), (seeds, "write_report")):
        monkeypatch.setattr(module, name, getattr(module, name))
    prepare()
    first, second, alone = together[0][method], together[1][method], run(method, ALONE)
    assert first["policy"] == second["policy"] and first["drawn"] != second["drawn"]
    if method == "zur-uniq":
        return  # its noise depends on the place in the batch
    assert first["policy"] == alone["policy"]
    assert first["accuracies"] == second["accuracies"] == pytest.approx(alone["accuracies"], abs=1e-12)
    assert second["files"] == [] and first["files"] == alone["files"]
    assert len(first["metrics"]) == len(alone["metrics"]) == 5
    for ours, theirs in zip(first["metrics"], alone["metrics"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)


if __name__ == "__main__":
    be_one_of_two(work)

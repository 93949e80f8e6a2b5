"""Runs of a second: a small residual network on small images of noise, and the comparison of two run folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qprune import seeds
from qprune.checkpoint import read
from qprune.options import RunOptions
from qprune.tasks import data, models
from qprune.tasks.task import Task

METHODS: dict[str, dict[str, Any]] = {
    "edmips": {"w_bits": (0, 2, 4), "granularity": "filter"},
    "darts": {"method_options": {"second_order": True}},
    "zur": {"pairs": ((2, 2), (4, 4)), "method_options": {"samples": 2}},
    "zur-epochs": {"method": "zur", "loop": "epochs", "pairs": ((2, 2), (4, 4)), "method_options": {"samples": 2}, "search_epochs": 1},
    "zur-uniq": {"method": "zur", "loop": "epochs", "quantizer": "uniq", "pairs": ((2, 2), (3, 3)), "search_epochs": 1},
    "slimmable": {"budget": "macs=50%", "method_options": {"samples": 2, "ratios": [0.5, 1.0], "shortcut": "temporary"}},
    "sbs": {"w_bits": (0, 2, 4), "a_bits": (2, 4), "method_options": {"mode": "two-stage", "switch": 4}},
    "annc": {"budget": "size=5%", "method_options": {"a_bits": 4, "temperature": 4.0}},
}

PAIRS = ((2, 2), (4, 4))
FORMS: dict[str, dict[str, Any]] = {
    "darts-pairs": {"method": "darts", "pairs": PAIRS},
    "edmips-pairs-zero": {"method": "edmips", "pairs": ((0, 4), (2, 4), (4, 4), (4, 2)), "granularity": "filter"},
    "edmips-bf16": {"method": "edmips", "amp": "bf16", "channels_last": False},
    "sbs-joint": {"method": "sbs", "w_bits": (0, 2, 4), "a_bits": (2, 4)},
    "sbs-groups": {
        "method": "sbs", "w_bits": (0, 2, 4), "a_bits": (2, 4),
        "method_options": {"group_size": 2, "per_group": True, "clips": "fitted", "lmbda": 0.1, "alternate": False},
    },
    "sbs-pruning": {"method": "sbs", "w_bits": (0, 4), "a_bits": (4,), "method_options": {"mode": "pruning"}},
    "annc-filter": {
        "method": "annc", "budget": "size=10%",
        "method_options": {"granularity": "filter", "interval": 3, "freeze_after": 2, "nesterov": True, "warmup": 0.2},
    },
    "slimmable-paths": {
        "method": "slimmable", "budget": "macs=50%",
        "method_options": {"samples": 2, "ratios": [0.5, 1.0], "distribution": "categorical", "estimator": "random-path"},
    },
    "zur-uniq-gumbel": {"method": "zur", "pairs": PAIRS, "quantizer": "uniq", "method_options": {"samples": 2, "estimator": "gumbel"}},
    "zur-original": {
        "method": "zur", "pairs": PAIRS,
        "method_options": {
            "samples": 2, "estimator": "score", "optimizer": "sgd", "cost": "sampled", "penalty": "square", "assignment": "index",
            "statistics": "running", "shared_weights": False, "freeze": [0.5, 2],
        },
    },
}  # fmt: skip
"""Methods in their other forms; METHODS has the common ones."""


class Killed(BaseException):
    """The process is gone: nothing may handle this."""


class Watcher:
    """Calls `act` at step `at` of this process; 0: never."""

    def __init__(self, at: int = 0, act: Callable[[], None] | None = None) -> None:
        self.at, self.act, self.steps = at, act, 0
        self.phases: list[tuple[str, int, int]] = []

    def phase(self, name: str, seed: int, steps: int, done: int = 0) -> None:
        self.phases.append((name, steps, done))

    def step(self, values: Any) -> None:
        self.steps += 1
        if self.steps == self.at:
            if self.act is None:
                raise Killed
            self.act()

    def epoch(self, values: Any) -> None:
        pass


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()
        self.shortcut = None

    def forward(self, x: Tensor) -> Tensor:
        return self.relu2(self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x))))) + x)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(1, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        self.block = Block()
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.relu(self.bn1(self.conv1(x))))
        return self.fc(self.dropout(x.mean((2, 3))))


class Tied(Small):
    """A search may prune filters of block.0 and of block.3.conv2: in pairs, since their outputs are added."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), Block())


def noisy(x: Tensor, generator: torch.Generator) -> Tensor:
    return x + 0.1 * torch.randn(x.shape, generator=generator)


def small_task(*args: Any, **kwargs: Any) -> Task:
    """Images whose class is the brightest quarter; 72 for training, augmented."""
    generator = torch.Generator().manual_seed(7)

    def part(count: int) -> data.Split:
        x, y = torch.randn(count, 1, 8, 8, generator=generator), torch.arange(count) % 4
        for i, (row, column) in enumerate((a, b) for a in (0, 4) for b in (0, 4)):
            x[y == i, :, row : row + 4, column : column + 4] += 1.0
        return data.Split(x, y)

    return Task("digits", 1, 8, 4, part(72), part(32), part(32), noisy)


def small_network(*args: Any, **kwargs: Any) -> nn.Module:
    return Small().to(memory_format=torch.channels_last)


def tied_network(*args: Any, **kwargs: Any) -> nn.Module:
    return Tied().to(memory_format=torch.channels_last)


def patch(monkeypatch: Any, network: Callable[..., nn.Module] = small_network) -> None:
    monkeypatch.setattr(data, "load", small_task)
    monkeypatch.setattr(models, "for_task", network)
    monkeypatch.setattr(seeds, "write_report", lambda folder: None)


def options(case: str = "edmips", **changes: Any) -> RunOptions:
    values = {"method": case, "float_epochs": 2, "search_epochs": 2, "finetune_epochs": 1, "batch_size": 16, "budget": "w3a3"}
    return RunOptions(**{**values, **{**METHODS, **FORMS}[case], **changes})


def outcome(folder: Path) -> dict[str, Any]:
    """All that a run's folder says, without what clocks say; models as bytes."""
    found: dict[str, Any] = {"result": _timeless(json.loads((folder / "result.json").read_text()))}
    for place in (folder, *sorted(folder.glob("seed-*"))):
        name = "first" if place == folder else place.name
        lines = (place / "metrics.jsonl").read_text().splitlines()
        header, tensors = read(place / "model.safetensors")
        found |= {
            f"{name} metrics": [_timeless(json.loads(line)) for line in lines],
            f"{name} policy": (place / "policy.json").read_text(),
            f"{name} header": header,
            f"{name} tensors": {key: (str(t.dtype), tuple(t.shape), t.numpy().tobytes()) for key, t in tensors.items()},
        }
    return found


def trained(folder: Path) -> dict[str, Any]:
    """The same of a folder of qprune train."""
    header, tensors = read(folder / "model.safetensors")
    return {
        "result": _timeless(json.loads((folder / "result.json").read_text())),
        "metrics": [_timeless(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()],
        "header": header,
        "tensors": {key: (str(t.dtype), tuple(t.shape), t.numpy().tobytes()) for key, t in tensors.items()},
    }


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if key not in ("seconds", "search_in_float_epochs")}
    return [_timeless(item) for item in value] if isinstance(value, list) else value

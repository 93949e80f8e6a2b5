"""Thirty steps of a search on real data give the same losses whichever implementation of the kernels runs."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qprune
from qprune.tasks import data

ROOT = Path(__file__).resolve().parent.parent
STEPS = 30


def losses(backend: str) -> list[float]:
    """The losses of a search on digits. On CUDA, "triton" means the GPU."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    task = data.load("digits")
    x, y = task.train.x[:480].to(device), task.train.y[:480].to(device)
    net = nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 12, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(192, 10),
    ).to(device)  # fmt: skip
    with qprune.backend(backend):
        space = qprune.SearchSpace((2, 4, 8), (2, 4, 8), granularity="filter")
        model = qprune.prepare(net, space, {"6": qprune.SearchSpace(pairs=((2, 4), (4, 4), (8, 8)))}, x[:4])
        qprune.calibrate(model, [x[:64]])
        search = qprune.Search(model, qprune.Budget(bops="w4a4"), weight_lr=0.05)
        found = []
        for step in range(STEPS):
            batch = slice(16 * step, 16 * step + 16)
            found.append(search.step(lambda m, batch=batch: F.cross_entropy(m(x[batch]), y[batch])).loss)  # type: ignore[misc]
    return found


@pytest.fixture(scope="module")
def reference() -> list[float]:
    found = losses("reference")
    assert sum(found[-5:]) < 0.8 * sum(found[:5])
    return found


def assert_alike(got: list[float], reference: list[float]) -> None:
    """Equal to rounding at first. Sooner or later a value lies so close to a rounding boundary that two implementations pick neighbouring
    codes; from there on they are two trainings of the same network, whose losses agree on average."""
    assert got[:8] == pytest.approx(reference[:8], rel=1e-5)
    assert sum(got[-10:]) == pytest.approx(sum(reference[-10:]), rel=0.03)


def test_cpu_kernels(reference: list[float]) -> None:
    assert_alike(losses("cpu"), reference)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_triton_kernels(reference: list[float]) -> None:
    """Interpreted where there is no GPU, in a process of its own: Triton decides that once, when it is imported."""
    interpret = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    environment = {**os.environ, **interpret, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, str(Path(__file__)), "triton"]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert_alike(json.loads(done.stdout), reference)


if __name__ == "__main__":
    print(json.dumps(losses(sys.argv[1])))

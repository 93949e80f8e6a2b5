"""A search in a loop of Accelerate: alone, and in two processes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from ranks import be_one_of_two, two_ranks
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import qprune


def work(rank: int, processes: int = 2) -> dict[str, Any]:
    if processes > 1:  # as torchrun tells it; the connection is there already
        told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "localhost"}
        os.environ.update({name: str(value) for name, value in {**told, "MASTER_PORT": 29500}.items()})
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 3))
    mixed = qprune.prepare(net, qprune.SearchSpace((2, 4, 8), (2, 4)), example_inputs=torch.randn(1, 3, 8, 8))
    x, y = torch.randn(64, 3, 8, 8), torch.arange(64) % 3
    x[torch.arange(64), y] += 1.0
    data = TensorDataset(x, y)
    model, loader = accelerator.prepare(mixed, DataLoader(data, 16 // processes, shuffle=True))
    search = qprune.Search(model, qprune.Budget(bops="w3a3"))
    losses = [accelerator.gather(torch.tensor([step(search, x, y)])).mean().item() for _ in range(4) for x, y in loader]
    policy = search.policy()
    final = qprune.convert(accelerator.unwrap_model(model), policy)
    total = sum(p.detach().double().abs().sum().item() for p in mixed.parameters())
    return {
        "wrapped": type(model).__name__, "losses": losses, "policy": policy.to_json(), "parameters": total,
        "cost": float(qprune.cost(final).bops), "limit": search.limits["bops"],
    }  # fmt: skip


def step(search: qprune.Search, x: torch.Tensor, y: torch.Tensor) -> float:
    return search.step(lambda m: F.cross_entropy(m(x), y)).loss


def test_alone() -> None:
    found = work(0, processes=1)
    assert found["wrapped"] == "Sequential"
    assert found["cost"] <= found["limit"]
    assert sum(found["losses"][-4:]) < 0.8 * sum(found["losses"][:4])


def test_two_processes(tmp_path: Path) -> None:
    first, second = two_ranks(__file__, tmp_path / "store")
    assert first == second
    assert first["wrapped"] == "DistributedDataParallel" and len(first["losses"]) == 16
    assert first["cost"] <= first["limit"]
    assert sum(first["losses"][-4:]) < 0.8 * sum(first["losses"][:4])


if __name__ == "__main__":
    be_one_of_two(work)

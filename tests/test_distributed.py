"""A search inside DistributedDataParallel, two processes over gloo, without find_unused_parameters."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from ranks import be_one_of_two, two_ranks
from torch import nn

import qprune


def work(rank: int) -> dict[str, object]:
    """Two ranks search on different data; each says what it ended with."""
    torch.manual_seed(0)
    tied = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.ReLU()
    net = nn.Sequential(*tied, nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    space = qprune.SearchSpace((0, 2, 4), (2, 4), granularity="filter")
    model = nn.parallel.DistributedDataParallel(qprune.prepare(net, space, example_inputs=torch.randn(1, 3, 8, 8)))
    search = qprune.Search(model, qprune.Budget(bops="w3a3"))
    generator, drawn = torch.Generator().manual_seed(7), []
    data = torch.Generator().manual_seed(rank)
    qprune.set_gates(model, mode="sampled")
    for _ in range(4):
        qprune.sample_gates(model, generator)
        x, y = torch.randn(8, 3, 8, 8, generator=data), torch.randint(0, 3, (8,), generator=data)
        drawn.append(float(qprune.cost(model).bops.detach()))
        search.step(lambda m, x=x, y=y: F.cross_entropy(m(x), y))  # type: ignore[misc]
    total = sum(float(p.detach().double().abs().sum()) for p in model.parameters())
    policy = search.policy().to_json()
    return {"parameters": total, "drawn": drawn, "policy": policy}


def test_ranks_agree(tmp_path: Path) -> None:
    first, second = two_ranks(__file__, tmp_path / "store")
    assert first == second
    assert len(set(first["drawn"])) > 1


if __name__ == "__main__":
    be_one_of_two(work)

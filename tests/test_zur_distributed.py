"""The filter-level search inside DistributedDataParallel: two processes over gloo, each with its own data."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from ranks import be_one_of_two, two_ranks
from torch import Tensor, nn
from unit_models import batches, chain, prepared

import qprune


def task(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def work(rank: int) -> dict[str, object]:
    """What a rank ended with, and the logits' estimate of its own data."""
    torch.manual_seed(0)
    inner = prepared(chain(2))
    search = qprune.Search(nn.parallel.DistributedDataParallel(inner), qprune.Budget(bops="w4a4"), "zur", samples=4)
    search.fit(batches(3, seed=rank), batches(3, seed=10 + rank), epochs=1)
    own = search.method.last_estimate.gradients[0].tolist()  # type: ignore[attr-defined]
    policy = search.policy().to_json()
    return {"own": own, "same": {name: p.tolist() for name, p in inner.named_parameters()}, "policy": policy}


def test_ranks_agree(tmp_path: Path) -> None:
    first, second = two_ranks(__file__, tmp_path / "store")
    assert (first["same"], first["policy"]) == (second["same"], second["policy"])
    assert first["own"] != second["own"]


if __name__ == "__main__":
    be_one_of_two(work)

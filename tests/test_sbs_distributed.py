"""A search with bit gates inside DistributedDataParallel, two processes over gloo, without find_unused_parameters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from ranks import be_one_of_two, two_ranks
from torch import nn

import qprune
from qprune.cost import geometry_of
from qprune.errors import InputError
from qprune.nn.bitgates import BitGate
from qprune.nn.nested import nest
from qprune.search import driver
from qprune.search.sbs import Sbs


def prepared() -> nn.Module:
    torch.manual_seed(0)
    parts = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.ReLU()]
    net = nn.Sequential(*parts, nn.Flatten(), nn.Linear(144, 3))
    return qprune.prepare(net, qprune.SearchSpace((0, 2, 4), (2, 4)), example_inputs=torch.randn(1, 3, 8, 8))


def work(rank: int) -> dict[str, object]:
    """Two ranks search on different data; each says what it ended with."""
    driver.METHODS["sbs"] = Sbs
    model = prepared()
    nest(model, geometry_of(model))
    parallel = nn.parallel.DistributedDataParallel(model)
    search = qprune.Search(parallel, qprune.Budget(bops="w3a3"), "sbs")
    data, errors = torch.Generator().manual_seed(rank), []
    for _ in range(4):
        x, y = torch.randn(8, 3, 8, 8, generator=data), torch.randint(0, 3, (8,), generator=data)
        search.step(lambda m, x=x, y=y: F.cross_entropy(m(x), y))  # type: ignore[misc]
        errors += [gate.errors.tolist() for gate in model.modules() if isinstance(gate, BitGate)]
    total = sum(float(p.detach().double().abs().sum()) for p in model.parameters())
    policy = search.policy().to_json()
    return {"parameters": total, "errors": errors, "policy": policy}


def test_ranks_agree(tmp_path: Path) -> None:
    first, second = two_ranks(__file__, tmp_path / "store")
    assert first == second
    assert len({str(errors) for errors in first["errors"]}) > 8


def test_a_wrapped_model_must_be_nested_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(driver.METHODS, "sbs", Sbs)

    class DataParallel(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    with pytest.raises(InputError, match="on it before it is wrapped"):
        qprune.Search(DataParallel(prepared()), qprune.Budget(bops="w3a3"), "sbs")


if __name__ == "__main__":
    be_one_of_two(work)

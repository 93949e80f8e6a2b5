"""Small searches and training whose steps are made on batches in parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qprune
from qprune import Budget, Search, SearchSpace
from qprune.nn.slim import slim
from qprune.tasks.train import Trainer

Batch = tuple[Tensor, Tensor]


def network(norms: bool = False, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    parts: list[nn.Module] = []
    for inputs, filters, stride in ((1, 6, 1), (6, 8, 1), (8, 8, 2)):
        parts += [nn.Conv2d(inputs, filters, 3, stride, 1), *([nn.BatchNorm2d(filters)] if norms else []), nn.ReLU()]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)).to(dtype)


def data(count: int, size: int = 10, seed: int = 1, dtype: torch.dtype = torch.float64) -> list[Batch]:
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(size, 1, 8, 8, generator=g, dtype=dtype), torch.randint(0, 3, (size,), generator=g)) for _ in range(count)]


def task(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


UNITS: dict[str, Any] = {"pairs": ((2, 2), (4, 4)), "granularity": "filter", "placement": "output"}
NICE, UNIQ = ({**UNITS, "weight_quantizer": kind, "input_quantizer": kind} for kind in ("nice", "uniq"))
CASES: dict[str, dict[str, Any]] = {
    "edmips": {"space": {"w_bits": (0, 2, 4), "a_bits": (2, 4), "granularity": "filter"}},
    "edmips-pairs": {"space": {"pairs": ((2, 2), (4, 4))}},
    "darts": {},
    "darts-second": {"second_order": True},
    "zur": {"space": NICE, "samples": 3},
    "zur-uniq": {"space": UNIQ, "samples": 2, "cost": "sampled", "penalty": "square"},
    "zur-gumbel": {"space": NICE, "estimator": "gumbel", "samples": 2},
    "zur-path": {"space": NICE, "estimator": "random-path", "samples": 1},
    "slimmable": {"budget": "macs=50%", "samples": 3},
    "slimmable-re": {"budget": "macs=50%", "samples": 2, "statistics": "reestimated", "loss": "square"},
    "sbs": {"space": {"w_bits": (0, 2, 4), "a_bits": (2, 4)}},
    "annc": {"budget": "size=5%", "temperature": 4.0, "clip_grad": 0.1},
}


def search_on(case: str, accumulate: int, calibrated: bool = True, norms: bool = False, net: nn.Module | None = None) -> Search:
    options = dict(CASES[case])
    method = case.split("-")[0]
    space, budget = options.pop("space", {"w_bits": (2, 4), "a_bits": (2, 4)}), options.pop("budget", "w3a3")
    model, x = network(norms) if net is None else net, data(1)[0][0]
    if method == "slimmable":
        model = slim(model, x, ratios=(0.5, 1.0))
    elif method != "annc":
        model = qprune.prepare(model, SearchSpace(**space), example_inputs=x)
        if calibrated:
            qprune.calibrate(model, [x])
    geometry: dict[str, Any] = {"example_inputs": x} if method == "annc" else {}
    return Search(model.train(), Budget.parse(budget), method, accumulate=accumulate, **geometry, **options)


def fitted(search: Search, batches: list[Batch]) -> Search:
    search.fit(batches[: len(batches) // 2], batches[len(batches) // 2 :])
    return search


def compare(one: Search, other: Search, exact: float = 1e-10) -> None:
    """Weights and losses as in float64, what gates and ranges compute in float32 as in that."""
    expected, found = one.model.state_dict(), other.model.state_dict()
    for name, value in expected.items():
        fine = name.endswith((".weight", ".bias", "running_mean"))
        torch.testing.assert_close(found[name], value, rtol=0, atol=exact if fine else 1e-6, msg=lambda text, name=name: f"{name}: {text}")
    (before,), (after,) = one.history, other.history
    assert after["loss"] == pytest.approx(before["loss"], rel=1e-9)
    assert after.get("accuracy") == before.get("accuracy")
    assert after["cost_ratio"] == pytest.approx(before["cost_ratio"], rel=1e-6)
    assert other.method.constraint.multipliers == pytest.approx(one.method.constraint.multipliers, rel=1e-6)


def trainer_on(accumulate: int, norms: bool = False, dtype: torch.dtype = torch.float64, **options: Any) -> Trainer:
    return Trainer(network(norms, dtype), 1, lr=0.05, accumulate=accumulate, **options)

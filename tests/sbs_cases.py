"""Small searches with single-path bit sharing."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from unit_models import batches, block_net

import qprune
from qprune.geometry import Geometry
from qprune.nn.bitgates import BitGate
from qprune.policy import LayerBits
from qprune.record import record_of
from qprune.search.sbs import Sbs

EDGE = qprune.SearchSpace.fixed(8, 8)


PRUNING = qprune.SearchSpace((0, 2, 4, 8), (2, 4, 8))


def task(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def prepared(space: qprune.SearchSpace = PRUNING, width: int = 8) -> nn.Module:
    torch.manual_seed(0)
    return qprune.prepare(block_net(width), space, {"0": EDGE, "7": EDGE}, batches(1)[0][0])


def with_rules(**rules: qprune.SearchSpace) -> nn.Module:
    torch.manual_seed(0)
    named = {name.replace("_", "."): space for name, space in rules.items()}
    return qprune.prepare(block_net(8), PRUNING, {"0": EDGE, "7": EDGE, **named}, batches(1)[0][0])


def geometry_of(model: nn.Module) -> Geometry:
    record = record_of(model)
    assert record is not None and record.geometry is not None
    return record.geometry


def search_on(model: nn.Module, budget: str = "w3a3", **options: Any) -> tuple[qprune.Search, Sbs]:
    search = qprune.Search(model, qprune.Budget.parse(budget), "sbs", **options)
    assert isinstance(search.method, Sbs)
    return search, search.method


def steps(search: qprune.Search, count: int, start: int = 0) -> list[float]:
    return [search.step(task, batch=batch).loss for batch in batches(start + count)[start:]]


def bit_gates(model: nn.Module) -> list[BitGate]:
    return [module for module in model.modules() if isinstance(module, BitGate)]


def read_off(model: nn.Module, method: Sbs) -> qprune.Policy:
    """The gates as they are, whatever that costs."""
    record = record_of(model)
    assert record is not None and record.geometry is not None
    layers: dict[str, LayerBits] = {name: bits for name, bits in record.fixed.items() if bits is not None}
    for name, layer in method.layers.items():
        p = layer.weight_gate().detach()
        w = [layer.space.w_bits[k] for k in (p if p.dim() == 2 else p[None]).argmax(1).tolist()]
        layers[name] = LayerBits(tuple(w) if len(w) > 1 else w[0], layer.space.a_bits[int(layer.input_gate().argmax())])
    return qprune.Policy(layers, record.geometry)


def trained(budget: str = "w3a3", **options: Any) -> tuple[nn.Module, qprune.Search, Sbs]:
    model = prepared()
    search, method = search_on(model, budget, weight_lr=0.05, **options)
    steps(search, 10)
    return model, search, method

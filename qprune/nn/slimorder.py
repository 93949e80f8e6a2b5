"""Filters in the order of their importance, without changing what the network computes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qprune.nn.slimtrace import SlimStructure

ORDERS = ("index", "l1", "gamma")


@torch.no_grad()
def sort_filters(net: nn.Module, structure: SlimStructure, order: str) -> dict[str, Tensor]:
    """Permute filters, the normalisation behind them and the inputs of whoever reads them, in place. Returns, per convolution with a width
    of its own, the index that each filter had before, int64.

    order  "index": none is moved; "l1": by falling L1 norm; "gamma": by falling |scale| of the normalisation behind (l1 without one).
           Ties keep their order
    """
    modules = dict(net.named_modules())
    orders: dict[str, Tensor] = {}
    for stream in structure.streams():
        if order == "index":
            permutation = torch.arange(structure.layers[stream[0]].filters)
        else:
            scores = torch.stack([_importance(modules, structure, name, order) for name in stream])
            permutation = scores.sum(0).argsort(descending=True, stable=True)
        orders |= dict.fromkeys(stream, permutation)
    if order != "index":
        _permute(modules, structure, orders)
    return orders


def _importance(modules: Mapping[str, nn.Module], structure: SlimStructure, name: str, order: str) -> Tensor:
    norm = next((norm for norm, conv in structure.norms.items() if conv == name), None)
    if order == "gamma" and norm is not None:
        return modules[norm].get_parameter("weight").abs().double()
    return modules[name].get_parameter("weight").flatten(1).abs().sum(1).double()


def _permute(modules: Mapping[str, nn.Module], structure: SlimStructure, orders: Mapping[str, Tensor]) -> None:
    for layer in structure.layers.values():
        _reorder(modules[layer.name], orders[layer.name], None if layer.source is None else orders[layer.source])
    for s in structure.shortcuts:
        if s.own is not None:
            _reorder(modules[s.own], orders[s.target], None if s.source is None else orders[s.source])
    for name, conv in structure.norms.items():
        norm = modules[name]
        for value in (*norm.parameters(), *norm.buffers()):
            if value.dim() == 1:
                value.copy_(value[orders[conv].to(value.device)])
    for name, conv in structure.linears.items():
        weight = modules[name].get_parameter("weight")
        blocks = weight.view(len(weight), structure.layers[conv].filters, -1)
        weight.copy_(blocks[:, orders[conv].to(weight.device)].flatten(1))


def _reorder(conv: nn.Module, rows: Tensor, columns: Tensor | None) -> None:
    """weight[rows][:, columns], bias[rows]."""
    weight = conv.get_parameter("weight")
    moved = weight[rows.to(weight.device)]
    weight.copy_(moved if columns is None else moved[:, columns.to(weight.device)])
    if isinstance(conv, nn.Conv2d) and conv.bias is not None:
        conv.bias.copy_(conv.bias[rows.to(weight.device)])

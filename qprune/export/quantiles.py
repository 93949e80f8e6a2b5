"""UNIQ's activations as a table: the number of the cell that Φ(x) lies in, and the level of that cell."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from qprune.nn.activation import QuantActivation
from qprune.quantizers import OutputQuantizer
from qprune.quantizers.uniq import LEAST_DEVIATION, STRETCH
from qprune.space import FLOAT


class Quantiles(nn.Module):
    """What a QuantActivation of kind "uniq" computes in eval mode (see quantizers.uniq.quantize_activation), by erf and one gather.

    table     [K · (n + 1)]: for each of K different widths the levels of cells 0 … n, n that of the widest
    negative  [C or 1]: what x < 0 becomes
    """

    def __init__(self, activation: QuantActivation) -> None:
        super().__init__()
        quantizer: OutputQuantizer = activation.quantizer
        column = activation.one_hot.argmax(1)
        self.limit = activation.limit
        bits = [1 if b == FLOAT else b for b in quantizer.bits]
        mean, deviation = (value.float() for value in quantizer.statistics())
        wide = (STRETCH * deviation).clamp_min(LEAST_DEVIATION)
        zero = torch.special.ndtr(-mean / wide)
        n = torch.tensor([2.0**b - 1 for b in bits]).unsqueeze(1)
        edge = torch.tensor([0.5 ** (b + 1) for b in bits]).unsqueeze(1)
        size = int(n.amax()) + 1
        q = (torch.arange(size).minimum(n) + 0.5) / n * (1 - zero) + zero
        kept = zero.clamp(edge, 1 - edge)
        negative = torch.where(kept == zero, 0.0, mean + wide * torch.special.ndtri(kept)).flatten()
        through = torch.tensor([b == FLOAT for b in quantizer.bits])[column]
        buffers = {
            "mean": mean,
            "wide": wide,
            "zero": zero,
            "cells": n.flatten()[column],
            "negative": negative[column],
            "table": (mean + wide * torch.special.ndtri(q.clamp(edge, 1 - edge))).flatten(),
            "start": column * size,
            "through": through if through.any() else None,
        }
        for name, value in buffers.items():
            self.register_buffer(name, None if value is None else value.clone())

    def forward(self, x: Tensor) -> Tensor:
        value = x.float() if self.limit is None else x.float().clamp(max=self.limit)
        cells, negative, start = (t.view(-1, *[1] * (x.dim() - 2)) for t in (self.cells, self.negative, self.start))
        below = 0.5 * (1 + torch.erf((value - self.mean) / self.wide * math.sqrt(0.5)))
        share = (below - self.zero).clamp_min(0) / (1 - self.zero)
        cell = torch.round(share * cells - 0.5).clamp_min(0).to(torch.int64)
        y = torch.where(value < 0, negative, self.table[cell + start])
        if self.through is not None:
            y = torch.where(self.through.view(start.shape), value.relu(), y)
        return y.to(x.dtype)

    mean: Tensor
    wide: Tensor
    zero: Tensor
    cells: Tensor
    negative: Tensor
    table: Tensor
    start: Tensor
    through: Tensor | None

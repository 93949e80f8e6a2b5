"""Quantizers of a weight that lies on its grids already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qprune.quantizers.base import TINY
from qprune.quantizers.uniq import UniqWeightQuantizer
from qprune.quantizers.weight import WeightQuantizer
from qprune.space import FLOAT, PRUNED


class StoredWeightQuantizer(WeightQuantizer):
    """Of a weight [F, …] that was read from a file of codes, or that a normalisation was folded into: the quantized value is the weight
    itself, in every stage and mode. Bit for bit that of the network that was stored, also where ranges were taken from a latent weight,
    which the file lacks.

    scale  [F] float32, buffer: the step of each filter, negative where folding turned the sign; 0 for filters of 0 and 32 bits
    """

    scale: Tensor

    def __init__(self, kind: str, bits: Sequence[int], filters: int, device: torch.device | None = None) -> None:
        super().__init__(kind, bits, filters, device)
        self.register_buffer("scale", torch.zeros(filters, device=device))

    def _learn(self, name: str, value: Tensor) -> None:
        """No range is learned."""

    @property
    def log_range(self) -> Tensor:  # type: ignore[override]
        """[F, K] float32, from the scales, without their signs; only that of a filter's own bits means anything."""
        return self._products().abs().clamp_min(TINY).log()

    def _products(self) -> Tensor:
        steps = torch.tensor([0.0 if b in (PRUNED, FLOAT) else n for b, n in zip(self.bits, self.steps, strict=True)])
        return self.scale.float().unsqueeze(1) * steps.to(self.scale.device)

    def start(self, weight: Tensor) -> None:
        """Nothing: nothing is taken from the weight."""

    def ranges(self, weight: Tensor, learned: Tensor | None = None) -> Tensor:
        return self._products()

    def forward(self, weight: Tensor, p: Tensor, picks: Sequence[int] | None = None, groups: Sequence[int] | None = None) -> Tensor:
        return weight

    def _load_from_state_dict(self, *args: Any) -> None:
        nn.Module._load_from_state_dict(self, *args)


class StoredUniqWeightQuantizer(UniqWeightQuantizer):
    """The same for "uniq" weights, whose levels have no scale."""

    def forward(self, weight: Tensor, p: Tensor) -> Tensor:
        return weight

"""What a convolution whose activation is quantized behind it says of itself."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class UnitLayer(nn.Module):
    """Mixin of a searched convolution that is the first part of a unit: convolution, normalisation, activation.

    candidates  ordered pairs (weight bits, bits of the activation that a filter produces); activation bits are 32 in a unit without one
    produces    whether the unit has an activation that is quantized
    input_bits  at which the layer quantizes its own input: 8 where no unit produces it (the image), else 32
    gate        over `candidates`; gate.distribution() [K] are the probabilities that every filter draws its candidate with
    """

    weight: Tensor
    candidates: tuple[tuple[int, int], ...]
    produces: bool
    input_bits: int
    gate: Any

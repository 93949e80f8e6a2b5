"""The definitions of "bit operations" that papers use, as the cost of one output position of one filter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qprune.geometry import LayerGeometry


@dataclass(frozen=True)
class Inputs:
    """The input channels that one filter sees, summed: what a convention needs of activation bits, which may differ between channels.

    channels  Σ 1     bits  Σ a_i     levels  Σ (2^a_i − 1)

    variance  of `levels`, where channels choose their bits at random and independently; None where they are known. All broadcast.
    """

    channels: Tensor
    bits: Tensor
    levels: Tensor
    variance: Tensor | None = None

    @classmethod
    def alike(cls, channels: Tensor, a: Tensor) -> Inputs:
        """All channels at a bits."""
        return cls(channels, channels * a, channels * (2.0**a - 1))


Convention = Callable[[LayerGeometry, Tensor, Inputs], Tensor]
"""(layer, weight bits w, inputs of the filter) → BOPs per output position; w and the inputs' fields broadcast."""

_SQRT_2 = 2**0.5
_WIDEST = 96  # bits of the largest sum that can occur: float weights and inputs, 2^32 of them
_NOTHING = 1e-9


def product(layer: LayerGeometry, w: Tensor, inputs: Inputs) -> Tensor:
    """Σ_i k²·w·a_i: every multiplication costs the product of its widths, additions are free. The default."""
    return layer.kernel * w * inputs.bits


def zur(layer: LayerGeometry, w: Tensor, inputs: Inputs) -> Tensor:
    """Zur et al. (1904.09872): multiplications k²·(w−1)·Σ a_i, the sign bit being free, plus c·k²−1 additions as wide as the largest sum,
    ⌈log2(k²·(2^(w−1)−1)·Σ(2^a_i−1))⌉ bits. Convolutions only: a linear layer costs nothing. For w = 1 the weight factor of the sum is 1.

    Where the channels' bits are random, the width is its expectation if the sum were normal: exact for known bits, an approximation (ours)
    else. The original divides the largest sum by the squared number of groups; here the inputs are already the filter's own.
    """
    if layer.kind == "Linear":
        return torch.zeros_like(w * inputs.bits)
    additions = (inputs.channels * layer.kernel - 1).clamp_min(0)
    factor = layer.kernel * (2.0 ** (w - 1) - 1).clamp_min(1)
    variance = None if inputs.variance is None else factor**2 * inputs.variance
    return layer.kernel * (w - 1).clamp_min(0) * inputs.bits + additions * _width(factor * inputs.levels, variance)


def _width(largest: Tensor, variance: Tensor | None) -> Tensor:
    """⌈log2 X⌉ for X ≥ 1; for X ~ N(largest, variance) its expectation Σ_{m ≥ 0} P(X > 2^m)."""
    exact = torch.ceil(torch.log2(largest.clamp_min(1)))
    if variance is None:
        return exact
    thresholds = 2.0 ** torch.arange(_WIDEST, dtype=largest.dtype, device=largest.device)
    known = variance <= _NOTHING
    deviation = torch.where(known, 1.0, variance).sqrt().unsqueeze(-1)
    above = 0.5 * torch.erfc((thresholds - largest.unsqueeze(-1)) / (_SQRT_2 * deviation))
    return torch.where(known, exact, above.sum(-1))


def uniq(layer: LayerGeometry, w: Tensor, inputs: Inputs) -> Tensor:
    """UNIQ (1804.10969): k²·Σ(a_i·w + a_i + w + log2(c·k²)), multiplication and accumulation. Reconstruction: quoted from memory of the
    paper."""
    products = inputs.channels * layer.kernel
    return layer.kernel * inputs.bits * (w + 1) + products * (w + torch.log2(products.clamp_min(1)))


CONVENTIONS: dict[str, Convention] = {"product": product, "zur": zur, "uniq": uniq}

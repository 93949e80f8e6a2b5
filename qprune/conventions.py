"""The definitions of "bit operations" that papers use, as the cost of one output position of one filter."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qprune.geometry import LayerGeometry

Convention = Callable[[LayerGeometry, Tensor, Tensor, Tensor], Tensor]
"""(layer, weight bits w, activation bits a, input channels c of the filter) → BOPs per output position; w, a, c broadcast."""


def product(layer: LayerGeometry, w: Tensor, a: Tensor, c: Tensor) -> Tensor:
    """c·k²·w·a: every multiplication costs the product of its widths, additions are free. The default."""
    return c * layer.kernel * w * a


def zur(layer: LayerGeometry, w: Tensor, a: Tensor, c: Tensor) -> Tensor:
    """Zur et al. (1904.09872): multiplications c·k²·(w−1)·a, the sign bit being free, plus c·k²−1 additions as wide as the largest sum,
    ⌈log2(c·k²·(2^a−1)·(2^(w−1)−1))⌉ bits. Convolutions only: a linear layer costs nothing. For w = 1 the weight factor of the sum is 1.

    The original divides the largest sum by the squared number of groups; here c is already the filter's own number of channels.
    """
    if layer.kind == "Linear":
        return torch.zeros_like(c * w * a)
    products = c * layer.kernel
    largest = products * (2.0**a - 1) * (2.0 ** (w - 1) - 1).clamp_min(1)
    return products * (w - 1).clamp_min(0) * a + (products - 1).clamp_min(0) * torch.ceil(torch.log2(largest.clamp_min(1)))


def uniq(layer: LayerGeometry, w: Tensor, a: Tensor, c: Tensor) -> Tensor:
    """UNIQ (1804.10969): c·k²·(a·w + a + w + log2(c·k²)), multiplication and accumulation. Reconstruction: quoted from memory of the
    paper."""
    products = c * layer.kernel
    return products * (a * w + a + w + torch.log2(products.clamp_min(1)))


CONVENTIONS: dict[str, Convention] = {"product": product, "zur": zur, "uniq": uniq}

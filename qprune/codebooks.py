"""Codebooks of weights: 2^bits shared values per layer, for every bit width, and a 0 that is kept for pruned weights.

ANNC (Yang et al., CVPR 2020) quantizes each layer's non-zero weights by one-dimensional k-means. Its programs begin Lloyd's iterations at
linspace(min, max); here they begin at optimal clusters (`qprune.clustering.kmeans`), whose error is lower.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from qprune.clustering import Values, equidistant, kmeans, lloyd
from qprune.errors import InputError

WIDTHS = range(1, 9)
ZERO = 1e-5
"""Weights of a smaller magnitude count as 0 (ANNC's threshold)."""


@dataclass(frozen=True)
class Codebook:
    """The shared values of a layer's weights.

    bits     values are coded in so many bits
    values   [2^bits] float32, ascending, on the weights' device; values that no weight needs repeat another
    zero     weights below ZERO in magnitude are 0, all others take the nearest of `values`; False: all take the nearest
    error    Σ (weight − quantized weight)² over the weights that it was made from
    linear   the values are equidistant, and two numbers (offset and step) describe them
    """

    bits: int
    values: Tensor
    zero: bool
    error: float
    linear: bool = False

    @property
    def entries(self) -> int:
        """How many 32-bit numbers a file needs for it."""
        return 2 if self.linear else 2**self.bits

    def encode(self, weight: Tensor) -> Tensor:
        """int16, like weight: the index of each weight's value, ties to the lower one; 2^bits where it is the reserved 0."""
        exact = weight.detach().float().contiguous()
        codes = torch.bucketize(exact, (self.values[1:] + self.values[:-1]) / 2)
        if self.zero:
            codes = codes.masked_fill(exact.abs() < ZERO, 2**self.bits)
        return codes.to(torch.int16)

    def decode(self, codes: Tensor) -> Tensor:
        """The weights of `encode`'s codes, float32."""
        return torch.cat([self.values, self.values.new_zeros(1)])[codes.long()]

    def quantize(self, weight: Tensor) -> Tensor:
        """Every weight's shared value, in weight's dtype and memory format; no gradient."""
        return torch.empty_like(weight, requires_grad=False).copy_(self.decode(self.encode(weight)))


def codebooks(
    weights: Mapping[str, Tensor], widths: Sequence[int] = WIDTHS, zero: bool = True, linear: bool = False
) -> dict[str, dict[int, Codebook]]:
    """Codebooks of every layer at every width: {layer: {bits: Codebook}}.

    weights  layers' weights of any shape, floating point
    widths   bits in 1..8
    zero     True: a 0 is reserved, and only weights from ZERO on are clustered; False: all are (quantization without pruning)
    linear   True: equidistant values, fitted to least squares (ours); False: k-means

    Weights are sorted on their device, the rest is float64 on the host: the same result everywhere. Raises InputError if a weight is not
    finite or a width is not in 1..8.
    """
    widths = sorted(set(widths))
    if not widths or widths[0] not in WIDTHS or widths[-1] not in WIDTHS:
        raise InputError(f"codebooks: got widths {widths}, expected bits in 1..8")
    return {name: _of_layer(name, weight, widths, zero, linear) for name, weight in weights.items()}


def refine(weight: Tensor, codebook: Codebook, iterations: int = 5, layer: str = "weight") -> Codebook:
    """The codebook after some of Lloyd's iterations on weights that have changed a little (of a linear one: fitted anew)."""
    if codebook.linear:
        return _of_layer(layer, weight, [codebook.bits], codebook.zero, True)[codebook.bits]
    values, rest = _values(layer, weight, codebook.zero)
    centers = lloyd(values, codebook.values.cpu().numpy(), iterations)
    return replace(codebook, values=torch.from_numpy(centers).to(weight.device), error=values.error(centers) + rest)


def _of_layer(name: str, weight: Tensor, widths: Sequence[int], zero: bool, linear: bool) -> dict[int, Codebook]:
    values, rest = _values(name, weight, zero)
    sizes = [2**bits for bits in widths]
    found = {size: equidistant(values, size) for size in sizes} if linear else kmeans(values, sizes)
    return {
        bits: Codebook(bits, torch.from_numpy(found[2**bits]).to(weight.device), zero, values.error(found[2**bits]) + rest, linear)
        for bits in widths
    }


def _values(name: str, weight: Tensor, zero: bool) -> tuple[Values, float]:
    """The values to be clustered, and the sum of squares of those that become 0."""
    flat = weight.detach().float().flatten()
    if not bool(flat.isfinite().all()):
        raise InputError(f"layer {name}: got weights that are NaN or infinite, expected finite ones; lower the learning rate")
    rest = 0.0
    if zero:
        kept = flat.abs() >= ZERO
        rest = float(flat[~kept].double().square().sum())
        flat = flat[kept]
    values: np.ndarray = np.sort(flat.numpy()) if flat.device.type == "cpu" else flat.sort().values.cpu().numpy()
    return Values.ascending(values), rest

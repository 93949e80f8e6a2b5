"""What a pruned network with codebooks weighs: the paper's measure, and what a file would need.

ANNC and others count the bits of the kept weights alone. To rebuild a layer one also has to know where these weights are, and the codebook.
Counted are the weights of convolutions and linear layers; biases and normalisations are not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from qprune.errors import InputError

FLOAT_BITS = 32
GAP_WIDTHS = range(2, 17)


@dataclass(frozen=True)
class CodedLayer:
    """A layer as it is stored.

    weights  number of weights
    nnz      number of weights that are kept
    bits     bits of the code of a kept weight
    entries  32-bit numbers of its codebook (2^bits; 2 for equidistant values; 0: none)
    mask     True where kept, flattened in the order of the file, or None if not at hand
    filters  None: single weights are kept or pruned; else whole filters are, of so many, and the mask has one entry per filter
    """

    weights: int
    nnz: int
    bits: int
    entries: int
    mask: Tensor | None = field(default=None, compare=False, repr=False)
    filters: int | None = None

    def __post_init__(self) -> None:
        if not (0 <= self.nnz <= self.weights and self.bits >= 0 and self.entries >= 0):
            raise InputError(f"CodedLayer: got {self.nnz} of {self.weights} weights at {self.bits} bits, expected 0 ≤ nnz ≤ weights")
        if self.filters is not None and (self.filters < 1 or self.weights % self.filters or self.nnz * self.filters % max(self.weights, 1)):
            raise InputError(f"CodedLayer: got {self.nnz} of {self.weights} weights in {self.filters} filters, expected whole filters")
        if self.mask is not None and (self.mask.numel() != self.entries_of_mask or int(self.mask.sum()) != self.kept_of_mask):
            raise InputError(
                f"CodedLayer: got a mask of {self.mask.numel()} entries with {int(self.mask.sum())} kept, "
                f"expected {self.entries_of_mask} with {self.kept_of_mask}; make the mask from the same weights"
            )

    @property
    def entries_of_mask(self) -> int:
        return self.weights if self.filters is None else self.filters

    @property
    def kept_of_mask(self) -> int:
        return self.nnz if self.filters is None or not self.weights else self.nnz * self.filters // self.weights


@dataclass(frozen=True)
class LayerSize:
    """Bits of one layer, or of all together.

    dense    32 per weight
    values   bits · nnz: the paper's measure
    entropy  n · H(kept / n) of the mask's n entries, the entropy of independent entries: a bound for what a mask costs on average
    mask     the mask as an arithmetic coder writes it that learns the share of kept weights as it goes, or one bit per weight if shorter
    gaps     distances between kept entries, in the layer's best width; None without a mask
    index    the smaller of mask and gaps
    books    codebooks
    """

    dense: int
    values: int
    entropy: float
    mask: int
    gaps: int | None
    index: int
    books: int

    @property
    def total(self) -> int:
        return self.values + self.index + self.books

    @property
    def rate(self) -> float:
        """Compression by the paper's measure: bits of the float weights / bits of the values."""
        return _ratio(self.dense, self.values)

    @property
    def entropy_rate(self) -> float:
        """Compression with the values and an ideal mask."""
        return _ratio(self.dense, self.values + self.entropy)

    @property
    def stored_rate(self) -> float:
        """Compression with all that is needed to rebuild the weights: values, positions, codebooks."""
        return _ratio(self.dense, self.total)


@dataclass(frozen=True)
class Sizes:
    """layers {name: LayerSize}; total: their sums (gaps: None if a layer's mask is not at hand)."""

    layers: dict[str, LayerSize]
    total: LayerSize


def sizes(layers: Mapping[str, CodedLayer]) -> Sizes:
    """The sizes of all layers."""
    found = {name: layer_size(layer) for name, layer in layers.items()}
    every = list(found.values())
    gaps = [size.gaps for size in every if size.gaps is not None]
    return Sizes(
        found,
        LayerSize(
            sum(s.dense for s in every),
            sum(s.values for s in every),
            sum(s.entropy for s in every),
            sum(s.mask for s in every),
            sum(gaps) if len(gaps) == len(every) else None,
            sum(s.index for s in every),
            sum(s.books for s in every),
        ),
    )


def layer_size(layer: CodedLayer) -> LayerSize:
    mask = mask_bits(layer.entries_of_mask, layer.kept_of_mask)
    gaps = None if layer.mask is None else gap_bits(layer.mask)[1]
    index = mask if gaps is None else min(mask, gaps)
    entropy = mask_entropy(layer.entries_of_mask, layer.kept_of_mask)
    return LayerSize(FLOAT_BITS * layer.weights, layer.bits * layer.nnz, entropy, mask, gaps, index, FLOAT_BITS * layer.entries)


def mask_entropy(weights: int, nnz: int) -> float:
    """n · H(nnz / n) in bits."""
    if not 0 < nnz < weights:
        return 0.0
    p = nnz / weights
    return -weights * (p * math.log2(p) + (1 - p) * math.log1p(-p) / math.log(2))


def mask_bits(weights: int, nnz: int) -> int:
    """Bits of a mask in a file: 0 if all or none are kept (its count is known), else at most one per weight.

    An adaptive arithmetic coder that expects a 1 with (ones + 1) / (entries + 2) needs log2((n + 1) · C(n, nnz)) bits whatever the order of
    the entries, and fewer than 2 to end the code.
    """
    if nnz in (0, weights):
        return 0
    choices = math.lgamma(weights + 1) - math.lgamma(nnz + 1) - math.lgamma(weights - nnz + 1)
    return min(weights, math.ceil((choices + math.log(weights + 1)) / math.log(2)) + 2)


def gap_bits(mask: Tensor, widths: Iterable[int] = GAP_WIDTHS) -> tuple[int, int]:
    """(width, bits) of the shortest run-length code of the positions of the mask's True entries, flattened.

    Relative indices as in Deep Compression (Han, Mao and Dally, ICLR 2016): the number of zeros before each kept weight in a field of
    so many bits; the field's highest number stands for as many zeros without a kept weight behind them. Deep Compression fills such gaps
    with weights of 0, which a codebook whose every code is in use cannot write, and which cost bits of value as well.
    """
    places = mask.detach().flatten().nonzero().flatten().cpu().numpy()
    runs = np.diff(places, prepend=-1) - 1
    return min(((width, width * int((runs // (2**width - 1) + 1).sum())) for width in widths), key=lambda found: found[1])


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.inf

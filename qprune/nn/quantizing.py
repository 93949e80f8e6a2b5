"""What the layers with fixed bits share: quantizers of one activation width and one weight width per filter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qprune.errors import SpaceError
from qprune.nn.mixing import QuantizedLayer
from qprune.nn.spread import Narrow, narrow_plain
from qprune.nn.surgery import stripped
from qprune.quantizers import InputQuantizer, Quantizer, make_weight_quantizer
from qprune.space import FLOAT, PRUNED, SearchSpace, check_bits


class Quantizing(Narrow, QuantizedLayer):
    """Mixin of QuantConv2d and QuantLinear: y = layer(A(x), Q(W)) with one activation width and one weight width per filter.

    w_bits   tuple of one int per filter of the weight; filters of 0 bits have zero weight
    a_bits   int; 32 = the input stays as it is
    fillers  filters at 0 bits that are computed with the others, for a shape that their number would not give
    """

    one_hot: Tensor
    space: SearchSpace
    fillers: tuple[int, ...] = ()

    def setup_quantizing(self, w_bits: int | Sequence[int], a_bits: int, quantizers: Mapping[str, Any], mixed: Any = None) -> None:
        """Add quantizers for these bits; ranges come from `mixed`, the layer that was searched, where it is given.

        quantizers  fields of a SearchSpace (see SearchSpace.quantizers)
        """
        filters, device = self.weight.size(0), self.weight.device
        per_filter = tuple(w_bits) if isinstance(w_bits, Sequence) else (w_bits,) * filters
        if len(per_filter) != filters:
            raise SpaceError(f"w_bits: expected one int or one per filter ({filters}), got {len(per_filter)}")
        if not isinstance(a_bits, int):
            raise SpaceError(f"a_bits: expected one int, got {a_bits!r}")
        distinct = tuple(sorted(check_bits("w_bits", tuple(dict.fromkeys(per_filter)))))
        self.space = space = SearchSpace(tuple(b for b in distinct if b != PRUNED) or distinct, (a_bits,), **quantizers)
        self.w_bits, self.a_bits = per_filter, a_bits
        self.surround(None, None)
        rows = torch.tensor([distinct.index(b) for b in per_filter], device=device)
        self.register_buffer("one_hot", F.one_hot(rows, len(distinct)).to(torch.float32), persistent=False)
        self.weight_quantizer = make_weight_quantizer(space.weight_quantizer, distinct, filters if space.scales == "filter" else 1, device)
        self.input_quantizer = InputQuantizer(space.own_input_quantizer, (self.a_bits,), device)
        self.weight_quantizer.start(self.weight)
        if mixed is not None:
            copy_candidates(mixed.weight_quantizer, self.weight_quantizer)
            if mixed.input_quantizer is not None:
                copy_candidates(mixed.input_quantizer, self.input_quantizer)

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A(x) and Q(W)."""
        if self.a_bits != FLOAT:
            x = self.input_quantizer(x, torch.ones(1, device=x.device))
        return x, self.weight_quantizer(self.weight, self.one_hot)

    @property
    def computed_bits(self) -> tuple[int, ...]:
        """w_bits as costs count them: fillers at the smallest width of the others."""
        least = min((b for b in self.w_bits if b != PRUNED), default=PRUNED)
        fillers = set(self.fillers)
        return tuple(least if f in fillers else b for f, b in enumerate(self.w_bits))

    def as_plain(self) -> nn.Module:
        """The float layer, which reads and makes the same channels."""
        layer = stripped(self)
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        return narrow_plain(layer, self.gather, self.spread)

    def bits_repr(self) -> str:
        distinct = self.weight_quantizer.bits
        return f", w_bits={distinct[0] if len(distinct) == 1 else distinct}, a_bits={self.a_bits}"


@torch.no_grad()
def copy_candidates(source: Quantizer, target: Quantizer) -> None:
    """The ranges, offsets and sign of those candidates of `source` that `target` has."""
    picks = [source.bits.index(b) for b in target.bits]
    for name, value in [*target.named_parameters(), *target.named_buffers()]:
        there = getattr(source, name)
        value.copy_(there[:, picks] if there.dim() == 2 else there)
    if isinstance(source, InputQuantizer) and isinstance(target, InputQuantizer):
        target.calibrated = target.calibrated or source.calibrated

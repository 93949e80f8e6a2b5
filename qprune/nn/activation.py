"""Activations with fixed bits, quantized where they are produced. What `convert` puts in place of a rectifier."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qprune.errors import SpaceError
from qprune.nn.filterwise import FilterConv2d
from qprune.nn.unitparts import FilterActivation
from qprune.quantizers import OutputQuantizer
from qprune.space import PRUNED, SearchSpace, check_bits


class QuantActivation(nn.Module):
    """y = A(relu(x)) for x [N, C, …], with bits per channel (Zur et al., 1904.09872).

    bits       one int, or one per channel
    quantizer  "nice", "pact" or "uniq", as SearchSpace.input_quantizer with placement "output"
    clips      per channel a number of the clip that it uses, besides its bits; None: one clip for all channels
    limit      of the rectifier: 6 for nn.ReLU6
    """

    one_hot: Tensor

    def __init__(
        self, bits: int | Sequence[int], quantizer: str = "nice", clips: Sequence[int] | None = None, limit: float | None = None
    ) -> None:
        super().__init__()
        per_channel = (bits,) if isinstance(bits, int) else tuple(bits)
        if PRUNED in check_bits("out_bits", tuple(dict.fromkeys(per_channel))):
            raise SpaceError("out_bits: 0 is not possible; a filter is pruned by its w_bits")
        SearchSpace(input_quantizer=quantizer, placement="output")
        keys = list(zip(clips or (0,) * len(per_channel), per_channel, strict=True))
        self.columns = tuple(sorted(set(keys)))
        self.channel_bits, self.limit = bits if isinstance(bits, int) else per_channel, limit
        self.quantizer = OutputQuantizer(quantizer, tuple(b for _, b in self.columns), clips is not None)
        rows = torch.tensor([self.columns.index(key) for key in keys])
        self.register_buffer("one_hot", F.one_hot(rows, len(self.columns)).float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        p = self.one_hot if self.one_hot.size(0) > 1 else self.one_hot[0]
        return self.quantizer(x if self.limit is None else x.clamp(max=self.limit), p)  # type: ignore[no-any-return]

    def as_plain(self) -> nn.Module:
        """The rectifier in whose place it stands."""
        return nn.ReLU() if self.limit is None else nn.ReLU6()

    def extra_repr(self) -> str:
        distinct = tuple(dict.fromkeys(b for _, b in self.columns))
        return f"bits={distinct[0] if len(distinct) == 1 else distinct}"


def fix_activation(
    rectifier: nn.Module, layer: nn.Module, bits: int | Sequence[int], w_bits: Sequence[int], space: SearchSpace
) -> QuantActivation:
    """The activation with these bits in place of `rectifier`, on the device of `layer`, whose filters have w_bits. A searched activation
    keeps its clips and statistics; for a plain nn.ReLU or nn.ReLU6 they are those of `space`, still to be calibrated."""
    space = layer.space if isinstance(layer, FilterConv2d) else space
    own, limit = not space.shared_weights, 6.0 if isinstance(rectifier, nn.ReLU6) else getattr(rectifier, "limit", None)
    per_filter = (bits,) * len(w_bits) if own and isinstance(bits, int) else bits
    fixed = QuantActivation(per_filter, space.input_quantizer, tuple(w_bits) if own else None, limit)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    fixed.to(weight.device).train(rectifier.training)
    if isinstance(rectifier, FilterActivation) and isinstance(layer, FilterConv2d):
        searched = rectifier.quantizer
        assert isinstance(searched, OutputQuantizer)
        _copy_statistics(searched, fixed.quantizer, [layer.candidates.index(key) for key in fixed.columns] if own else [0])
    return fixed


@torch.no_grad()
def _copy_statistics(source: OutputQuantizer, target: OutputQuantizer, columns: Sequence[int]) -> None:
    for name, value in [*target.named_parameters(), *target.named_buffers()]:
        there = getattr(source, name)
        value.copy_(there[:, list(columns)] if there.dim() == 2 else there)
    target.calibrated = target.calibrated or source.calibrated

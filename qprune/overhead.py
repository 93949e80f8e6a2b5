"""What a file of a trained network needs besides its weights: where they are, and what their codes mean."""

from __future__ import annotations

from torch import Tensor, nn

from qprune.errors import InputError
from qprune.geometry import weighted_layers
from qprune.nn.codebook import codebook_layers
from qprune.nn.filterwise import FilterConv2d
from qprune.nn.mixing import Mixing
from qprune.nn.quantizing import Quantizing
from qprune.quantizers import OutputQuantizer, Quantizer
from qprune.sizes import FLOAT_BITS, mask_bits
from qprune.space import FLOAT, PRUNED
from qprune.stored import stored_sizes

WIDTH_BITS = 4  # of the number 1 … 8 of a filter's own bits, as in qprune.cost


def overhead(model: nn.Module) -> dict[str, int]:
    """Bits that a file needs besides those of the weights that remain, which a Cost or `qprune.stored.stored_sizes` count:

    index      where they are: masks of weights or filters (see qprune.sizes), and the widths of filters that differ
    codebooks  shared values, or the ranges of quantizers of weights and activations, 32 bits each

    Raises InputError for a model that is being searched.
    """
    ranges = sum(_ranges(module) for module in model.modules() if isinstance(module, Quantizer))
    if any(codebook_layers(model)):
        total = stored_sizes(model).total
        return {"index": total.index, "codebooks": total.books + FLOAT_BITS * ranges}
    index = 0
    for name, layer in weighted_layers(model):
        if isinstance(layer, Mixing | FilterConv2d):
            raise InputError(f"layer {name} is being searched; convert the model first")
        if isinstance(layer, Quantizing):
            kept = [bits for bits in layer.w_bits if bits != PRUNED]
            index += mask_bits(len(layer.w_bits), len(kept)) + (WIDTH_BITS * len(kept) if len(set(kept)) > 1 else 0)
    return {"index": index, "codebooks": FLOAT_BITS * ranges}


def _ranges(quantizer: Quantizer) -> int:
    """Numbers that describe the one quantizer of a tensor, or of every row of it that has its own."""
    if set(quantizer.bits) <= {FLOAT, PRUNED}:
        return 0
    vectors: list[Tensor] = [value for _, value in quantizer.named_parameters() if value.dim() == 2]
    vectors += [value for name, value in quantizer.named_buffers() if name == "log_range"]
    return sum(value.numel() if isinstance(quantizer, OutputQuantizer) else value.size(0) for value in vectors)

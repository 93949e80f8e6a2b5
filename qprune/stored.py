"""Networks with codebooks as policies and as files: the bits of their filters, the sizes of their layers."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from qprune.errors import InputError
from qprune.geometry import weighted_layers
from qprune.nn.codebook import CodebookLayer
from qprune.nn.surgery import plain
from qprune.policy import LayerBits
from qprune.sizes import CodedLayer, Sizes, sizes
from qprune.space import FLOAT, PRUNED
from qprune.wrappers import unwrap


def layer_bits(layer: CodebookLayer) -> LayerBits:
    """As a policy has it: filters that have no weight left are at 0 bits."""
    alive = layer.mask.flatten(1).any(1).tolist()
    return LayerBits(layer.w_bits if all(alive) else tuple(layer.w_bits if there else PRUNED for there in alive), layer.a_bits)


def stored(layer: CodebookLayer) -> CodedLayer:
    """What a file needs of the layer: the mask by filters where every filter is kept whole or not at all."""
    rows = layer.mask.flatten(1)
    whole = bool((rows.any(1) == rows.all(1)).all())
    mask, filters = (rows.any(1), len(rows)) if whole else (rows.flatten(), None)
    return CodedLayer(rows.numel(), int(rows.sum()), layer.w_bits, 2 if layer.linear else 2**layer.w_bits, mask, filters)


def stored_sizes(model: nn.Module) -> Sizes:
    """What the layers with codebooks need, and all other convolutions and linear layers at 32 bits per weight. Raises InputError for a
    model with layers that are quantized in another way."""
    layers = {}
    for name, layer in weighted_layers(unwrap(model)):
        if isinstance(layer, CodebookLayer):
            layers[name] = stored(layer)
        elif plain(layer) is not layer:
            raise InputError(f"layer {name} is a {type(layer).__name__}, which has no codebook; its size is in qprune.cost(model)")
        else:
            count = cast(Tensor, layer.weight).numel()
            layers[name] = CodedLayer(count, count, FLOAT, 0)
    return sizes(layers)

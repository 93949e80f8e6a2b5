"""The weights of a packed file: layers to streams of bits, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qprune.bitstream import Array, BitReader, BitWriter
from qprune.clustering import points_on_line
from qprune.codes import weight_codes
from qprune.errors import CheckpointError
from qprune.masks import Index, read_mask, write_mask
from qprune.nn.codebook import CodebookLayer
from qprune.nn.quantizing import Quantizing
from qprune.quantizers import StoredUniqWeightQuantizer, StoredWeightQuantizer
from qprune.space import FLOAT, PRUNED
from qprune.stored import stored

STREAMS = ("codes", "index", "codebooks", "scales")


def to_numpy(value: Tensor) -> Array:
    return value.detach().cpu().contiguous().numpy()


def _places(layer: Quantizing) -> Iterator[tuple[int, Array]]:
    """(width, the weights [F, …] that have it, bool), ascending, without 0 bits and without weights that read what nobody produces."""
    bits = np.asarray(layer.w_bits).reshape(-1, *[1] * (layer.weight.dim() - 1))
    kept = layer.weight_quantizer.kept
    there = np.broadcast_to(True if kept is None else to_numpy(kept), layer.weight.shape)
    for width in sorted(set(layer.w_bits) - {PRUNED}):
        yield width, there & (bits == width)


def write_quantized(name: str, layer: Quantizing, streams: Mapping[str, BitWriter]) -> None:
    """Codes, scales and input range of a QuantConv2d or QuantLinear. Raises CheckpointError if they are not float32."""
    for key, value in (("weight", layer.weight), ("input range", layer.input_quantizer.log_range)):
        if value.dtype != torch.float32:
            raise CheckpointError(f"save_packed: the {key} of layer {name!r} is {value.dtype}, expected float32: call model.float()")
    if layer.weight_quantizer.kind == "uniq":
        _write_quantiles(name, layer, streams)
    else:
        codes = weight_codes(layer)
        levels, floats = to_numpy(codes.levels), None if codes.floats is None else to_numpy(codes.floats)
        for width, places in _places(layer):
            if width == FLOAT:
                assert floats is not None
                streams["codes"].write_floats(floats[places])
            else:
                streams["codes"].write(levels[places], width)
        streams["scales"].write_floats(to_numpy(codes.scale))
    streams["scales"].write_floats(to_numpy(layer.input_quantizer.log_range))


def _write_quantiles(name: str, layer: Quantizing, streams: Mapping[str, BitWriter]) -> None:
    """Codes of "uniq" weights are the ranks of their values among those that the layer has at this width."""
    weight = to_numpy(layer.weight_quantizer(layer.weight, layer.one_hot))
    if np.isnan(weight).any():
        raise CheckpointError(f"save_packed: the weight of layer {name!r} is NaN; codes cannot say so")
    for width, places in _places(layer):
        if width == FLOAT:
            streams["codes"].write_floats(weight[places])
            continue
        values, codes = np.unique(weight[places], return_inverse=True)
        streams["codes"].write(codes, width)
        streams["codebooks"].write_floats(np.pad(values, (0, 2**width - values.size), mode="edge"))


def write_codebook(layer: CodebookLayer, streams: Mapping[str, BitWriter], entropy: bool) -> tuple[list[Any], int]:
    """Codes, index and codebook; returns the index as JSON, and how many numbers describe the codebook."""
    coded, mask = stored(layer), layer.mask.flatten()
    assert coded.mask is not None
    index = write_mask(to_numpy(coded.mask), streams["index"], entropy)
    streams["codes"].write(to_numpy(layer.codes().flatten()[mask]), layer.w_bits)
    values = to_numpy(layer.codebook.float())
    ends = values[[0, -1]]
    numbers = ends if layer.linear and np.array_equal(points_on_line(float(ends[0]), float(ends[1]), values.size), values) else values
    streams["codebooks"].write_floats(numbers)
    return index.to_json(), numbers.size


def read_layer(name: str, layer: Any, streams: Mapping[str, BitReader], books: Mapping[str, tuple[Index, int]]) -> None:
    """Fill a layer with what the streams have next. books: of layers with codebooks, their index and the numbers of their codebook."""
    if isinstance(layer, CodebookLayer):
        if name not in books:
            raise CheckpointError(f"the header has no index for layer {name!r}")
        _read_codebook(name, layer, streams, *books[name])
    elif isinstance(layer, Quantizing):
        _read_quantized(layer, streams)
    else:
        layer.weight.copy_(_like(layer.weight, streams["codes"].read_floats(layer.weight.numel())))


def _like(target: Tensor, values: Array) -> Tensor:
    return torch.from_numpy(values).view(target.shape)


def _read_quantized(layer: Quantizing, streams: Mapping[str, BitReader]) -> None:
    old, filters = layer.weight_quantizer, layer.weight.size(0)
    codes = [(width, places, streams["codes"].read(int(places.sum()), width)) for width, places in _places(layer)]
    weight = np.zeros(layer.weight.shape, np.float32)
    quantizer: StoredWeightQuantizer | StoredUniqWeightQuantizer
    if old.kind == "uniq":
        quantizer = StoredUniqWeightQuantizer(old.bits)
        for width, places, levels in codes:
            weight[places] = levels.view(np.float32) if width == FLOAT else streams["codebooks"].read_floats(2**width)[levels]
    else:
        quantizer = StoredWeightQuantizer(old.kind, old.bits, filters)
        scale = streams["scales"].read_floats(filters)
        quantizer.scale.copy_(torch.from_numpy(scale))
        per_filter = np.broadcast_to(scale.reshape(-1, *[1] * (layer.weight.dim() - 1)), layer.weight.shape)
        zero_point = dict(zip(quantizer.bits, quantizer.zero_point, strict=True))
        for width, places, levels in codes:
            signed = levels.astype(np.float32) - np.float32(zero_point[width])
            weight[places] = levels.view(np.float32) if width == FLOAT else signed * per_filter[places]
    quantizer.kept = old.kept
    layer.weight = nn.Parameter(torch.empty_like(layer.weight).copy_(torch.from_numpy(weight)), requires_grad=False)
    layer.weight_quantizer = quantizer.train(layer.training)
    target = layer.input_quantizer.log_range
    target.copy_(_like(target, streams["scales"].read_floats(target.numel())))


def _read_codebook(name: str, layer: CodebookLayer, streams: Mapping[str, BitReader], index: Index, numbers: int) -> None:
    n, filters, size = layer.weight.numel(), layer.weight.size(0), 2**layer.w_bits
    if index.entries not in (n, filters) or numbers not in (2, size):
        raise CheckpointError(f"layer {name} has an index of {index.entries} entries and a codebook of {numbers} numbers in the file")
    mask = np.repeat(read_mask(index, streams["index"]), n // index.entries)
    codes = streams["codes"].read(int(mask.sum()), layer.w_bits)
    values = streams["codebooks"].read_floats(numbers)
    values = values if numbers == size else points_on_line(float(values[0]), float(values[1]), size)
    weight = np.zeros(n, np.float32)
    weight[mask] = values[codes]
    layer.codebook.copy_(torch.from_numpy(values))
    layer.mask.copy_(_like(layer.mask, mask))
    layer.weight.copy_(_like(layer.weight, weight))

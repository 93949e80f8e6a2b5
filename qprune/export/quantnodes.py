"""Weights and activations as Quant nodes: what the layers of a copy for QONNX are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qprune.codes import grid_of, output_codes, weight_codes
from qprune.export.copies import DeployedConv2d, DeployedLinear, FixedLayer
from qprune.export.plain import Constant, PlainParts
from qprune.nn.activation import QuantActivation
from qprune.nn.codebook import CodebookLayer
from qprune.nn.quantizing import Quantizing
from qprune.nn.surgery import replace_modules, take_over
from qprune.quantizers import InputQuantizer, WeightQuantizer
from qprune.space import FLOAT, PRUNED

Kind = TypeVar("Kind", int, tuple[int, bool])


class Quant(nn.Module):
    """qonnx's Quant: (round(clip(x / scale + zero_point)) − zero_point) · scale, half to even, clipped to the integers of `bits` bits; one
    signed bit: ±scale, + for x ≥ 0. scale: broadcasts over x, or [C] for x [N, C, …]."""

    scale: Tensor
    zero_point: Tensor
    bits: Tensor

    def __init__(self, scale: Tensor | float, bits: int, signed: bool, narrow: bool = False, zero_point: float = 0.0) -> None:
        super().__init__()
        self.attributes: dict[str, Any] = {"signed": int(signed), "narrow": int(narrow), "rounding_mode": "ROUND"}
        for name, value in (("scale", scale), ("zero_point", zero_point), ("bits", float(bits))):
            self.register_buffer(name, torch.as_tensor(value, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale if self.scale.dim() != 1 else self.scale.view(-1, *[1] * (x.dim() - 2))
        inputs = (x, scale, self.zero_point, self.bits)
        kind = "qonnx.custom_op.general::Quant"
        return torch.onnx.ops.symbolic(kind, inputs, self.attributes, dtype=torch.float32, shape=x.shape, version=1)


class QuantWeight(nn.Module):
    """A weight, or some of its filters, on grids of one kind."""

    value: Tensor

    def __init__(self, value: Tensor, quant: Quant) -> None:
        super().__init__()
        self.register_buffer("value", value)
        self.quant = quant

    def forward(self) -> Tensor:
        return self.quant(self.value)  # type: ignore[no-any-return]


class Sorted(nn.Module):
    """A weight [F, …] whose filters are sorted by kind: parts[i] has filters[i], in ascending order. apart: it is to be split."""

    order: Tensor

    def __init__(self, parts: Sequence[nn.Module], filters: Sequence[list[int]], apart: bool) -> None:
        super().__init__()
        self.parts, self.filters, self.apart = nn.ModuleList(parts), filters, apart
        self.register_buffer("order", _order(filters))

    def forward(self) -> Tensor:
        return torch.cat([part() for part in self.parts]).index_select(0, self.order)


class Bipolar(nn.Module):
    """±scale, − for x ≤ 0 as in the layers; Quant alone has + for 0."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.quant = Quant(scale, 1, signed=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.quant(torch.where(x > 0, x, -1.0))  # type: ignore[no-any-return]


class QuantRectifier(nn.Module):
    """A rectifier of x [N, C, …] with bits per channel: one Quant per width, over its channels; channels of 32 bits are rectified only."""

    order: Tensor

    def __init__(self, activation: QuantActivation) -> None:
        super().__init__()
        codes = output_codes(activation)
        self.limit, of_bits = codes.limit, _sorted(codes.bits)
        quants = [
            nn.Identity() if bits == FLOAT else Quant(_shared(codes.scale[rows], 1), bits, signed=False) for bits, rows in of_bits.items()
        ]
        self.quants, self.picks = nn.ModuleList(quants), nn.ModuleList(Channels(rows) for rows in of_bits.values())
        self.register_buffer("order", _order(list(of_bits.values())))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(x if self.limit is None else x.clamp(max=self.limit))
        if len(self.quants) == 1:
            return self.quants[0](y)  # type: ignore[no-any-return]
        parts = [quant(pick(y)) for quant, pick in zip(self.quants, self.picks, strict=True)]
        return torch.cat(parts, 1).index_select(1, self.order)


class Channels(nn.Module):
    """Some channels of x [N, C, …]."""

    channels: Tensor

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("channels", torch.tensor(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(1, self.channels)


class QonnxParts(PlainParts):
    """Quant nodes; plain operations where there are no integer codes. split_widths: weights are made for `split`."""

    def __init__(self, split_widths: bool = False) -> None:
        self.split_widths = split_widths

    def weight(self, layer: FixedLayer) -> nn.Module:
        if isinstance(layer, CodebookLayer) or not isinstance(layer.weight_quantizer, WeightQuantizer):
            return super().weight(layer)
        grouped = isinstance(layer, nn.Conv2d) and layer.groups > 1 and layer.weight.size(1) > 1
        return quant_weight(layer, apart=self.split_widths and not grouped)

    def input(self, quantizer: InputQuantizer) -> nn.Module:
        if quantizer.bits in ((FLOAT,), (PRUNED,)):
            return super().input(quantizer)
        grid = grid_of(quantizer)
        if grid.zero_point is not None:
            return Quant(grid.scale, grid.bits, signed=grid.zero_point > 0)
        if quantizer.kind == "pact":
            return Bipolar(grid.scale / 2)
        return Quant(grid.scale, grid.bits, signed=False, zero_point=-grid.offset / grid.scale)

    def activation(self, activation: QuantActivation, name: str) -> nn.Module:
        return super().activation(activation, name) if activation.quantizer.kind == "uniq" else QuantRectifier(activation)


def quant_weight(layer: Quantizing, apart: bool = False) -> nn.Module:
    """The weight of a layer with integer codes: one Quant for each kind of grid that its filters have. apart: filters at 0 bits are a part
    of their own; otherwise they are zeros in one of the others."""
    codes = weight_codes(layer)
    values, scale = codes.values(), codes.signed()[1]
    kinds = [_kind(bits, float(steps), float(zero)) for bits, steps, zero in zip(codes.bits, codes.steps, codes.zero_point, strict=True)]
    if not apart or set(kinds) == {(PRUNED, False)}:
        # zero is a code of every grid but the one of one bit
        home = max((kind for kind in kinds if 1 < kind[0] < FLOAT), default=(2, True))
        kinds = [home if kind[0] == PRUNED else kind for kind in kinds]
    of_kind = _sorted(kinds)
    parts = [_part(values[rows], scale[rows], *kind) for kind, rows in of_kind.items()]
    return parts[0] if len(parts) == 1 else Sorted(parts, list(of_kind.values()), apart)


def _kind(bits: int, steps: float, zero_point: float) -> tuple[int, bool]:
    """(bits in the file, narrow)"""
    if bits in (PRUNED, 1, FLOAT):
        return bits, False
    return bits + int(zero_point % 1 != 0), 2 * zero_point == steps


def _part(value: Tensor, scale: Tensor, bits: int, narrow: bool) -> nn.Module:
    if bits in (PRUNED, FLOAT):
        return Constant(value)
    # a scale that folding made negative is a positive one of codes with the other sign, if the grid has them
    lowest = (value.flatten(1) / scale.unsqueeze(1)).round().amin(1)
    scale = torch.where((scale < 0) & ((bits == 1) | (lowest > -(2 ** (bits - 1)))), -scale, scale)
    return QuantWeight(value, Quant(_shared(torch.where(scale != 0, scale, 1.0), value.dim()), bits, signed=True, narrow=narrow))


def _shared(scale: Tensor, dim: int) -> Tensor:
    """[F] as [F, 1, …] of dim dimensions; a scalar where all are the same."""
    return scale[0] if bool((scale == scale[0]).all()) else scale.view(-1, *[1] * (dim - 1))


def _sorted(kinds: Sequence[Kind]) -> dict[Kind, list[int]]:
    """The items of each kind, the widest first."""
    return {kind: [i for i, other in enumerate(kinds) if other == kind] for kind in sorted(set(kinds), reverse=True)}


def _order(groups: Sequence[Sequence[int]]) -> Tensor:
    """Where items 0 … n − 1 are once the groups are put one behind the other."""
    return torch.tensor([item for group in groups for item in group]).argsort()


def split(model: nn.Module) -> nn.Module:
    """The copy with `SplitLayer` in place of every layer whose weight is to be split."""
    swaps: dict[nn.Module, nn.Module] = {}
    for layer in model.modules():
        if isinstance(layer, DeployedConv2d | DeployedLinear) and isinstance(layer.weight, Sorted) and layer.weight.apart:
            swaps[layer] = SplitLayer(layer, layer.weight).eval()
    return replace_modules(model, swaps)


class SplitLayer(nn.Module):
    """A layer as several, one per kind of its filters, over the same quantized input; filters at 0 bits give their bias."""

    order: Tensor
    constant: Tensor
    gather: nn.Module | None
    spread: nn.Module | None

    def __init__(self, layer: DeployedConv2d | DeployedLinear, weight: Sorted) -> None:
        super().__init__()
        self.input, self.gather, self.spread = layer.input, layer.gather, layer.spread
        self.axis = -3 if isinstance(layer, nn.Conv2d) else -1
        bias = torch.zeros(len(weight.order)) if layer.bias is None else layer.bias
        parts = list(zip(weight.parts, weight.filters, strict=True))
        pruned = [rows for part, rows in parts if isinstance(part, Constant) and not part.value.any()]
        kept = [(part, rows) for part, rows in parts if rows not in pruned]
        self.layers = nn.ModuleList(_filters(layer, part, rows, len(weight.order)) for part, rows in kept)
        self.register_buffer("order", _order([rows for _, rows in kept] + pruned))
        self.register_buffer("constant", bias[[f for rows in pruned for f in rows]])

    def forward(self, x: Tensor) -> Tensor:
        x = self.input(x if self.gather is None else self.gather(x))
        made = [layer(x) for layer in self.layers]
        if self.constant.numel():
            shape = list(made[0].shape)
            shape[self.axis] = self.constant.numel()
            made.append(self.constant.view(-1, *[1] * (-1 - self.axis)).expand(shape))
        y = torch.cat(made, self.axis).index_select(self.axis % x.dim(), self.order)
        return y if self.spread is None else self.spread(y)


def _filters(layer: DeployedConv2d | DeployedLinear, weight: nn.Module, filters: list[int], of: int) -> nn.Module:
    """The layer with some of its filters, `of` in all, on an input that is quantized already."""

    def setup(part: DeployedConv2d | DeployedLinear) -> None:
        part.surround(None, None)
        part._modules.update(weight=weight, input=nn.Identity())
        if layer.bias is not None:
            part._parameters["bias"] = nn.Parameter(layer.bias[filters], requires_grad=False)
        if isinstance(part, nn.Conv2d) and part.groups > 1:
            part._modules["input"] = Channels([f * part.groups // of for f in filters])
            part.groups = len(filters)

    return take_over(type(layer), layer, setup)

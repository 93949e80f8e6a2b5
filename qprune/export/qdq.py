"""Weights and activations as ONNX's QuantizeLinear and DequantizeLinear, which torch.onnx writes for torch.onnx.ops.symbolic."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.onnx import ops

from qprune.codes import OutputCodes, WeightCodes, grid_of, output_codes, weight_codes
from qprune.export.copies import FixedLayer
from qprune.export.plain import Constant, PlainParts, Zero, final_weight
from qprune.export.quantiles import Quantiles
from qprune.nn.activation import QuantActivation
from qprune.nn.quantizing import Quantizing
from qprune.quantizers import InputQuantizer, WeightQuantizer
from qprune.space import FLOAT, PRUNED

OPSETS = {2: 25, 4: 21, 8: 18}
"""The first opset that has integers of so many bits (8: the first that torch.onnx writes)."""
TYPE_KEY = "qprune.type"
"""The entry of a node's metadata that says in which type its codes are to be stored; torch has none below 8 bits."""


class QDQParts(PlainParts):
    """The parts of a network whose integers are ONNX types of the sizes in `widths`, ascending. `used`: those that were needed.

    Kept as floating-point numbers: "uniq" weights and weights with codebooks, whose levels are not equidistant.
    """

    def __init__(self, widths: tuple[int, ...] = (2, 4, 8)) -> None:
        self.widths = widths
        self.used: set[int] = set()

    def weight(self, layer: FixedLayer) -> nn.Module:
        if not isinstance(layer, Quantizing) or not isinstance(layer.weight_quantizer, WeightQuantizer):
            return Constant(final_weight(layer))
        codes = weight_codes(layer)
        if all(b == FLOAT for b in codes.bits):
            return Constant(codes.values())
        return DequantizedWeight(codes, self)

    def input(self, quantizer: InputQuantizer) -> nn.Module:
        if quantizer.bits == (FLOAT,):
            return nn.Identity()
        if quantizer.bits == (PRUNED,):
            return Zero()
        grid = grid_of(quantizer)
        scale = torch.tensor(grid.scale)
        if grid.zero_point is None:
            return QuantizeDequantize(scale, torch.tensor(float(grid.steps)), self, shift=grid.offset)
        return QuantizeDequantize(scale, torch.tensor(float(grid.steps)), self, negative=grid.zero_point)

    def activation(self, activation: QuantActivation, name: str) -> nn.Module:
        if activation.quantizer.kind == "uniq":
            return Quantiles(activation)
        return OutputQDQ(output_codes(activation, name), self)

    def holding(self, bits: int) -> int:
        """The smallest integer type, in bits, that holds so many."""
        return next(width for width in self.widths if width >= bits)

    def use(self, bits: int) -> int:
        width = self.holding(bits)
        self.used.add(width)
        return width


def _dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, kind: str, axis: int) -> Tensor:
    return ops.symbolic(
        "DequantizeLinear",
        (codes, scale, zero_point),
        {"axis": axis} if scale.dim() else {},
        dtype=torch.float32,
        shape=codes.shape,
        metadata_props={TYPE_KEY: kind},
    )


class DequantizedWeight(nn.Module):
    """(codes − 0) · scale per filter, in one signed integer type: the smallest that holds the widest filter.

    Grids without a level at zero have codes that are twice as large where the same type still holds them; else code c stands for
    c + 1/2, and half a step is added. Rows of 32 bits are floating-point numbers, put back in their places by an index.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    middle: Tensor | None
    floats: Tensor | None
    order: Tensor | None

    def __init__(self, codes: WeightCodes, parts: QDQParts) -> None:
        super().__init__()
        rows = torch.tensor([b != FLOAT for b in codes.bits])
        between = codes.zero_point % 1 != 0
        doubled = max(b if not between[f] else max(2, b + 1) for f, b in enumerate(codes.bits) if b != FLOAT)
        bits = max(b for b in codes.bits if b != FLOAT)
        middle = None
        if doubled <= 8 and parts.holding(doubled) == parts.holding(bits):
            integers, scale = codes.signed()
        else:
            column = (-1, *[1] * (codes.levels.dim() - 1))
            integers, scale = codes.levels - codes.zero_point.ceil().to(torch.int32).view(column), codes.scale
            middle = torch.where(between, 0.5 * scale, 0.0)[rows].view(column)
        width = parts.use(bits)
        self.kind = f"INT{width}"
        # where folding made a scale negative, the codes take over its sign, if their type has room: some runtimes want scales above 0
        turned = (scale < 0) & (integers.flatten(1).amin(1) > -(2 ** (width - 1)))
        if middle is None:
            integers = torch.where(turned.view(-1, *[1] * (integers.dim() - 1)), -integers, integers)
            scale = torch.where(turned, -scale, scale)
        # 0-bit filters have code 0; a scale of 0 is refused by some runtimes
        kept = {
            "codes": integers[rows].to(torch.int8),
            "scale": torch.where(scale != 0, scale, 1.0)[rows],
            "zero_point": torch.zeros(int(rows.sum()), dtype=torch.int8),
            "middle": middle,
            "floats": None if codes.floats is None else codes.floats[~rows],
            "order": None if codes.floats is None else torch.cat([rows.nonzero(), (~rows).nonzero()]).flatten().argsort(),
        }
        for name, value in kept.items():
            self.register_buffer(name, None if value is None else value.clone())

    def forward(self) -> Tensor:
        weight = _dequantize(self.codes, self.scale, self.zero_point, self.kind, 0)
        if self.middle is not None:
            weight = weight + self.middle
        if self.floats is not None and self.order is not None:
            weight = torch.cat([weight, self.floats]).index_select(0, self.order)
        return weight


class QuantizeDequantize(nn.Module):
    """round(x / scale), between −negative and steps − negative, times scale; for grids without a level at zero of x − shift, plus shift.

    scale, steps  float32 [], or [C] for values per channel of dimension 1

    Codes are unsigned, or signed where `negative` levels are below zero. Where the integer type is wider than the bits, x is clipped first:
    QuantizeLinear saturates at the limits of its type only.
    """

    scale: Tensor
    zero_point: Tensor
    highest: Tensor | None
    lowest: Tensor | None

    def __init__(self, scale: Tensor, steps: Tensor, parts: QDQParts, negative: int = 0, shift: float | None = None) -> None:
        super().__init__()
        width = parts.use(int(steps.amax()).bit_length())
        self.dtype = torch.int8 if negative else torch.uint8
        self.kind = f"INT{width}" if negative else f"UINT{width}"
        self.shift = shift
        self.register_buffer("scale", scale.clone())
        self.register_buffer("zero_point", torch.zeros(scale.shape, dtype=self.dtype))
        clips = bool((steps < 2**width - 1).any())
        edges = (-negative * scale, (steps - negative) * scale)
        self.clip = (float(edges[0]), float(edges[1])) if clips and width == 8 and not scale.dim() else None
        self.register_buffer("lowest", edges[0] if clips and self.clip is None and negative else None)
        self.register_buffer("highest", edges[1] if clips and self.clip is None else None)

    def forward(self, x: Tensor) -> Tensor:
        value = x if self.shift is None else x - self.shift
        if self.clip is not None:
            value = value.clamp(*self.clip)
        if self.highest is not None:
            value = value.minimum(self.highest.view(-1, *[1] * (x.dim() - 2)) if self.highest.dim() else self.highest)
        if self.lowest is not None:
            value = value.maximum(self.lowest)
        codes = ops.symbolic(
            "QuantizeLinear",
            (value, self.scale, self.zero_point),
            {"axis": 1} if self.scale.dim() else {},
            dtype=self.dtype,
            shape=value.shape,
            metadata_props={TYPE_KEY: self.kind},
        )
        y = _dequantize(codes, self.scale, self.zero_point, self.kind, 1)
        return y if self.shift is None else y + self.shift


class OutputQDQ(nn.Module):
    """A rectifier whose values are quantized, per channel; relu(x) for channels of 32 bits."""

    through: Tensor | None

    def __init__(self, codes: OutputCodes, parts: QDQParts) -> None:
        super().__init__()
        self.limit = codes.limit
        through = codes.steps == 0
        self.register_buffer("through", through if through.any() else None)
        self.rounded: nn.Module | None = None
        if not through.all():
            scale, steps = torch.where(through, 1.0, codes.scale), torch.where(through, codes.steps.amax(), codes.steps)
            alike = (scale == scale[0]).all() and (steps == steps[0]).all()
            self.rounded = QuantizeDequantize(scale[0] if alike else scale, steps[0] if alike else steps, parts)

    def forward(self, x: Tensor) -> Tensor:
        value = (x if self.limit is None else x.clamp(max=self.limit)).relu()
        if self.rounded is None:
            return value
        y: Tensor = self.rounded(value)
        return y if self.through is None else torch.where(self.through.view(-1, *[1] * (x.dim() - 2)), value, y)

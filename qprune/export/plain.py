"""A converted network as plain torch operations.

program = torch.export.export(deployable(final), (x,))   # loads and runs where qprune is not installed
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qprune.export.copies import FixedLayer, deployed
from qprune.export.quantiles import Quantiles
from qprune.nn.activation import QuantActivation
from qprune.nn.codebook import CodebookLayer
from qprune.quantizers import InputQuantizer, OutputQuantizer
from qprune.space import FLOAT, PRUNED


def deployable(model: nn.Module) -> nn.Module:
    """A copy of a converted model made of plain torch operations, on the CPU in eval mode: weights are rounded already, activations are
    rounded by torch.round. It computes what the model computes, and what torch.export makes of it runs without qprune.

    Raises ExportError for a model that is still being searched.
    """
    return deployed(model, PlainParts())


class PlainParts:
    """Weights as the numbers that they are rounded to, activations by torch's operations."""

    def weight(self, layer: FixedLayer) -> nn.Module:
        return Constant(final_weight(layer))

    def input(self, quantizer: InputQuantizer) -> nn.Module:
        if quantizer.bits == (FLOAT,):
            return nn.Identity()
        return Zero() if quantizer.bits == (PRUNED,) else Rounded(quantizer)

    def activation(self, activation: QuantActivation, name: str) -> nn.Module:
        return plain_activation(activation)


def final_weight(layer: FixedLayer) -> Tensor:
    """The numbers that the layer computes with, in the weight's dtype."""
    if isinstance(layer, CodebookLayer):
        return layer.shared_weight().detach().clone()
    return layer.weight_quantizer.eval()(layer.weight, layer.one_hot).detach().clone()


class Constant(nn.Module):
    """Gives its buffer `value`."""

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)

    def forward(self) -> Tensor:
        return self.value


class Zero(nn.Module):
    """An input of 0 bits."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


class Rounded(nn.Module):
    """offset + round(clamp((x − offset) / r, 0, 1) · n) · r / n, with the roundings of kernels/reference.py."""

    offset: Tensor
    inverse: Tensor
    step: Tensor

    def __init__(self, quantizer: InputQuantizer) -> None:
        super().__init__()
        r = quantizer.learned_range()
        self.steps = quantizer.steps[0]
        self.register_buffer("offset", quantizer.offsets(r).reshape(()).float().clone())
        self.register_buffer("inverse", (1.0 / r).reshape(()))
        self.register_buffer("step", (r / self.steps).reshape(()))

    def forward(self, x: Tensor) -> Tensor:
        value = x if x.dtype == torch.float64 else x.float()
        level = torch.round(((value - self.offset) * self.inverse).clamp(0, 1) * self.steps)
        return (self.offset + level * self.step).to(x.dtype)


def plain_activation(activation: QuantActivation) -> nn.Module:
    """What computes a QuantActivation by torch's operations."""
    return Quantiles(activation) if activation.quantizer.kind == "uniq" else Rectified(activation)


class Rectified(nn.Module):
    """round(min(relu(x), c) / c · n) · c / n with n and c per channel; relu(x) for channels of 32 bits."""

    inverse: Tensor
    step: Tensor
    steps: Tensor
    through: Tensor | None

    def __init__(self, activation: QuantActivation) -> None:
        super().__init__()
        column = activation.one_hot.argmax(1)
        self.limit = activation.limit
        quantizer: OutputQuantizer = activation.quantizer
        through = torch.tensor([b == FLOAT for b in quantizer.bits])[column]
        steps = torch.tensor(quantizer.steps)[column].masked_fill(through, 1.0)
        clip = quantizer.learned_range().expand(1, len(quantizer.bits))[0, column].masked_fill(through, 1.0)
        self.register_buffer("steps", steps)
        self.register_buffer("inverse", 1.0 / clip)
        self.register_buffer("step", clip / steps)
        self.register_buffer("through", through if through.any() else None)

    def forward(self, x: Tensor) -> Tensor:
        value = x if x.dtype == torch.float64 else x.float()
        value = (value if self.limit is None else value.clamp(max=self.limit)).relu()
        shape = (-1, *[1] * (x.dim() - 2))
        steps = self.steps.view(shape)
        rounded = torch.round((value * self.inverse.view(shape)).clamp(0, 1) * steps) * self.step.view(shape)
        if self.through is not None:
            rounded = torch.where(self.through.view(shape), value, rounded)
        return rounded.to(x.dtype)

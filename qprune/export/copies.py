"""A converted network as others run it: a copy without qprune's layers, in which weights and activations are made by parts of one's choice.

program = torch.export.export(deployable(final), (x,))   # plain torch operations: loads where qprune is not installed
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qprune.errors import ExportError
from qprune.nn.activation import QuantActivation
from qprune.nn.codebook import CodebookLayer
from qprune.nn.filterwise import FilterConv2d
from qprune.nn.mixed import MixedActivation
from qprune.nn.mixing import Mixing
from qprune.nn.quantizing import Quantizing
from qprune.nn.slimlayers import SlimBatchNorm2d, SlimConv2d, SlimLinear
from qprune.nn.spread import Narrow
from qprune.nn.surgery import copy_model, plain, replace_modules, take_over
from qprune.nn.unitparts import FilterActivation, FilterBatchNorm2d
from qprune.quantizers import InputQuantizer
from qprune.space import FLOAT
from qprune.wrappers import unwrap

FixedLayer = Quantizing | CodebookLayer
_UNDECIDED = (Mixing, FilterConv2d, FilterBatchNorm2d, FilterActivation, SlimConv2d, SlimLinear, SlimBatchNorm2d)


class Parts(Protocol):
    """Makes the modules of a copy: of a weight (without arguments), of an activation (x [N, …] to its quantized values)."""

    def weight(self, layer: FixedLayer) -> nn.Module: ...

    def input(self, quantizer: InputQuantizer) -> nn.Module: ...

    def activation(self, activation: QuantActivation, name: str) -> nn.Module: ...


class DeployedConv2d(Narrow, nn.Conv2d):
    """nn.Conv2d on input(x) and weight(), which are modules here."""

    input: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        weight: nn.Module = self.get_submodule("weight")
        return self.spread_out(self._conv_forward(self.input(self.gathered(input)), weight(), self.bias))


class DeployedLinear(Narrow, nn.Linear):
    """nn.Linear on input(x) and weight(), which are modules here."""

    input: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        weight: nn.Module = self.get_submodule("weight")
        return self.spread_out(F.linear(self.input(self.gathered(input)), weight(), self.bias))


@torch.no_grad()
def deployed(model: nn.Module, parts: Parts) -> nn.Module:
    """A copy of a converted (or float) model on the CPU, in eval mode, without gradients, whose layers are made of `parts`.

    Raises ExportError for a model that is still being searched, and what the parts raise for layers that they cannot express.
    """
    copy = copy_model(unwrap(model)).cpu().eval().requires_grad_(False)
    swaps: dict[nn.Module, nn.Module] = {}
    for name, module in copy.named_modules():
        undecided = isinstance(module, _UNDECIDED) or (isinstance(module, MixedActivation) and len(module.quantizer.bits) > 1)
        if undecided:
            raise ExportError(f"export: layer {name!r} ({type(module).__name__}) still has candidates; convert(model, policy) first")
        if isinstance(module, Quantizing | CodebookLayer):
            module.layer_name = module.layer_name or name
            swaps[module] = _layer(module, parts)
        elif isinstance(module, QuantActivation):
            swaps[module] = parts.activation(module, name)
        elif isinstance(module, MixedActivation):
            swaps[module] = parts.input(module.quantizer)
    for made in swaps.values():
        made.eval()
    return replace_modules(copy, swaps)


def _layer(layer: FixedLayer, parts: Parts) -> nn.Module:
    cls: type[DeployedConv2d] | type[DeployedLinear] = DeployedConv2d if isinstance(layer, nn.Conv2d) else DeployedLinear

    def setup(made: DeployedConv2d | DeployedLinear) -> None:
        made.surround(getattr(layer, "gather", None), getattr(layer, "spread", None))
        made._parameters.pop("weight", None)
        made.add_module("weight", parts.weight(layer))
        quantizer: InputQuantizer | None = layer.input_quantizer
        made.add_module("input", nn.Identity() if quantizer is None or layer.a_bits == FLOAT else parts.input(quantizer))

    return take_over(cls, plain(layer), setup)

"""Gradual quantization, one layer per stage (Zur et al., 1904.09872; the schedule is that of NICE, 1810.00162).

With L layers in network order, stage s = 0 … L trains with

    layers < s    weights quantized, activations clamped and rounded
    layer  = s    weights noisy (a mixture of noise and quantization), activations clamped only
    layers > s    weights float, activations clamped only

Evaluation quantizes everything at every stage. All weights and normalisations train at all stages. At stage L every layer is quantized.

From the original: the schedule, and L + 2 weight epochs, one per stage and one more when everything is quantized. Ours: the order of
layers is found from the network (see `network_order`), and layers outside the schedule, such as a classifier with fixed bits, are quantized
throughout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from qprune.cost import geometry_of
from qprune.errors import CheckpointError, InputError
from qprune.geometry import Geometry
from qprune.nn.filterwise import FilterConv2d
from qprune.nn.quantizing import Quantizing
from qprune.quantizers import OutputQuantizer
from qprune.wrappers import unwrap


def network_order(geometry: Geometry, names: Sequence[str]) -> list[str]:
    """`names` by depth: a layer comes behind the one whose activation it reads, so that the shortcut of a block comes before the block's
    second convolution, whichever is called first. Layers of one depth keep the order of their first use; a layer that reads no unit's
    activation comes behind the layer used before it.
    """
    depth: dict[str, int] = {}
    last = -1
    for name in geometry.layers:
        unit = geometry.units.get(name)
        source = None if unit is None else unit.source
        depth[name] = last = depth[source] + 1 if source in depth else last + 1
    return sorted(names, key=lambda name: depth[name])


class Stages:
    """The stages of a model that is being searched, or that was converted: sets `stage` on the quantizers of its units.

    model  prepared with placement="output", or what `convert` made of it; its geometry must be known. len(stages) = L + 1

    Starts at stage L: everything quantized. Raises InputError for a model without units.
    """

    def __init__(self, model: nn.Module) -> None:
        inner = unwrap(model)
        geometry = geometry_of(inner)
        modules = dict(inner.named_modules())
        units = [name for name in geometry.units if isinstance(modules.get(name), FilterConv2d | Quantizing) and name in geometry.layers]
        convolutions = [name for name in units if geometry.layers[name].kind != "Linear"]
        self.layers = network_order(geometry, convolutions)
        if not self.layers:
            raise InputError(
                "gradual quantization needs layers prepared with placement='output' (or converted from such a model); found none"
            )
        activations = [modules.get(geometry.units[name].activation or "") for name in self.layers]
        self._weights = [_stageable(modules[name].weight_quantizer) for name in self.layers]
        self._activations = [_stageable(module, OutputQuantizer) if module is not None else [] for module in activations]
        self.stage = len(self.layers)
        self.set(self.stage)

    def __len__(self) -> int:
        return len(self.layers) + 1

    @property
    def epochs(self) -> list[int]:
        """The stage of every weight epoch, L + 2 of them: 0 … L, and L once more."""
        return [*range(len(self)), len(self) - 1]

    def set(self, stage: int) -> None:
        """Go to a stage; L is everything quantized. Raises InputError outside 0 … L."""
        if not 0 <= stage < len(self):
            raise InputError(f"stage: expected 0 to {len(self) - 1} for {len(self) - 1} layers, got {stage}")
        self.stage = stage
        for number, (weights, activations) in enumerate(zip(self._weights, self._activations, strict=True)):
            for quantizer in weights:
                quantizer.stage = "quantized" if number < stage else "noisy" if number == stage else "float"
            for quantizer in activations:
                quantizer.stage = "quantized" if number < stage else "clamped"

    def renew(self, generator: torch.Generator) -> None:
        """New noise for the layer that is noisy; with the same generator state every rank draws the same."""
        if self.stage < len(self.layers):
            for quantizer in self._weights[self.stage]:
                quantizer.renew(generator)

    def state_dict(self) -> dict[str, Any]:
        return {"stage": self.stage, "layers": list(self.layers)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises CheckpointError for the state of another network."""
        if list(state["layers"]) != self.layers:
            raise CheckpointError(f"the stages are those of another network: layers {list(state['layers'])}, here they are {self.layers}")
        self.set(state["stage"])


def _stageable(module: nn.Module, kind: type[nn.Module] = nn.Module) -> list[Any]:
    return [part for part in module.modules() if isinstance(part, kind) and hasattr(part, "stage")]

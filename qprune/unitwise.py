"""Swapping whole units: the convolution, its BatchNorm2d and its rectifier become the layers of qprune.nn.filterwise."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from qprune.errors import UnsupportedLayerError
from qprune.geometry import Unit
from qprune.nn.filterwise import FilterConv2d
from qprune.nn.surgery import plain
from qprune.nn.unitparts import FilterActivation, FilterBatchNorm2d
from qprune.space import FLOAT, IMAGE_BITS, SearchSpace
from qprune.units import RECTIFIERS

Spaces = Mapping[str, SearchSpace | None]


def in_units(space: SearchSpace | None) -> bool:
    return space is not None and space.placement == "output"


def unit_spaces(modules: Mapping[str, nn.Module], spaces: Spaces, default: SearchSpace) -> dict[str, SearchSpace]:
    """The spaces of the convolutions that become units: those with placement "output", and, beside them, those with fixed bits.

    The latter keep their weight bits; the bits of their activation are chosen as everywhere, since its readers do not quantize it.
    """
    output = [space for space in (default, *spaces.values()) if space is not None and in_units(space)]
    found: dict[str, SearchSpace] = {}
    for name, space in spaces.items():
        if space is None or not isinstance(modules[name], nn.Conv2d):
            continue
        if in_units(space):
            found[name] = space
        elif space.is_fixed:
            ((w, _),) = space.candidates
            found[name] = SearchSpace(
                pairs=tuple((w, a) for a in output[0].a_bits),
                granularity=output[0].granularity,
                weight_quantizer=space.weight_quantizer,
                input_quantizer=output[0].input_quantizer,
                scales=space.scales,
                placement="output",
                shared_weights=output[0].shared_weights,
            )
    return found


def input_bits(name: str, spaces: Spaces, unit_names: Mapping[str, SearchSpace], units: Mapping[str, Unit]) -> int:
    """Bits at which a unit quantizes its own input: 32 where another unit has quantized it, else 8, or what its rule of fixed bits says."""
    source = units.get(name, Unit()).source
    if source is not None and source in unit_names and units[source].activation is not None:
        return FLOAT
    space = spaces[name]
    return IMAGE_BITS if space is None or in_units(space) else space.candidates[0][1]


def unit_swaps(
    modules: Mapping[str, nn.Module], spaces: Spaces, unit_names: Mapping[str, SearchSpace], units: Mapping[str, Unit]
) -> dict[nn.Module, nn.Module]:
    """Old → new module for every part of every unit; units that are what they shall be already are left out."""
    swaps: dict[nn.Module, nn.Module] = {}
    for name, space in unit_names.items():
        unit, bits = units.get(name, Unit()), input_bits(name, spaces, unit_names, units)
        conv = modules[name]
        if isinstance(conv, FilterConv2d) and (conv.space, conv.produces, conv.input_bits) == (space, unit.activation is not None, bits):
            continue
        swaps.update(_swap(name, space, unit, bits, modules))
    return swaps


def _swap(name: str, space: SearchSpace, unit: Unit, bits: int, modules: Mapping[str, nn.Module]) -> dict[nn.Module, nn.Module]:
    old = modules[name]
    conv = plain(old)
    assert isinstance(conv, nn.Conv2d)
    layer = FilterConv2d.from_float(conv, space, unit.activation is not None, bits, unit.norm is None and unit.activation is None)
    swaps: dict[nn.Module, nn.Module] = {old: layer}
    if unit.norm is not None:
        norm = plain(modules[unit.norm])
        if type(norm) is not nn.BatchNorm2d:
            raise UnsupportedLayerError(
                f"layer {name}: {unit.norm} is a {type(norm).__name__} with code of its own; expected nn.BatchNorm2d"
            )
        swaps[modules[unit.norm]] = FilterBatchNorm2d.from_float(
            norm, layer.gate, len(layer.candidates), layer.own, unit.activation is None
        )
    if unit.activation is not None:
        rectifier = plain(modules[unit.activation])
        if type(rectifier) not in RECTIFIERS:
            raise UnsupportedLayerError(f"layer {name}: {unit.activation} is a {type(rectifier).__name__}; expected nn.ReLU or nn.ReLU6")
        a_bits = tuple(a for _, a in layer.candidates)
        device = layer.weight.device
        swaps[modules[unit.activation]] = FilterActivation.from_float(
            rectifier, layer.gate, space.input_quantizer, a_bits, layer.own, device
        )
    return swaps


def left_units(modules: Mapping[str, nn.Module], unit_names: Mapping[str, SearchSpace]) -> dict[nn.Module, nn.Module]:
    """Old → plain module for the parts of units that are none any more."""
    gone = {m.gate for name, m in modules.items() if isinstance(m, FilterConv2d) and name not in unit_names}
    return {m: plain(m) for m in modules.values() if isinstance(m, FilterBatchNorm2d | FilterActivation) and m.gate in gone}

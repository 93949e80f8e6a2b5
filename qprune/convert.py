"""Mixed model + policy → the network with fixed bits."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from qprune.errors import InputError, PolicyMismatchError
from qprune.gates import FilterGate
from qprune.geometry import Geometry, Unit, describe, weighted_layers
from qprune.nn.activation import fix_activation
from qprune.nn.filterwise import FilterConv2d
from qprune.nn.mixing import Mixing
from qprune.nn.quant import fix_bits
from qprune.nn.surgery import copy_model, plain, replace_modules
from qprune.policy import LayerBits, Policy
from qprune.record import Record, Removal, attach, record_of
from qprune.removal import apply_removal, describe_removal
from qprune.removal_plan import smaller
from qprune.space import PRUNED, SearchSpace
from qprune.wrappers import unwrap

log = logging.getLogger("qprune")


def convert(
    model: nn.Module,
    policy: Policy,
    space: SearchSpace | Mapping[str, SearchSpace] | None = None,
    remove: bool = True,
    round_to: int = 1,
) -> nn.Module:
    """A copy of the model with the policy's bits: QuantConv2d and QuantLinear for layers it names, plain torch layers for the rest.

    model     prepared: ranges that were learned for the chosen bits are kept; or float: ranges start from the weights
    space     names the quantizers of a float model's layers, for all or by layer name (default SearchSpace())
    remove    whether filters at 0 bits are taken out of the network, with all that depends on them; else they stay as zeros. What the
              network computes is the same. See `removal_report` for what could not be taken out
    round_to  the numbers of channels that removal leaves are multiples of this where they can be: some filters at 0 bits then stay, as
              zeros, and cost what the others of their layer cost at least

    Where the policy has out_bits, QuantActivation takes the place of the rectifier. Of units, only what was chosen remains: weight,
    normalisation and clips. Filters at 0 bits are gone: weight and bias are zero, and so are scale, shift and running mean of the
    normalisation behind them; what reads their channels does not see them. Which modules these are is known from `prepare` with
    example_inputs, or from the policy; without, nothing is removed and only weight and bias are zero.

    Raises PolicyMismatchError for a policy of another network, for bits that were not candidates, and where a layer would lose all its
    filters without a residual path around it; InputError for a round_to below 1.
    """
    return converted(model, policy, space, remove, round_to)


def converted(
    model: nn.Module,
    policy: Policy,
    space: SearchSpace | Mapping[str, SearchSpace] | None,
    remove: bool | None,
    round_to: int = 1,
) -> nn.Module:
    """`convert`; with remove=None filters at 0 bits have zero weight and nothing else changes, as in files of format 1."""
    if not isinstance(round_to, int) or round_to < 1:
        raise InputError(f"convert: round_to must be a whole number from 1, got {round_to!r}")
    record = record_of(model)
    geometry = record.geometry if record is not None else None
    if geometry is not None:
        policy.check(geometry)
        check_survivors(policy, geometry)
    final = copy_model(unwrap(model))
    layers = dict(weighted_layers(final))
    for name in policy.layers:
        if name not in layers:
            raise PolicyMismatchError(f"the policy names layer {name!r}, which this network does not have")
    if geometry is None and policy.geometry is not None:
        _check_layers(layers, policy.geometry)
        check_survivors(policy, policy.geometry)
        record = Record(policy.geometry)
    default = SearchSpace()
    units = record.geometry.units if record is not None and record.geometry is not None else {}
    modules = dict(final.named_modules())
    swaps: dict[nn.Module, nn.Module] = {}
    for name, layer in layers.items():
        unit = units.get(name, Unit())
        behind = _behind(name, unit, modules)
        chosen = policy.layers.get(name)
        if isinstance(layer, FilterConv2d) and isinstance(layer.gate, FilterGate) and chosen is not None:
            layer.gate.choice.copy_(layer.choice_for(chosen.w_bits, chosen.out_bits))
        swaps |= {module: plain(module) for module in (layer, *behind)}
        if chosen is None:
            continue
        quantizers = space.get(name, default) if isinstance(space, Mapping) else space or default
        swaps[layer] = _fix(name, layer, chosen, quantizers)
        if chosen.out_bits is not None:
            if record is None or record.geometry is None or unit.activation is None:
                raise PolicyMismatchError(f"layer {name}: the policy has out_bits, but no activation is known that this layer produces")
            w_bits = chosen.per_filter(record.geometry.layers[name].filters)
            swaps[behind[-1]] = fix_activation(behind[-1], layer, chosen.out_bits, w_bits, quantizers)
    final = replace_modules(final, {old: new for old, new in swaps.items() if old is not new})
    pruned = policy.pruned()
    if record is not None and record.geometry is not None and pruned and remove is not None:
        return without_pruned(final, record, Policy(policy.layers, record.geometry), remove, round_to)
    if pruned and remove:
        log.warning(
            "qprune: filters at 0 bits stay as zeros in %s: the network's channels are unknown; give prepare example_inputs",
            ", ".join(pruned),
        )
    if record is not None:
        attach(final, record)
    return final


def _behind(name: str, unit: Unit, modules: Mapping[str, nn.Module]) -> list[nn.Module]:
    """The modules of a unit behind its layer."""
    parts = [part for part in (unit.norm, unit.activation) if part is not None]
    strange = next((part for part in parts if part not in modules), None)
    if strange is not None:
        raise PolicyMismatchError(f"the policy has {strange!r} behind layer {name!r}, which this network does not have")
    return [modules[part] for part in parts]


def without_pruned(final: nn.Module, record: Record, policy: Policy, remove: bool = True, round_to: int = 1) -> nn.Module:
    """A network with fixed bits, changed in place, of which the filters at 0 bits are taken out, or silenced; it notes that."""
    geometry = record.geometry
    assert geometry is not None
    pruned = {
        name: [f for f, b in enumerate(policy.bits(name).per_filter(geometry.layers[name].filters)) if b == PRUNED]
        for name in policy.pruned()
    }
    final, plan = apply_removal(final, geometry, pruned, remove, round_to)
    lost = describe_removal(geometry, plan) if remove else ()
    kept = [layer for layer in lost if layer.why]
    if kept:
        log.info("qprune: pruned filters whose channels remain: %s", "; ".join(f"{layer.name} ({layer.why})" for layer in kept))
    attach(
        final, replace(record, geometry=smaller(geometry, plan) if remove else geometry, removal=Removal(policy, remove, round_to, lost))
    )
    return final


def _fix(name: str, layer: nn.Module, bits: LayerBits, space: SearchSpace) -> nn.Module:
    if not isinstance(layer, nn.Conv2d | nn.Linear):
        raise PolicyMismatchError(f"layer {name}: {type(layer).__name__} cannot be quantized, but the policy gives it bits")
    filters = layer.out_channels if isinstance(layer, nn.Conv2d) else layer.weight.size(0)
    per_filter = bits.per_filter(filters)
    if len(per_filter) != filters:
        raise PolicyMismatchError(f"layer {name}: the policy has w_bits for {len(per_filter)} filters, the layer has {filters}")
    if isinstance(layer, Mixing):
        missing = set(per_filter) - set(layer.space.w_bits) or {bits.a_bits} - set(layer.space.a_bits)
        if missing:
            raise PolicyMismatchError(
                f"layer {name}: {missing.pop()} bits is not a candidate; it has w_bits {layer.space.w_bits}, a_bits {layer.space.a_bits}"
            )
    fixed = fix_bits(layer, bits.w_bits, bits.a_bits, space)
    fixed.layer_name = name
    with torch.no_grad():
        pruned = [f for f, b in enumerate(per_filter) if b == PRUNED]
        fixed.weight[pruned] = 0
        if fixed.bias is not None:
            fixed.bias[pruned] = 0
    return fixed


def _check_layers(layers: Mapping[str, nn.Module], geometry: Geometry) -> None:
    """Raise PolicyMismatchError unless the layers have the shapes of `geometry`."""
    for name, layer in geometry.layers.items():
        if name not in layers:
            raise PolicyMismatchError(f"the policy was made for another network: one with a layer {name!r}")
        here = describe(name, layers[name], layer.positions)
        if here != layer:
            raise PolicyMismatchError(f"the policy was made for another network: layer {name} was {layer}, here it is {here}")


def check_survivors(policy: Policy, geometry: Geometry) -> None:
    """Raise PolicyMismatchError if a layer passes nothing on (all filters, or its input, at 0 bits) and nothing passes around it."""
    for name in policy.layers:
        if name in geometry.layers and not has_bypass(geometry, name) and not _alive(policy, geometry, name):
            raise PolicyMismatchError(
                f"layer {name}: all its filters are at 0 bits and no residual path carries the signal around it; keep at least one filter"
            )


def survives(layers: Mapping[str, LayerBits], geometry: Geometry) -> bool:
    """True if `check_survivors` passes."""
    policy = Policy(layers)
    return all(_alive(policy, geometry, name) or has_bypass(geometry, name) for name in layers if name in geometry.layers)


def _alive(policy: Policy, geometry: Geometry, name: str) -> bool:
    """True if a filter has bits, and the input too; for a depthwise layer, a filter whose own input channel somebody produces."""
    if policy.bits(name).a_bits == PRUNED:
        return False
    alive = [b != PRUNED for b in policy.bits(name).per_filter(geometry.layers[name].filters)]
    if geometry.layers[name].depthwise:
        per_channel = len(alive) // geometry.layers[name].groups
        for group in (group for group in geometry.groups if name in group.consumers):
            sources = [policy.bits(other).per_filter(geometry.layers[other].filters) for other in group.producers]
            gone = {r for r in range(group.size) if all(bits[f[r]] == PRUNED for bits, f in zip(sources, group.producers.values()))}
            dead = {i for i, r in group.consumers[name] if r in gone}
            alive = [there and f // per_channel not in dead for f, there in enumerate(alive)]
    return any(alive)


def has_bypass(geometry: Geometry, name: str) -> bool:
    """True if every channel of the layer's output has another source that comes first: the residual path that it is added to.

    The first layer of a residual stage has none, and a depthwise layer in series passes on what came in, or nothing.
    """
    order = list(geometry.layers)
    earlier = {other for other in order[: order.index(name)] if not geometry.layers[other].depthwise}
    mine = [group for group in geometry.groups if name in group.producers]
    groups = [group for group in mine if group.consumers or not any(group.producers.keys() < other.producers.keys() for other in mine)]
    return bool(groups) and not geometry.layers[name].depthwise and all(earlier & group.producers.keys() for group in groups)

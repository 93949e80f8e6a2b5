"""Taking pruned filters out of a network: the layers, and everything that depends on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from qprune.errors import PolicyMismatchError
from qprune.geometry import Geometry
from qprune.nn.activation import QuantActivation
from qprune.nn.narrow import entries_of, mute, narrowed, narrowed_activation, silence_entries, sliceable, without_entries
from qprune.nn.surgery import replace_modules
from qprune.record import LayerRemoval, record_of
from qprune.removal_plan import Plan, plan_removal


def removal_report(model: nn.Module) -> tuple[LayerRemoval, ...]:
    """What every layer of a converted model lost with its pruned filters, and for those that could not be removed the reason: one entry per
    layer that lost something (see LayerRemoval). Empty for a model without pruned filters, and for one that keeps them as zeros
    (`convert` with remove=False, or of a network that was not traced)."""
    record = record_of(model)
    return () if record is None or record.removal is None else record.removal.layers


def apply_removal(
    model: nn.Module, geometry: Geometry, pruned: Mapping[str, Sequence[int]], remove: bool = True, round_to: int = 1
) -> tuple[nn.Module, Plan]:
    """The model, changed in place, in which the filters `pruned` say nothing, and (remove) are taken out; with the plan of it.

    What says nothing: weight and bias of the filters are zero, and scale, shift and running mean of the normalisation that gets their
    output; layers that read a channel which nobody makes have zero weights there. Raises PolicyMismatchError if the model lacks one of
    these modules.
    """
    plan = plan_removal(geometry, pruned, remove, round_to)
    modules = dict(model.named_modules())
    swaps: dict[nn.Module, nn.Module] = {}
    for name, left in plan.layers.items():
        layer = modules.get(name)
        if layer is not None and sliceable(layer):
            assert isinstance(layer, nn.Conv2d | nn.Linear)
            mute(layer, left)
            swaps[layer] = narrowed(layer, left)
    for name, carrier in plan.carriers.items():
        known, needed = entries_of(modules[name]) if name in modules else 0, max((*carrier.silent, *carrier.absent)) + 1
        if known < needed:
            here = f"a {type(modules[name]).__name__} of {known}" if known else "none"
            raise PolicyMismatchError(
                f"the policy was made for another network: in that, {name!r} was a normalisation or nn.PReLU of {needed} channels or more, "
                f"here it is {here}"
            )
        silence_entries(modules[name], carrier.silent)
        without_entries(modules[name], carrier.absent)
    for name, unit in geometry.units.items():
        activation = modules.get(unit.activation or "")
        if isinstance(activation, QuantActivation) and name in plan.layers:
            swaps[activation] = narrowed_activation(activation, plan.layers[name].outputs)
    return replace_modules(model, {old: new for old, new in swaps.items() if old is not new}), plan


def describe_removal(geometry: Geometry, plan: Plan) -> tuple[LayerRemoval, ...]:
    """One LayerRemoval per layer that lost something."""
    rows = []
    for name, left in plan.layers.items():
        layer = geometry.layers[name]
        removed = layer.filters - len(left.outputs)
        spread = len(set(left.outputs) - set(left.rows))
        if not left.silent and len(left.columns) == layer.channels and len(left.rows) == layer.filters:
            continue
        why = _why(name, geometry, left.fillers, spread, 1 < layer.groups != layer.filters)
        rows.append(
            LayerRemoval(name, layer.filters, layer.channels, len(left.rows), len(left.columns), removed, spread, len(left.fillers), why)
        )
    return tuple(rows)


def _why(name: str, geometry: Geometry, fillers: Sequence[int], spread: int, grouped: bool) -> str:
    reasons: list[str] = []
    if spread:
        groups = [group for group in geometry.groups if name in group.producers]
        known = next((group.why for group in groups if group.why), "")
        if known:
            reasons.append(known)
        elif not groups or not any(group.removable for group in groups):
            reasons.append("what reads its channels is not known")
        else:
            others = sorted({other for group in groups for other in group.producers} - {name})
            reasons.append(f"other filters write to the same channels: {', '.join(others)}" if others else "nothing is known to read them")
    if fillers:
        reasons.append("the groups of a convolution have equal numbers of filters" if grouped else "round_to keeps a multiple")
    return "; ".join(reasons)

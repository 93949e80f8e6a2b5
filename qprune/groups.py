"""Which channels must be pruned together: torch-pruning's dependency graph of the float network, reduced to names and indices."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from qprune.geometry import ChannelGroup, ExampleInputs, float_twin, run, weighted_layers
from qprune.nn.narrow import entries_of, sliceable
from qprune.probe import Probe, confirmed
from qprune.rehearsal import rehearsed
from qprune.wrappers import unwrap

log = logging.getLogger("qprune")


def channel_groups(model: nn.Module, example_inputs: ExampleInputs) -> tuple[ChannelGroup, ...]:
    """The channel groups of a network (see ChannelGroup), or none, with one log line, where it cannot be traced.

    The graph follows gradients through one call with example_inputs on a float copy with every parameter trainable: a frozen parameter
    would hide its layer. What it claims is then checked with gradients (see qprune.probe); channels whose way to a consumer is ambiguous
    are left out, so that no cost counts them as removable. What is left is pruned at random on a copy, to see which channels can be taken
    out of the network (see qprune.rehearsal).
    """
    import torch_pruning

    twin = float_twin(unwrap(model)).eval().requires_grad_(True)
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            # parameters that are no module's, like a scale per channel: what pruning does to them is tried below
            warnings.filterwarnings("ignore", "Unwrapped parameters", UserWarning)
            graph = torch_pruning.DependencyGraph().build_dependency(twin, example_inputs, forward_fn=run)
            groups = _collect(twin, graph)
            carriers = {name for group in groups for name in group.carriers}
            groups = confirmed(groups, Probe(twin, example_inputs, carriers))
    except Exception as error:  # whatever an unknown network makes the tracer raise, search goes on without groups
        log.warning("qprune: no channel groups (%s: %s); pruned filters save their own cost only", type(error).__name__, error)
        return ()
    try:
        return rehearsed(groups, twin, example_inputs)
    except Exception as error:  # the same
        why = f"removing channels could not be tried ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
        return tuple(replace(group, why=why) for group in groups)


def _collect(twin: nn.Module, graph: Any) -> tuple[ChannelGroup, ...]:
    layers: dict[nn.Module, str] = {module: name for name, module in weighted_layers(twin) if isinstance(module, nn.Conv2d | nn.Linear)}
    carriers = {module: name for name, module in twin.named_modules() if entries_of(module)}
    groups: list[ChannelGroup] = []
    grouped: set[str] = set()
    for module, name in layers.items():
        if name in grouped:
            continue
        try:
            handler = graph.get_pruner_of_module(module).prune_out_channels
            items = graph.get_pruning_group(module, handler, list(range(len(module.get_parameter("weight")))))
        except (KeyError, AttributeError, ValueError):
            continue
        group = _one_group(items, layers, carriers)
        grouped.update(group.producers)
        groups.append(group)
    return _without_conflicts(groups)


def _one_group(items: Any, layers: dict[nn.Module, str], on_the_way: dict[nn.Module, str]) -> ChannelGroup:
    producers: dict[str, dict[int, int]] = {}
    consumers: dict[str, set[tuple[int, int]]] = {}
    carriers: dict[str, set[tuple[int, int]]] = {}
    for item in items:
        module = item.dep.target.module
        name = layers.get(module, on_the_way.get(module, ""))
        if not name and module not in layers and module not in on_the_way:
            continue
        pairs = [(int(i), int(r)) for i, r in zip(item.idxs, item.root_idxs, strict=True) if r is not None]
        if module in on_the_way:
            carriers.setdefault(name, set()).update(pairs)
        elif item.dep.handler.__name__ == "prune_in_channels":
            consumers.setdefault(name, set()).update(pairs)
        else:
            layer = item.dep.target.module
            pairs = [(i, r) for i, r in pairs if i < len(layer.weight)]  # some grouped convolutions pass for depthwise ones
            producers.setdefault(name, {}).update({r: i for i, r in pairs})
            if getattr(layer, "groups", 1) == layer.weight.size(0) > 1 and layer.weight.size(1) == 1:
                consumers.setdefault(name, set()).update(pairs)
    size = max(len(filters) for filters in producers.values())
    complete = {name: tuple(filters[r] for r in range(size)) for name, filters in producers.items() if len(filters) == size}
    if len(complete) < len(producers):
        return ChannelGroup(size, complete, {})
    readable = {name for module, name in layers.items() if sliceable(module)}
    return ChannelGroup(
        size,
        complete,
        {name: tuple(sorted(pairs)) for name, pairs in consumers.items() if name in readable},
        {name: tuple(sorted(pairs)) for name, pairs in carriers.items()},
    )


def _without_conflicts(groups: list[ChannelGroup]) -> tuple[ChannelGroup, ...]:
    """Drop a consumer or carrier from every group if one of its channels is claimed twice: the tracer did not follow that path exactly."""
    ambiguous = _claimed_twice(group.consumers for group in groups), _claimed_twice(group.carriers for group in groups)
    return tuple(
        replace(
            group,
            consumers={name: pairs for name, pairs in group.consumers.items() if name not in ambiguous[0]},
            carriers={name: pairs for name, pairs in group.carriers.items() if name not in ambiguous[1]},
        )
        for group in groups
    )


def _claimed_twice(claims: Iterable[dict[str, tuple[tuple[int, int], ...]]]) -> set[str]:
    seen: dict[str, dict[int, tuple[int, int]]] = {}
    ambiguous: set[str] = set()
    for number, claim in enumerate(claims):
        for name, pairs in claim.items():
            for i, r in pairs:
                if seen.setdefault(name, {}).setdefault(i, (number, r)) != (number, r):
                    ambiguous.add(name)
    return ambiguous

"""Making pruned filters say nothing: what a normalisation adds to a filter of zero weight is a constant, and it is taken away here."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qprune.errors import PolicyMismatchError
from qprune.geometry import ExampleInputs, Unit
from qprune.policy import Policy
from qprune.record import unwrap
from qprune.units import find_units


@torch.no_grad()
def silence(model: nn.Module, policy: Policy, example_inputs: ExampleInputs) -> nn.Module:
    """A converted model, changed in place, in which the filters at 0 bits of `policy` give zero: weight and bias of the filter, and scale,
    shift and running mean of the BatchNorm2d that gets its output, become 0.

    example_inputs  for one call, from which the normalisations are found

    Behind a rectifier the channel is then zero, and stays so in training, since a rectifier passes no gradient at 0. Raises
    PolicyMismatchError for a layer that the model lacks.
    """
    pruned = policy.pruned()
    if not pruned:
        return model
    modules = dict(unwrap(model).named_modules())
    units = find_units(model, example_inputs)
    for name, filters in pruned.items():
        if name not in modules:
            raise PolicyMismatchError(f"silence: the policy names layer {name!r}, which this network does not have")
        norm = units.get(name, Unit()).norm
        parts: list[tuple[nn.Module, tuple[str, ...]]] = [(modules[name], ("weight", "bias"))]
        if norm is not None:
            parts.append((modules[norm], ("weight", "bias", "running_mean")))
        for module, names in parts:
            for tensor in (getattr(module, part) for part in names):
                if isinstance(tensor, Tensor):
                    tensor[filters] = 0
    return model

"""What a choice costs: bit operations, multiplications and size, exact for a policy and differentiable for a model that is being
searched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qprune.constants import constant
from qprune.conventions import CONVENTIONS, Convention
from qprune.errors import BudgetError, InputError
from qprune.geometry import ExampleInputs, Geometry, LayerGeometry, trace_geometry, weighted_layers
from qprune.nn.mixing import Mixing
from qprune.nn.quantizing import Quantizing
from qprune.policy import Policy
from qprune.record import record_of, unwrap
from qprune.space import FLOAT, PRUNED


@dataclass(frozen=True)
class Choice:
    """The distribution over (weight bits, activation bits) of one layer: p [F, K_w, K_a], or [1, K_w, K_a] if all filters share it."""

    w_bits: tuple[int, ...]
    a_bits: tuple[int, ...]
    p: Tensor

    def pruned(self) -> Tensor:
        """The probability of 0 bits per filter, [F] or [1]."""
        is_pruned = constant(tuple(float(b == PRUNED) for b in self.w_bits), self.p.dtype, self.p.device)
        return (self.p.sum(2) * is_pruned).sum(1)


FLOAT_CHOICE = Choice((FLOAT,), (FLOAT,), torch.ones(1, 1, 1, dtype=torch.float64))


@dataclass(frozen=True)
class LayerCost:
    """One layer's part of a Cost; w_bits and a_bits are means over filters and candidates."""

    name: str
    bops: Tensor
    macs: Tensor
    size_bits: Tensor
    w_bits: Tensor
    a_bits: Tensor


@dataclass(frozen=True)
class Cost:
    """bops          bit operations per sample, in the convention asked for
    macs          multiplications per sample that remain (pruned filters and channels do none)
    size_bits     bits of all weights that remain; biases, normalisation and scales not counted
    overhead_bits what a file needs besides: 32 bits per scale, and 4 bits per filter where filters differ
    rows          one LayerCost per layer

    Scalars, float64; with gradients to the gates for a model in search mode.
    """

    bops: Tensor
    macs: Tensor
    size_bits: Tensor
    overhead_bits: int
    rows: tuple[LayerCost, ...]


def cost(
    model_or_policy: nn.Module | Policy,
    example_inputs: ExampleInputs | None = None,
    convention: str = "product",
    policy: Policy | None = None,
) -> Cost:
    """The cost of a model (float, prepared or converted), or of a policy.

    example_inputs  needed for a model that was not prepared with them
    convention      "product": MACs · b_w · b_a, float counting 32 (default); "zur" and "uniq": see qprune.conventions
    policy          with a model: the cost that the model would have with this policy (a policy made for a prepared model knows its
                    channel groups; a float model alone does not)

    Multiplications are those of convolutions and linear layers. An input channel is counted as gone when every filter that produces it is
    at 0 bits. Raises InputError if the geometry is unknown, PolicyMismatchError if policy and model do not fit.
    """
    if convention not in CONVENTIONS:
        raise InputError(f"cost: unknown convention {convention!r}; expected one of {', '.join(CONVENTIONS)}")
    if isinstance(model_or_policy, Policy):
        policy, geometry = model_or_policy, model_or_policy.geometry
        if geometry is None:
            raise InputError("cost: this policy does not hold its network's geometry; call cost(model, example_inputs, policy=policy)")
    else:
        geometry = geometry_of(model_or_policy, example_inputs)
    if policy is not None:
        policy.check(geometry)
        if not geometry.groups and policy.geometry is not None:
            geometry = policy.geometry
        return evaluate(geometry, policy_choices(geometry, policy), CONVENTIONS[convention])
    assert isinstance(model_or_policy, nn.Module)
    return evaluate(geometry, model_choices(unwrap(model_or_policy)), CONVENTIONS[convention])


def geometry_of(model: nn.Module, example_inputs: ExampleInputs | None = None) -> Geometry:
    """The geometry that `prepare` recorded, or a fresh trace. Raises InputError if there is neither."""
    record = record_of(model)
    if record is not None and record.geometry is not None and example_inputs is None:
        return record.geometry
    if example_inputs is None:
        raise InputError("the model's geometry is unknown: pass example_inputs here, or to qprune.prepare")
    groups = record.geometry.groups if record is not None and record.geometry is not None else ()
    return Geometry(trace_geometry(unwrap(model), example_inputs), groups)


def model_choices(model: nn.Module) -> dict[str, Choice]:
    """The present distribution of every layer that is not float."""
    choices = {}
    for name, layer in weighted_layers(model):
        if isinstance(layer, Mixing):
            choices[name] = Choice(layer.space.w_bits, layer.space.a_bits, layer.filter_probabilities().double())
        elif isinstance(layer, Quantizing):
            choices[name] = Choice(layer.weight_quantizer.bits, (layer.a_bits,), layer.one_hot.double().unsqueeze(2))
    return choices


def policy_choices(geometry: Geometry, policy: Policy) -> dict[str, Choice]:
    """A policy as one-hot distributions."""
    choices = {}
    for name, bits in policy.layers.items():
        if isinstance(bits.w_bits, int):
            choices[name] = Choice((bits.w_bits,), (bits.a_bits,), torch.ones(1, 1, 1, dtype=torch.float64))
            continue
        distinct = tuple(sorted(set(bits.w_bits)))
        p = torch.tensor([[float(b == d) for d in distinct] for b in bits.w_bits], dtype=torch.float64)
        choices[name] = Choice(distinct, (bits.a_bits,), p.unsqueeze(2))
    return choices


def kept_inputs(geometry: Geometry, pruned: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """For every layer that reads prunable channels: the expected number of input channels that are still there, per convolution group.

    pruned  probability of 0 bits per filter, [F] or [1], of the layers that have that candidate
    """
    kept: dict[str, Tensor] = {}
    for group in geometry.groups:
        if not group.consumers or any(name not in pruned for name in group.producers):
            continue
        gone = torch.ones(())
        for name, filters in group.producers.items():
            p = pruned[name]
            gone = gone * (p[constant(tuple(filters), torch.int64, p.device)] if p.numel() > 1 else p.expand(group.size))
        for name, pairs in group.consumers.items():
            if name in group.producers:
                continue  # a layer that reads itself: its own choice is not independent of what is there
            index, row = (constant(column, torch.int64, gone.device) for column in zip(*pairs, strict=True))
            source = gone[row]
            kept[name] = kept.get(name, source.new_ones(geometry.layers[name].channels)).index_add(0, index, -source)
    return {name: channels.view(geometry.layers[name].groups, -1).sum(1) for name, channels in kept.items()}


def evaluate(geometry: Geometry, choices: Mapping[str, Choice], convention: Convention) -> Cost:
    """The expected cost of independent layer choices: exact for one-hot ones."""
    pruned = {name: choice.pruned() for name, choice in choices.items() if PRUNED in choice.w_bits and name in geometry.layers}
    kept = kept_inputs(geometry, pruned)
    rows = [layer_cost(layer, choices.get(name, FLOAT_CHOICE), kept.get(name), convention) for name, layer in geometry.layers.items()]
    if not rows:
        raise BudgetError("the network has no convolution or linear layer: there is nothing to cost")
    device = next((choice.p.device for choice in choices.values()), FLOAT_CHOICE.p.device)  # layers left float are costed on the CPU
    bops, macs, size = (torch.stack([getattr(row, field).to(device) for row in rows]).sum() for field in ("bops", "macs", "size_bits"))
    overhead = sum(_overhead(geometry.layers[name], choice) for name, choice in choices.items() if name in geometry.layers)
    return Cost(bops, macs, size, overhead, tuple(rows))


def layer_cost(layer: LayerGeometry, choice: Choice, kept: Tensor | None, convention: Convention) -> LayerCost:
    """One layer's expected cost; kept = the input channels that are there, per convolution group (None: all)."""
    p, device = choice.p, choice.p.device
    w = constant(choice.w_bits, torch.float64, device).view(1, -1, 1)
    a = constant(choice.a_bits, torch.float64, device).view(1, 1, -1)
    if kept is None:
        kept = constant((float(layer.inputs),), torch.float64, device)
    inputs = kept.double().view(-1, 1, 1)
    sharing = layer.filters // len(inputs)
    mass = p.view(len(inputs), sharing, *p.shape[1:]).sum(1) if p.size(0) > 1 else p * sharing
    alive = (w > 0) & (a > 0)
    unit = convention(layer, w, a, inputs)
    bops = layer.positions * (mass * torch.where(alive, unit, 0.0)).sum()
    weights = mass * inputs * layer.kernel
    macs = layer.positions * (weights * alive).sum()
    size = (weights * w).sum()
    total = mass.sum().clamp_min(1e-12)
    return LayerCost(layer.name, bops, macs, size, (mass * w).sum() / total, (mass * a).sum() / total)


def _overhead(layer: LayerGeometry, choice: Choice) -> int:
    scales = layer.filters + 1
    return 32 * scales + (4 * layer.filters if choice.p.size(0) > 1 and len(choice.w_bits) > 1 else 0)

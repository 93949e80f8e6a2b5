"""What a choice costs: bit operations, multiplications and size, exact for a policy and differentiable for a model that is being
searched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from qprune.constants import constant
from qprune.conventions import CONVENTIONS, Convention, Inputs
from qprune.errors import BudgetError, InputError, PolicyMismatchError
from qprune.gates import TiedGate
from qprune.geometry import ExampleInputs, Geometry, LayerGeometry, Unit, trace_geometry, weighted_layers
from qprune.inputs import Shares, kept_inputs, own_inputs
from qprune.nn.activation import QuantActivation
from qprune.nn.filterwise import FilterConv2d
from qprune.nn.mixing import Mixing
from qprune.nn.quantizing import Quantizing
from qprune.policy import Policy
from qprune.record import record_of
from qprune.space import FLOAT, PRUNED
from qprune.wrappers import unwrap


@dataclass(frozen=True)
class Choice:
    """The distribution over (weight bits, activation bits) of one layer: p [F, K_w, K_a], or [1, K_w, K_a] if all filters share it.

    out_bits, out_p  bits of the activation that the layer produces, where it is quantized there, and their distribution [F or 1, K_o]
    shares           where filters share choices of 0 bits with other filters: which choice each follows
    """

    w_bits: tuple[int, ...]
    a_bits: tuple[int, ...]
    p: Tensor
    out_bits: tuple[int, ...] = ()
    out_p: Tensor | None = None
    shares: Shares | None = None

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
    return evaluate(geometry, model_choices(unwrap(model_or_policy), geometry.units), CONVENTIONS[convention])


def geometry_of(model: nn.Module, example_inputs: ExampleInputs | None = None) -> Geometry:
    """The geometry that `prepare` recorded, or a fresh trace. Raises InputError if there is neither."""
    record = record_of(model)
    if record is not None and record.geometry is not None and example_inputs is None:
        return record.geometry
    if example_inputs is None:
        raise InputError("the model's geometry is unknown: pass example_inputs here, or to qprune.prepare")
    traced = Geometry(trace_geometry(unwrap(model), example_inputs))
    return traced if record is None or record.geometry is None else replace(record.geometry, layers=traced.layers)


def model_choices(model: nn.Module, units: Mapping[str, Unit] | None = None) -> dict[str, Choice]:
    """The present distribution of every layer that is not float. units: of the network's geometry, if activations are quantized by their
    producers."""
    choices = {}
    produced = {name: module.channel_bits for name, module in model.named_modules() if isinstance(module, QuantActivation)}
    for name, layer in weighted_layers(model):
        if isinstance(layer, Mixing):
            gate, p = layer.weight_gate, layer.filter_probabilities().double()
            shares = Shares(id(gate.prune), gate.channels) if isinstance(gate, TiedGate) and gate.mode != "fixed" else None
            choices[name] = Choice(layer.space.w_bits, layer.space.a_bits, p, shares=shares)
        elif isinstance(layer, FilterConv2d):
            choices[name] = _unit_choice(layer)
        elif isinstance(layer, Quantizing):
            activation = (units or {}).get(name, Unit()).activation
            out = one_hot(produced[activation]) if activation in produced else ((), None)
            w_bits, p = (layer.weight_quantizer.bits, layer.one_hot.double())
            if layer.fillers:
                w_bits, p = one_hot(layer.computed_bits)
                p = p.to(layer.one_hot.device)
            choices[name] = Choice(w_bits, (layer.a_bits,), p.unsqueeze(2), *out)
    return choices


def _unit_choice(layer: FilterConv2d) -> Choice:
    """What a unit's gate expects: every filter chooses by the same probabilities."""
    p = layer.gate.distribution().double()
    weights, outputs = (tuple(dict.fromkeys(side)) for side in zip(*layer.candidates, strict=True))
    w, a = (
        constant(tuple(float(pair[side] == b) for pair in layer.candidates for b in distinct), p.dtype, p.device).view(-1, len(distinct))
        for side, distinct in enumerate((weights, outputs))
    )
    out = (outputs, (p @ a).unsqueeze(0)) if layer.produces else ((), None)
    return Choice(weights, (layer.input_bits,), (p @ w).view(1, -1, 1), *out)


def one_hot(bits: int | tuple[int, ...]) -> tuple[tuple[int, ...], Tensor]:
    """(distinct bits, one-hot [F, K]), or [1, 1] where all filters share them."""
    if isinstance(bits, int):
        return (bits,), torch.ones(1, 1, dtype=torch.float64)
    distinct = tuple(sorted(set(bits)))
    return distinct, torch.tensor([[float(b == d) for d in distinct] for b in bits], dtype=torch.float64)


def policy_choices(geometry: Geometry, policy: Policy) -> dict[str, Choice]:
    """A policy as one-hot distributions."""
    choices = {}
    for name, bits in policy.layers.items():
        w_bits, p = one_hot(bits.w_bits)
        out = ((), None) if bits.out_bits is None else one_hot(bits.out_bits)
        choices[name] = Choice(w_bits, (bits.a_bits,), p.unsqueeze(2), *out)
    return choices


def _produced_bits(geometry: Geometry, choices: Mapping[str, Choice], name: str) -> tuple[tuple[int, ...], Tensor] | None:
    """(bits, distribution [channels, K]) of the input of a layer that does not quantize it but reads a quantized activation; else None."""
    unit = geometry.units.get(name, Unit())
    source = choices.get(unit.source or "")
    if source is None or source.out_p is None or (name in choices and choices[name].a_bits != (FLOAT,)):
        return None
    layer = geometry.layers[name]
    rows = source.out_p if source.out_p.size(0) > 1 else source.out_p.expand(layer.channels, -1)
    if unit.channels is not None and source.out_p.size(0) > 1:
        if max(unit.channels, default=0) >= len(rows):
            raise PolicyMismatchError(f"layer {name} reads channel {max(unit.channels)} of {unit.source}, which has bits for {len(rows)}")
        rows = rows[constant(unit.channels, torch.int64, rows.device)]
    return source.out_bits, rows.repeat_interleave(layer.channels // rows.size(0), 0)


def evaluate(geometry: Geometry, choices: Mapping[str, Choice], convention: Convention) -> Cost:
    """The expected cost of choices that are independent but for those that filters share: exact for one-hot ones."""
    pruned = {name: choice.pruned() for name, choice in choices.items() if PRUNED in choice.w_bits and name in geometry.layers}
    shares = {name: choice.shares for name, choice in choices.items() if choice.shares is not None}
    kept, own = kept_inputs(geometry, pruned, shares), own_inputs(geometry, pruned, shares)
    rows = [
        layer_cost(
            layer, choices.get(name, FLOAT_CHOICE), kept.get(name), convention, _produced_bits(geometry, choices, name), own.get(name)
        )
        for name, layer in geometry.layers.items()
    ]
    if not rows:
        raise BudgetError("the network has no convolution or linear layer: there is nothing to cost")
    device = next((choice.p.device for choice in choices.values()), FLOAT_CHOICE.p.device)  # layers left float are costed on the CPU
    bops, macs, size = (torch.stack([getattr(row, field).to(device) for row in rows]).sum() for field in ("bops", "macs", "size_bits"))
    overhead = sum(_overhead(geometry.layers[name], choice) for name, choice in choices.items() if name in geometry.layers)
    return Cost(bops, macs, size, overhead, tuple(rows))


def layer_cost(
    layer: LayerGeometry,
    choice: Choice,
    kept: Tensor | None,
    convention: Convention,
    produced: tuple[tuple[int, ...], Tensor] | None = None,
    own: Tensor | None = None,
) -> LayerCost:
    """One layer's expected cost.

    kept      probability that each input channel is there, [channels] (None: all are)
    produced  bits of the input channels and their distribution [channels, K], where the producer chose them (None: the layer's a_bits)
    own       input channels that are there more than `kept` says for filters that are there themselves, [F] (see own_inputs)
    """
    p, device = choice.p, choice.p.device
    w = constant(choice.w_bits, torch.float64, device).view(1, -1, 1)
    a = constant(choice.a_bits, torch.float64, device).view(1, 1, -1)
    if kept is not None:
        there = kept.double().view(layer.groups, -1)
    elif produced is not None:
        there = torch.ones(layer.groups, layer.inputs, dtype=torch.float64, device=device)
    else:
        there = constant((float(layer.inputs),), torch.float64, device).view(1, 1)  # the groups are alike
    count = there.sum(1).view(-1, 1, 1)
    if own is not None:
        count = count.repeat_interleave(layer.filters // len(count), 0) + own.double().view(-1, 1, 1)
    sharing = layer.filters // len(count)
    mass = p.view(len(count), sharing, *p.shape[1:]).sum(1) if p.size(0) > 1 else p * sharing
    inputs, a_bits = Inputs.alike(count, a), (mass * a).sum() / mass.sum().clamp_min(1e-12)
    if produced is not None:
        inputs = _mixed_inputs(there, *produced)
        a_bits = inputs.bits.sum() / count.sum().clamp_min(1e-12)
    alive = (w > 0) & (inputs.bits > 0)
    bops = layer.positions * (mass * torch.where(alive, convention(layer, w, inputs), 0.0)).sum()
    weights = mass * count * layer.kernel
    macs = layer.positions * (weights * alive).sum()
    size = (weights * w).sum()
    return LayerCost(layer.name, bops, macs, size, (mass * w).sum() / mass.sum().clamp_min(1e-12), a_bits)


def _mixed_inputs(there: Tensor, bits: tuple[int, ...], q: Tensor) -> Inputs:
    """The inputs [groups, 1, 1] of filters whose channels, there with probability [groups, inputs], have bits distributed as q
    [channels, K]."""
    a = constant(bits, torch.float64, q.device)
    q = q.double()
    levels = 2.0**a - 1
    mean, square = q @ levels, q @ levels.square()
    rows = [q @ a * there.flatten(), mean * there.flatten(), (square - mean.square()).clamp_min(0) * there.flatten()]
    total, summed, variance = (row.view(there.shape).sum(1).view(-1, 1, 1) for row in rows)
    return Inputs(there.sum(1).view(-1, 1, 1), total, summed, variance)


def _overhead(layer: LayerGeometry, choice: Choice) -> int:
    scales = layer.filters + 1
    return 32 * scales + (4 * layer.filters if choice.p.size(0) > 1 and len(choice.w_bits) > 1 else 0)

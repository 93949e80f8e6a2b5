"""Taking filters, input channels and entries out of the modules of a converted (or float) network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from qprune.nn.activation import QuantActivation
from qprune.nn.codebook import CodebookLayer, to_codebook
from qprune.nn.quant import QuantConv2d, QuantLinear
from qprune.nn.quantizing import Quantizing
from qprune.nn.spread import ConstantOutput, Spread, narrow_plain
from qprune.nn.surgery import stripped, take_over
from qprune.quantizers import Quantizer, WeightQuantizer

NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
CARRIERS = (*NORMS, nn.PReLU)
"""Modules that may hold one entry per channel and treat every channel alone."""


class Remains(Protocol):
    """What `narrowed` needs of a qprune.removal.LayerPlan."""

    @property
    def rows(self) -> tuple[int, ...]: ...
    @property
    def columns(self) -> tuple[int, ...]: ...
    @property
    def groups(self) -> int: ...
    @property
    def present(self) -> tuple[int, ...]: ...
    @property
    def outputs(self) -> tuple[int, ...]: ...
    @property
    def fillers(self) -> tuple[int, ...]: ...
    @property
    def silent(self) -> tuple[int, ...]: ...
    @property
    def gone(self) -> np.ndarray: ...
    @property
    def inputs(self) -> int: ...


def entries_of(module: nn.Module) -> int:
    """The number of channels that a normalisation or nn.PReLU holds entries for; 0 for other modules, and where it holds none or one."""
    values = [*module._parameters.values(), *module._buffers.values()] if isinstance(module, CARRIERS) else []
    found = max((value.numel() for value in values if value is not None), default=0)
    return found if found > 1 else 0


def sliceable(layer: nn.Module) -> bool:
    """Whether the layer computes what its class says, with a weight that is a parameter of its own."""
    ours = type(layer) in (nn.Conv2d, nn.Linear) or isinstance(layer, Quantizing | CodebookLayer)
    return ours and "weight" in layer._parameters and "forward" not in layer.__dict__


@torch.no_grad()
def mute(layer: nn.Conv2d | nn.Linear, plan: Remains) -> None:
    """Set to zero, in place: silent filters with their bias, and what the others do with input channels that nobody makes."""
    layer.weight[list(plan.silent)] = 0
    if layer.bias is not None:
        layer.bias[list(plan.silent)] = 0
    kept = torch.from_numpy(_kept(layer, plan.gone)).to(layer.weight.device)
    if not kept.all():
        layer.weight.mul_(kept)
    if isinstance(layer, Quantizing):
        _keep_only(layer, list(range(len(layer.weight))), kept, plan)
    if isinstance(layer, CodebookLayer):
        layer.mask = layer.mask & kept
        layer.mask[list(plan.silent)] = False


def _kept(layer: nn.Conv2d | nn.Linear, gone: np.ndarray) -> np.ndarray:
    """[F or 1, C / groups, 1 …], False where a filter reads a channel that nobody makes."""
    groups = getattr(layer, "groups", 1)
    rows = ~gone.reshape(groups, -1)
    ones = (1,) * (layer.weight.dim() - 2)
    return (rows if groups == 1 else rows.repeat(len(layer.weight) // groups, 0)).reshape(-1, rows.shape[1], *ones)


def _keep_only(layer: Quantizing, rows: Sequence[int], kept: Tensor, plan: Remains) -> None:
    """Let the quantizer leave out what does not belong to the layer, where zero weights and inputs alone would not do."""
    quantizer, silent = layer.weight_quantizer, set(plan.silent)
    no_zero = quantizer.kind in ("dorefa", "uniq") or 1 in quantizer.bits
    of_input = layer.input_quantizer.kind == "lsq+" or layer.a_bits == 1
    one_range = isinstance(quantizer, WeightQuantizer) and 1 in quantizer.bits and len(quantizer.log_range) == 1
    dead = torch.tensor([f in silent for f in rows], device=kept.device)
    if (kept.all() or not (no_zero or of_input)) and not ((quantizer.kind == "uniq" or one_range) and dead.any()):
        return
    quantizer.kept = kept & ~dead.view(-1, *[1] * (kept.dim() - 1))


def narrowed(layer: nn.Conv2d | nn.Linear, plan: Remains) -> nn.Module:
    """The layer, already muted, with what remains of it, between Spreads where its surroundings keep other channels; the layer itself if
    everything remains. Weights are copied."""
    filters, axis = len(layer.weight), -3 if isinstance(layer, nn.Conv2d) else -1
    channels = layer.weight.size(1) * getattr(layer, "groups", 1)
    whole = len(plan.rows) == filters and len(plan.columns) == channels
    if whole and len(plan.outputs) == filters and len(plan.present) == channels:
        return layer
    device, silent = layer.weight.device, set(plan.silent)
    constant = None
    if layer.bias is not None:
        left = set(plan.rows) | silent
        constants = layer.bias.detach() * torch.tensor([f not in left for f in range(filters)], device=device)
        constant = constants[list(plan.outputs)] if any(f not in left for f in plan.outputs) else None
    if not plan.groups:
        return ConstantOutput.of(layer, len(plan.outputs), constant)
    gather = None
    if plan.columns != plan.present:
        gather = Spread(_places(plan.present, plan.columns), len(plan.present), axis, device=device)
    spread = None
    if plan.rows != plan.outputs:
        spread = Spread(_places(plan.rows, plan.outputs), len(plan.rows), axis, constant, device)
    small = _sliced(layer, plan)
    if isinstance(layer, CodebookLayer):
        return _small_codebook(layer, small, plan, gather, spread)
    if not isinstance(layer, Quantizing):
        return narrow_plain(small, gather, spread)
    cls: type[Quantizing] = QuantConv2d if isinstance(layer, nn.Conv2d) else QuantLinear
    kept = torch.from_numpy(_kept(layer, plan.gone)).to(device)

    def setup(made: Quantizing) -> None:
        rows = list(plan.rows)
        made.setup_quantizing([layer.w_bits[f] for f in rows], layer.a_bits, layer.space.quantizers)
        made.input_quantizer = layer.input_quantizer
        _copy_rows(layer.weight_quantizer, made.weight_quantizer, rows, filters)
        made.surround(gather, spread)
        made.fillers = tuple(i for i, f in enumerate(rows) if f in silent)
        made.layer_name = layer.layer_name
        _keep_only(made, rows, _of_remaining(kept.expand(filters, *kept.shape[1:]), layer, plan), plan)

    return take_over(cls, small, setup)


def _small_codebook(
    layer: CodebookLayer, small: nn.Conv2d | nn.Linear, plan: Remains, gather: Spread | None, spread: Spread | None
) -> nn.Module:
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    made = to_codebook(small, _of_remaining(layer.mask, layer, plan), layer.codebook, layer.a_bits, layer.linear)
    made.input_quantizer, made.layer_name = layer.input_quantizer, layer.layer_name
    made.surround(gather, spread)
    return made


def _places(among: Sequence[int], wanted: Sequence[int]) -> list[int]:
    place = {c: i for i, c in enumerate(among)}
    return [place.get(c, len(place)) for c in wanted]


def _sliced(layer: nn.Conv2d | nn.Linear, plan: Remains) -> nn.Conv2d | nn.Linear:
    """The float layer, with copies of what remains of weight and bias; its in_channels and out_channels are those of its surroundings."""
    weight, bias = layer.weight, layer.bias
    small = _of_remaining(weight.detach(), layer, plan)
    if weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous():
        small = small.contiguous(memory_format=torch.channels_last)

    def setup(made: nn.Conv2d | nn.Linear) -> None:
        made.weight = nn.Parameter(small, weight.requires_grad)
        if bias is not None:
            made.bias = nn.Parameter(bias.detach()[list(plan.rows)].clone(), bias.requires_grad)
        if isinstance(made, nn.Conv2d):
            made.in_channels, made.out_channels, made.groups = len(plan.present), len(plan.outputs), plan.groups
        else:
            made.in_features, made.out_features = len(plan.present), len(plan.outputs)

    base = layer.as_plain() if isinstance(layer, CodebookLayer) else stripped(layer)
    return take_over(type(base), base, setup)  # type: ignore[arg-type, return-value]


def _of_remaining(value: Tensor, layer: nn.Conv2d | nn.Linear, plan: Remains) -> Tensor:
    """value [F, C / groups, …] for the rows and columns that remain."""
    each = layer.weight.size(1)
    columns = torch.tensor(plan.columns, device=value.device).view(plan.groups, -1) % each
    rows = torch.tensor(plan.rows, device=value.device)
    return value[rows.unsqueeze(1), columns.repeat_interleave(len(rows) // plan.groups, 0)]


@torch.no_grad()
def _copy_rows(source: Quantizer, target: Quantizer, rows: Sequence[int], filters: int) -> None:
    """The ranges of the filters `rows`, and the stage."""
    picks = [source.bits.index(b) for b in target.bits]
    for name, value in [*target.named_parameters(), *target.named_buffers()]:
        there = getattr(source, name)
        if there.dim() == 2:
            there = (there[list(rows)] if there.size(0) == filters and value.size(0) == len(rows) else there)[:, picks]
        value.copy_(there)
    target.__dict__.update({name: value for name, value in source.__dict__.items() if name == "_stage"})


@torch.no_grad()
def silence_entries(module: nn.Module, entries: Sequence[int]) -> None:
    """Let a normalisation give zero for these channels, which it gets as zeros: scale, shift and running mean become 0."""
    if isinstance(module, NORMS):
        for value in (module.weight, module.bias, module.running_mean):
            if isinstance(value, Tensor):
                value[list(entries)] = 0


@torch.no_grad()
def without_entries(module: nn.Module, absent: Sequence[int]) -> None:
    """Take entries out of a normalisation or nn.PReLU, in place."""
    lost = set(absent)
    if not lost:
        return
    for name, value in [*module._parameters.items(), *module._buffers.items()]:
        if value is not None and value.dim() == 1:
            small = value.detach()[[i for i in range(len(value)) if i not in lost]]
            setattr(module, name, nn.Parameter(small, value.requires_grad) if isinstance(value, nn.Parameter) else small)
    if isinstance(module, nn.PReLU):
        module.num_parameters -= len(lost)
    else:
        assert isinstance(module, NORMS)
        module.num_features -= len(lost)


@torch.no_grad()
def narrowed_activation(activation: QuantActivation, outputs: Sequence[int]) -> QuantActivation:
    """The activation of these channels; itself where all channels share their bits, or none is lost."""
    if len(activation.one_hot) == 1 or len(outputs) == len(activation.one_hot):
        return activation
    keys = [activation.columns[k] for k in activation.one_hot.argmax(1).tolist()]
    keys, old = [keys[c] for c in outputs], activation.quantizer
    made = QuantActivation([b for _, b in keys], old.kind, [clip for clip, _ in keys] if old.own else None, activation.limit)
    made.to(activation.one_hot.device).train(activation.training)
    columns = [activation.columns.index(key) for key in made.columns] if old.own else [0]
    for name, value in [*made.quantizer.named_parameters(), *made.quantizer.named_buffers()]:
        there = getattr(old, name)
        value.copy_(there[:, columns] if there.dim() == 2 else there)
    made.quantizer.calibrated = old.calibrated
    made.quantizer.stage = old.stage
    return made

"""Float model → mixed model: swap the layers, find which inputs are signed, record the geometry."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from qprune.errors import InputError, RuleError, UnsupportedLayerError
from qprune.gates import gates
from qprune.geometry import ExampleInputs, Geometry, float_twin, run_observed, trace_geometry, weighted_layers
from qprune.groups import channel_groups
from qprune.nn.filterwise import FilterConv2d
from qprune.nn.mixed import MixedActivation, MixedConv2d, MixedLinear
from qprune.nn.mixing import Mixing
from qprune.nn.surgery import copy_model, plain, replace_modules
from qprune.policy import LayerBits
from qprune.quantizers import InputQuantizer, OutputQuantizer, Quantizer, sample_values
from qprune.recalibrate import only_inputs
from qprune.record import Record, attach
from qprune.space import FLOAT, SearchSpace
from qprune.ties import filterwise, not_removable, tie_gates
from qprune.units import find_units
from qprune.unitwise import in_units, left_units, unit_spaces, unit_swaps
from qprune.wrappers import unwrap

log = logging.getLogger("qprune")
Rules = Mapping[str, SearchSpace | None]


def prepare(model: nn.Module, space: SearchSpace, rules: Rules | None = None, example_inputs: ExampleInputs | None = None) -> nn.Module:
    """A copy of the model in which every nn.Conv2d and nn.Linear is a mixed layer with the candidates of `space`.

    rules           module name, or fnmatch pattern, → another SearchSpace for those layers, or None to leave them float. A name goes before
                    patterns; of several patterns the first that matches counts
    example_inputs  a tensor, a tuple of arguments or a dict of keywords for one call: gives the geometry that costs and budgets need, the
                    channel groups, and which inputs are signed. Ranges are calibrated on the first training batch, or by `calibrate`.
                    Filters that can only be removed together then share their gate of 0 bits (see qprune.ties)

    With placement="output" a convolution, the BatchNorm2d that gets its output and the nn.ReLU or nn.ReLU6 behind it become one unit, whose
    filters choose (weight bits, activation bits); other activation functions count as none. Needs example_inputs. Linear layers stay float
    unless a rule says otherwise; a convolution with a rule of fixed bits keeps these for its weight, while its activation is searched like
    the others. A unit that reads what no unit produced (the image, the sum behind a linear bottleneck) quantizes it itself at 8 bits, or as
    the rule of fixed bits says.

    The model's own code is neither traced nor edited: control flow, shared modules and any nesting are fine. Layers of other types, and
    those with code of their own (subclasses, parametrized or pruned weights, a patched forward), stay as they are. A layer that is mixed
    already keeps its candidates unless a rule names others. Weights are copied, the given model is not changed.
    Raises RuleError for a rule that matches no layer, UnsupportedLayerError for one that names a layer that cannot be replaced, for lazy
    layers without example_inputs, and for units that are not one convolution, one normalisation and one rectifier.
    """
    if not isinstance(space, SearchSpace):
        raise RuleError(f"prepare: space must be a SearchSpace, got {type(space).__name__}")
    prepared = copy_model(unwrap(model))
    geometry = None
    if example_inputs is not None:
        geometry = Geometry(trace_geometry(prepared, example_inputs), channel_groups(prepared, example_inputs))
    spaces = assign_spaces(prepared, space, rules or {})
    modules = dict(prepared.named_modules())
    units: dict[str, SearchSpace] = {}
    if any(in_units(chosen) for chosen in spaces.values()):
        if geometry is None or example_inputs is None:
            raise RuleError("prepare: placement='output' needs example_inputs, to find which activation belongs to which layer")
        units = unit_spaces(modules, spaces, space)
        needed = [name for name, chosen in units.items() if chosen.a_bits != (FLOAT,)]
        geometry = replace(geometry, units=find_units(prepared, example_inputs, needed))
    swaps = left_units(modules, units)
    if geometry is not None:
        swaps |= unit_swaps(modules, spaces, units, geometry.units)
    for name, module in weighted_layers(prepared):
        if name not in units:
            swaps[module] = _with_space(module, spaces[name])
        if spaces[name] is not None:
            swaps.get(module, module).layer_name = name  # type: ignore[assignment]
    prepared = replace_modules(prepared, {old: new for old, new in swaps.items() if old is not new})
    tie_gates(prepared, geometry)
    if geometry is not None:
        _tell_not_removable(prepared, geometry)
    attach(prepared, Record(geometry, fixed_layers(prepared)))
    if example_inputs is not None:
        _observe_inputs(prepared, [example_inputs], lambda name, quantizer, x: quantizer.observe_sign(x))
    return prepared


def _with_space(layer: nn.Module, space: SearchSpace | None) -> nn.Module:
    """The layer with these candidates, or the plain one for None; the layer itself where that is what it is."""
    if isinstance(layer, Mixing | FilterConv2d):
        if isinstance(layer, Mixing) and layer.space == space:
            return layer
        layer = plain(layer)
    if space is None:
        return layer
    if isinstance(layer, nn.Conv2d):
        return MixedConv2d.from_float(layer, space)
    assert isinstance(layer, nn.Linear)
    return MixedLinear.from_float(layer, space)


def fixed_layers(model: nn.Module) -> dict[str, LayerBits | None]:
    """The layers whose own cost is decided: their bits, or None for a layer that is float."""
    fixed: dict[str, LayerBits | None] = {}
    for name, layer in weighted_layers(model):
        if isinstance(layer, FilterConv2d):
            if len(layer.candidates) == 1:
                ((w, a),) = layer.candidates
                fixed[name] = LayerBits(w, layer.input_bits, a if layer.produces else None)
            elif len({w for w, _ in layer.candidates}) == 1 and layer.input_bits != FLOAT:
                fixed[name] = LayerBits(layer.candidates[0][0], layer.input_bits)
        elif not isinstance(layer, Mixing):
            fixed[name] = None
        elif layer.space.is_fixed:
            fixed[name] = LayerBits(*layer.space.candidates[0])
    return fixed


def assign_spaces(model: nn.Module, space: SearchSpace, rules: Rules) -> dict[str, SearchSpace | None]:
    """Layer name → its space, or None for a layer that stays as it is."""
    aliases = dict(model.named_modules(remove_duplicate=False))
    modules = dict(model.named_modules())
    layers = {name: _replaceable(module) for name, module in weighted_layers(model)}
    used: set[str] = set()
    spaces: dict[str, SearchSpace | None] = {}
    for name, replaceable in layers.items():
        pattern = name if name in rules else next((rule for rule in rules if fnmatchcase(name, rule)), None)
        used.update(rule for rule in rules if rule == name or fnmatchcase(name, rule))
        module = modules[name]
        default: SearchSpace | None = module.space if isinstance(module, Mixing | FilterConv2d) else space
        if in_units(default) and not isinstance(module, nn.Conv2d):
            default = None
        chosen = default if pattern is None else rules[pattern]
        if chosen is not None and not isinstance(chosen, SearchSpace):
            raise RuleError(f"rule {pattern!r}: expected a SearchSpace or None, got {type(chosen).__name__}")
        if in_units(chosen) and isinstance(module, nn.Linear):
            raise UnsupportedLayerError(
                f"layer {name}: a linear layer has no filters whose activations could be quantized where they are produced "
                f"(placement='output'); give it a rule of its own, SearchSpace.fixed(8, 8) or None"
            )
        if not replaceable and chosen is not None:
            if pattern == name:
                raise UnsupportedLayerError(_why_not(name, module))
            if nn.parameter.is_lazy(module.weight):
                raise UnsupportedLayerError(f"layer {name}: {type(module).__name__} has no shape yet: give prepare example_inputs")
            if type(module) is not nn.ConvTranspose2d:
                log.info("qprune: %s", _why_not(name, module))
            chosen = None
        spaces[name] = chosen
    for rule in rules:
        if rule in used:
            continue
        if rule in aliases and aliases[rule] in [modules[name] for name in layers]:
            first = next(name for name in layers if modules[name] is aliases[rule])
            raise RuleError(f"rule {rule!r} names a layer that is shared: use its first name {first!r}")
        if rule in modules and (rules[rule] is not None or any(weighted_layers(modules[rule]))):
            raise UnsupportedLayerError(_why_not(rule, modules[rule]))
        if rule not in modules:
            near = difflib.get_close_matches(rule, layers, n=1, cutoff=0.3)
            hint = f"; did you mean {near[0]!r}?" if near else f"; the layers are {_listed(layers)}"
            raise RuleError(f"rule {rule!r} matches no layer{hint}")
    return spaces


def _replaceable(module: nn.Module) -> bool:
    plain_code = type(module) in (nn.Conv2d, nn.Linear) and "weight" in module._parameters and "forward" not in module.__dict__
    return plain_code or isinstance(module, Mixing | FilterConv2d)


def _why_not(name: str, module: nn.Module) -> str:
    kind = type(module).__name__
    if any(weighted_layers(module)) and not isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
        return f"layer {name}: {kind} holds layers but is none; for all of them, use the pattern {name + '.*'!r}"
    if type(module) in (nn.Conv2d, nn.Linear):
        return f"layer {name}: this {kind} has a computed weight or a patched forward, and cannot be mixed; it stays float"
    return f"layer {name}: {kind} cannot be mixed (only nn.Conv2d and nn.Linear can, not subclasses); it stays float"


def _tell_not_removable(prepared: nn.Module, geometry: Geometry) -> None:
    prunable = {name for name, layer in weighted_layers(prepared) if isinstance(layer, Mixing) and filterwise(layer)}
    reasons = not_removable(geometry, prunable)
    if reasons:
        log.info(
            "qprune: filters at 0 bits that other layers go on reading as zeros: %s",
            "; ".join(f"{name} ({reason})" for name, reason in reasons.items()),
        )


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _observe_inputs(
    model: nn.Module,
    inputs: Iterable[ExampleInputs],
    observe: Callable[[str, InputQuantizer, Tensor], None],
    outputs: Mapping[str, OutputQuantizer] | None = None,
) -> None:
    """Call observe(layer name, quantizer, x) with what every input quantizer would see if all quantizers were off, in eval mode.

    outputs  activation module → its quantizer, which observes what the module gets
    """
    quantizers = {name.rpartition(".")[0]: module for name, module in model.named_modules() if isinstance(module, InputQuantizer)}
    twin = float_twin(model)
    activations = [(name, module) for name, module in twin.named_modules() if isinstance(module, MixedActivation)]
    identities: dict[nn.Module, nn.Module] = {module: nn.Identity() for _, module in activations}
    for name, module in activations:
        identities[module].register_forward_hook(lambda layer, args, y, name=name: observe(name, quantizers[name], y))

    for name, output in (outputs or {}).items():
        twin.get_submodule(name).register_forward_pre_hook(lambda layer, args, output=output: output.observe(args[0]))

    def layer_called(name: str, layer: nn.Module, x: Tensor, y: Tensor) -> None:
        if name in quantizers:
            observe(name, quantizers[name], x)

    run_observed(replace_modules(twin, identities), inputs, layer_called)


def calibrate(model: nn.Module, batches: Iterable[ExampleInputs | tuple[Tensor, Tensor]]) -> nn.Module:
    """Set the input ranges of every mixed or quantized layer from a few batches of real inputs, and find which inputs are signed.

    batches  inputs as for `prepare`, or (x, y) pairs of which x is used. Each layer sees the float network's activations: the network
             runs in eval mode with its quantizers off. Returns the model, changed in place. Raises InputError if there is no batch.

    Where activations are quantized by their producers, their clips come from the mean and deviation of what goes into the rectifiers.
    """
    samples: dict[str, list[Tensor]] = {}
    quantizers: dict[str, InputQuantizer] = {}

    def collect(name: str, quantizer: InputQuantizer, x: Tensor) -> None:
        quantizers[name] = quantizer
        samples.setdefault(name, []).append(sample_values(x))

    inputs = [only_inputs(batch) for batch in batches]
    if not inputs:
        raise InputError("calibrate: no batches were given")
    outputs = {n.rpartition(".")[0]: module for n, module in unwrap(model).named_modules() if isinstance(module, OutputQuantizer)}
    for output in outputs.values():
        output.restart()
    _observe_inputs(unwrap(model), inputs, collect, outputs)
    for name, quantizer in quantizers.items():
        quantizer.calibrate(torch.cat(samples[name]))
    return model


def arch_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The gates' logits: what the search learns about bits."""
    return [gate.logits for _, gate in gates(model)]


def weight_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Every other parameter: weights, biases, normalisation, and the quantizers' ranges and offsets."""
    arch = {id(p) for p in arch_parameters(model)}
    return [p for p in model.parameters() if id(p) not in arch]


def quantizer_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The quantizers' ranges and offsets: part of weight_parameters, best given an optimizer without weight decay."""
    return [p for module in model.modules() if isinstance(module, Quantizer) for p in module.parameters()]

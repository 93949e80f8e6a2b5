"""Float model → mixed model: swap the layers, find which inputs are signed, record the geometry."""

from __future__ import annotations

import copy
import difflib
import logging
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from qprune.errors import InputError, RuleError, UnsupportedLayerError
from qprune.geometry import ExampleInputs, Geometry, float_twin, run_observed, trace_geometry, weighted_layers
from qprune.groups import channel_groups
from qprune.nn.mixed import MixedConv2d, MixedLinear
from qprune.nn.mixing import Mixing
from qprune.nn.surgery import replace_modules
from qprune.policy import LayerBits
from qprune.quantizers import InputQuantizer
from qprune.record import Record, attach, unwrap
from qprune.space import SearchSpace

log = logging.getLogger("qprune")
Rules = Mapping[str, SearchSpace | None]


def prepare(model: nn.Module, space: SearchSpace, rules: Rules | None = None, example_inputs: ExampleInputs | None = None) -> nn.Module:
    """A copy of the model in which every nn.Conv2d and nn.Linear is a mixed layer with the candidates of `space`.

    rules           module name, or fnmatch pattern, → another SearchSpace for those layers, or None to leave them float. A name goes before
                    patterns; of several patterns the first that matches counts
    example_inputs  a tensor, a tuple of arguments or a dict of keywords for one call: gives the geometry that costs and budgets need, the
                    channel groups, and which inputs are signed. Ranges are calibrated on the first training batch, or by `calibrate`

    The model's own code is neither traced nor edited: control flow, shared modules and any nesting are fine. Layers of other types, and
    subclasses of nn.Conv2d or nn.Linear with code of their own, stay as they are. Weights are copied, the given model is not changed.
    Raises RuleError for a rule that matches no layer, UnsupportedLayerError for one that names a layer that cannot be replaced.
    """
    if not isinstance(space, SearchSpace):
        raise RuleError(f"prepare: space must be a SearchSpace, got {type(space).__name__}")
    geometry = None
    if example_inputs is not None:
        geometry = Geometry(trace_geometry(model, example_inputs), channel_groups(model, example_inputs))
    prepared = copy.deepcopy(unwrap(model))
    spaces = assign_spaces(prepared, space, rules or {})
    swaps: dict[nn.Module, nn.Module] = {}
    fixed: dict[str, LayerBits | None] = {}
    for name, module in weighted_layers(prepared):
        chosen = spaces.get(name)
        if chosen is None:
            fixed[name] = None
            continue
        if isinstance(module, Mixing):
            mixed: Mixing = module
        else:
            mixed = _mixed(module, chosen)
            swaps[module] = mixed
        mixed.layer_name = name
        if mixed.space.is_fixed:
            fixed[name] = LayerBits(*mixed.space.candidates[0])
    prepared = replace_modules(prepared, swaps)
    attach(prepared, Record(geometry, fixed))
    if example_inputs is not None:
        _observe_signs(prepared, example_inputs)
    return prepared


def _mixed(layer: nn.Module, space: SearchSpace) -> Mixing:
    if isinstance(layer, nn.Conv2d):
        return MixedConv2d.from_float(layer, space)
    assert isinstance(layer, nn.Linear)
    return MixedLinear.from_float(layer, space)


def assign_spaces(model: nn.Module, space: SearchSpace, rules: Rules) -> dict[str, SearchSpace | None]:
    """Layer name → its space, or None for a layer that stays float."""
    modules = dict(model.named_modules())
    layers = {name: _replaceable(module) for name, module in weighted_layers(model)}
    used: set[str] = set()
    spaces: dict[str, SearchSpace | None] = {}
    for name, replaceable in layers.items():
        pattern = name if name in rules else next((rule for rule in rules if fnmatchcase(name, rule)), None)
        used.update(rule for rule in rules if rule == name or fnmatchcase(name, rule))
        chosen = space if pattern is None else rules[pattern]
        if chosen is not None and not isinstance(chosen, SearchSpace):
            raise RuleError(f"rule {pattern!r}: expected a SearchSpace or None, got {type(chosen).__name__}")
        if not replaceable and chosen is not None:
            if pattern == name:
                raise UnsupportedLayerError(_why_not(name, modules[name]))
            if type(modules[name]) is not nn.ConvTranspose2d:
                log.info("qprune: %s", _why_not(name, modules[name]))
            chosen = None
        spaces[name] = chosen
    for rule in rules:
        if rule in used:
            continue
        if rule in modules and rules[rule] is not None:
            raise UnsupportedLayerError(_why_not(rule, modules[rule]))
        if rule not in modules:
            near = difflib.get_close_matches(rule, layers, n=1, cutoff=0.3)
            hint = f"; did you mean {near[0]!r}?" if near else f"; the layers are {_listed(layers)}"
            raise RuleError(f"rule {rule!r} matches no layer{hint}")
    return spaces


def _replaceable(module: nn.Module) -> bool:
    return type(module) in (nn.Conv2d, nn.Linear) or isinstance(module, Mixing)


def _why_not(name: str, module: nn.Module) -> str:
    return f"layer {name}: {type(module).__name__} cannot be mixed (only nn.Conv2d and nn.Linear can, not subclasses); it stays float"


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _observe_signs(model: nn.Module, example_inputs: ExampleInputs) -> None:
    def observe(name: str, layer: nn.Module, x: Tensor, y: Tensor) -> None:
        quantizer = getattr(layer, "input_quantizer", None)
        if isinstance(quantizer, InputQuantizer):
            quantizer.observe_sign(x)

    run_observed(model, [example_inputs], observe)


def calibrate(model: nn.Module, batches: Iterable[ExampleInputs | tuple[Tensor, Tensor]]) -> nn.Module:
    """Set the input ranges of every mixed or quantized layer from a few batches of real inputs, and find which inputs are signed.

    batches  inputs as for `prepare`, or (x, y) pairs of which x is used. Each layer sees the float network's activations: the network
             runs in eval mode with its quantizers off. Returns the model, changed in place. Raises InputError if there is no batch.
    """
    samples: dict[str, list[Tensor]] = {}

    def collect(name: str, layer: nn.Module, x: Tensor, y: Tensor) -> None:
        flat = x.detach().reshape(-1)
        samples.setdefault(name, []).append(flat[:: max(1, flat.numel() // 65536)])

    inputs = [_only_inputs(batch) for batch in batches]
    if not inputs:
        raise InputError("calibrate: no batches were given")
    run_observed(float_twin(unwrap(model)), inputs, collect)
    for name, layer in weighted_layers(unwrap(model)):
        quantizer = getattr(layer, "input_quantizer", None)
        if isinstance(quantizer, InputQuantizer) and name in samples:
            quantizer.calibrate(torch.cat(samples[name]))
    return model


def _only_inputs(batch: ExampleInputs | tuple[Tensor, Tensor]) -> ExampleInputs:
    if isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[1], Tensor) and not batch[1].is_floating_point():
        return batch[0]  # type: ignore[no-any-return]
    return batch


def arch_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The gates' logits: what the search learns about bits."""
    return [p for name, p in model.named_parameters() if name.endswith("gate.logits")]


def weight_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Every other parameter: weights, biases, normalisation, and the quantizers' ranges and offsets."""
    arch = {id(p) for p in arch_parameters(model)}
    return [p for p in model.parameters() if id(p) not in arch]


def quantizer_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The quantizers' ranges and offsets: part of weight_parameters, best given an optimizer without weight decay."""
    return [p for name, p in model.named_parameters() if name.endswith(("quantizer.log_range", "quantizer.offset"))]

"""Turn a layer into another class that computes the same and more, without losing anything it holds; swap layers in a model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TypeVar

from torch import Tensor, nn

Layer = TypeVar("Layer", bound=nn.Module)
_MODULES = ("weight_gate", "input_gate", "weight_quantizer", "input_quantizer", "gather", "spread")
_BUFFERS = ("one_hot", "quantizer_of_pair")
_SETTINGS = ("space", "picks", "pair_groups", "layer_name", "w_bits", "a_bits", "recompute", "fillers")


def copy_model(model: nn.Module) -> nn.Module:
    """A deep copy, also where modules hold results of autograd, as torch.nn.utils.prune leaves them; copy.deepcopy refuses those."""
    held = [value for module in model.modules() for value in module.__dict__.values() if isinstance(value, Tensor)]
    return copy.deepcopy(model, {id(value): value.detach().clone() for value in held if not value.is_leaf})


def take_over(cls: type[Layer], source: nn.Module, setup: Callable[[Layer], None]) -> Layer:
    """A `cls` with everything that `source` has: constructor settings, the same parameters and buffers, hooks, mode, attributes.

    `setup` then adds what `cls` has beyond. `source` itself is not changed.
    """
    layer = cls.__new__(cls)
    nn.Module.__init__(layer)
    registries = {name for name, value in layer.__dict__.items() if isinstance(value, dict | set)}
    for name, value in source.__dict__.items():
        layer.__dict__[name] = value.copy() if name in registries else value
    setup(layer)
    return layer.train(source.training)


def plain(layer: nn.Module) -> nn.Module:
    """The torch module that one of qprune's extends, sharing its parameters; other modules as they are.

    A module that is not a mixed or quantized nn.Conv2d or nn.Linear says what it extends by a method `as_plain`.
    """
    if hasattr(layer, "as_plain") and type(layer).__module__.startswith("qprune."):
        return layer.as_plain()  # type: ignore[no-any-return, operator]
    return stripped(layer)


def stripped(layer: nn.Module) -> nn.Module:
    """The nn.Conv2d or nn.Linear that a layer of qprune extends, without what it adds; other modules as they are."""

    def strip(stripped: nn.Module) -> None:
        for name in (*_MODULES, *_SETTINGS):
            stripped._modules.pop(name, None)
            stripped.__dict__.pop(name, None)
        for name in _BUFFERS:
            stripped._buffers.pop(name, None)
            stripped._non_persistent_buffers_set.discard(name)

    for base in (nn.Conv2d, nn.Linear):
        if isinstance(layer, base) and type(layer) is not base and type(layer).__module__.startswith("qprune."):
            return take_over(base, layer, strip)
    return layer


def replace_modules(model: nn.Module, swaps: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """The model with every module in `swaps` replaced wherever it is registered, also more than once; the model itself may be one."""
    if model in swaps:
        return swaps[model]
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in swaps:
                parent._modules[name] = swaps[child]
    return model

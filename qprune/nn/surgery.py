"""Turn a layer into another class that computes the same and more, without losing anything it holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

Layer = TypeVar("Layer", bound=nn.Module)


def take_over(cls: type[Layer], source: nn.Module, setup: Callable[[Layer], None]) -> Layer:
    """A `cls` with everything that `source` has: constructor settings, the same parameters and buffers, hooks, mode, attributes.

    `setup` then adds what `cls` has beyond. `source` itself is not changed.
    """
    layer = cls.__new__(cls)
    nn.Module.__init__(layer)
    for name, value in source.__dict__.items():
        layer.__dict__[name] = value.copy() if isinstance(value, dict) else value
    setup(layer)
    return layer.train(source.training)

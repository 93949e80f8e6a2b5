"""The networks of the examples by name: `models.resnet8(num_classes=10)`, `models.get("resnet8")`, `models.for_task("resnet8", task)`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Protocol

import torch
from torch import nn

from ..kernels import QPruneError
from .lenet import LeNet5, lenet5
from .mobilenet import MobileNet, mobilenet
from .resnet import ResNet, resnet8, resnet20, resnet56, thin_resnet

__all__ = [
    "LeNet5",
    "MobileNet",
    "ModelError",
    "ResNet",
    "for_task",
    "get",
    "lenet5",
    "mobilenet",
    "names",
    "resnet8",
    "resnet20",
    "resnet56",
    "thin_resnet",
]

_MODELS: dict[str, Callable[..., nn.Module]] = {
    factory.__name__: factory for factory in (resnet8, thin_resnet, resnet20, resnet56, mobilenet, lenet5)
}


class ModelError(QPruneError, ValueError):
    """No network has this name."""


class _Images(Protocol):
    """What `for_task` reads of a task."""

    @property
    def in_channels(self) -> int: ...
    @property
    def image_size(self) -> int: ...
    @property
    def num_classes(self) -> int: ...


def names() -> tuple[str, ...]:
    """The known networks, smallest ResNet first."""
    return tuple(_MODELS)


def get(name: str) -> Callable[..., nn.Module]:
    """The function that builds network `name`; it takes at least num_classes and in_channels."""
    if name not in _MODELS:
        raise ModelError(f"unknown model {name!r}; known models: {', '.join(_MODELS)}")
    return _MODELS[name]


def for_task(name: str, task: _Images, **options: object) -> nn.Module:
    """Network `name`, its weights in channels_last, with the input channels, image size (where it matters) and classes of `task`;
    options go to its constructor."""
    factory = get(name)
    known = inspect.signature(factory).parameters
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ModelError(f"model {name!r} has no option {', '.join(unknown)}; its options: {', '.join(known)}")
    shape = {"num_classes": task.num_classes, "in_channels": task.in_channels, "image_size": task.image_size}
    model = factory(**{**{key: value for key, value in shape.items() if key in known}, **options})
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

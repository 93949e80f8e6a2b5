"""Networks by name: `models.resnet8(num_classes=10)`, `models.get("resnet8")`, `models.for_task("resnet8", task)`.

`for_task` also builds those of torchvision ("torchvision:resnet18") and timm ("timm:mobilenetv3_small_100"), without weights, and the
user's own ("my_module:my_function").
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from . import own
from .lenet import LeNet5, lenet5
from .libraries import LIBRARIES, ModelError, from_library
from .mobilenet import MobileNet, mobilenet
from .resnet import ResNet, resnet8, resnet20, resnet56, thin_resnet

__all__ = [
    "LeNet5",
    "MobileNet",
    "ModelError",
    "ResNet",
    "for_task",
    "forms",
    "get",
    "is_known",
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


def forms() -> tuple[str, ...]:
    """What `for_task` takes: the known networks, and the forms of those of libraries and of the user's own."""
    return (*_MODELS, *(f"{library}:name" for library in LIBRARIES), "module:function")


def is_known(name: str) -> bool:
    """Is it a known network, or of one of the other forms? Imports nothing."""
    return name in _MODELS or _library(name) or own.is_reference(name)


def get(name: str) -> Callable[..., nn.Module]:
    """The function that builds network `name`, one of `names`; it takes at least num_classes and in_channels."""
    if name not in _MODELS:
        raise ModelError(f"unknown model {name!r}; known models: {', '.join(_MODELS)}")
    return _MODELS[name]


def for_task(name: str, task: _Images, **options: object) -> nn.Module:
    """Network `name`, its weights in channels_last, with the input channels, image size (where it matters) and classes of `task`;
    options go to its constructor. Raises ModelError for a network that cannot be had."""
    if not is_known(name):
        raise ModelError(f"unknown model {name!r}; known models: {', '.join(forms())}")
    shape = {"num_classes": task.num_classes, "in_channels": task.in_channels, "image_size": task.image_size}
    if name in _MODELS:
        known = inspect.signature(_MODELS[name]).parameters
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise ModelError(f"model {name!r} has no option {', '.join(unknown)}; its options: {', '.join(known)}")
        model: Any = _MODELS[name](**{**{key: value for key, value in shape.items() if key in known}, **options})
    elif _library(name):
        model = from_library(name, task.num_classes, task.in_channels, options)
    else:
        model = own.called(own.resolve(name, ModelError), name, {**shape, **options}, ModelError)
    if not isinstance(model, nn.Module):
        raise ModelError(f"{name} returned {type(model).__name__}, expected a torch.nn.Module")
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def _library(name: str) -> bool:
    library, colon, rest = name.partition(":")
    return library in LIBRARIES and bool(colon) and bool(rest)

"""The known data sets by name, and the user's own.

task = load("digits", seed=0)
task = load("imagefolder", directory="/data/flowers", image_size=128)
task = load("my_package.my_module:my_function")
for x, y in task.loader("train", 64, generator=torch.Generator().manual_seed(1)):
    ...
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import own
from .cifar import cifar, cifar10, cifar100
from .digits import digits
from .imagefolder import imagefolder
from .keywords import check_keywords
from .lazy import ImageLoader, Images
from .task import Batches, DataError, Loader, Part, Split, Task, stratified

__all__ = [
    "Batches",
    "DataError",
    "ImageLoader",
    "Images",
    "Loader",
    "Part",
    "Split",
    "Task",
    "cifar10",
    "cifar100",
    "digits",
    "forms",
    "imagefolder",
    "is_known",
    "load",
    "names",
    "stratified",
    "synthetic",
]


def synthetic(
    seed: int = 0,
    *,
    in_channels: int = 3,
    image_size: int = 32,
    num_classes: int = 10,
    train: int = 1024,
    val: int = 256,
    test: int = 256,
) -> Task:
    """Normal noise with random labels, for measuring throughput: nothing can be learnt from it. train, val, test: numbers of images."""
    if min(in_channels, image_size, num_classes, train, val, test) < 1:
        raise DataError("synthetic: channels, pixels, classes and numbers of images must be at least 1")
    generator = torch.Generator().manual_seed(seed)

    def split(count: int) -> Split:
        x = torch.randn(count, in_channels, image_size, image_size, generator=generator)
        return Split(x, torch.randint(num_classes, (count,), generator=generator))

    return Task("synthetic", in_channels, image_size, num_classes, split(train), split(val), split(test))


_FACTORIES: dict[str, Callable[..., Task]] = {
    "digits": digits,
    "synthetic": synthetic,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "imagefolder": imagefolder,
}
_KEYWORDS = {"cifar10": cifar, "cifar100": cifar}  # whose options are those of another function


def names() -> tuple[str, ...]:
    """The known data sets."""
    return tuple(_FACTORIES)


def forms() -> tuple[str, ...]:
    """What `load` takes: the known data sets, and the form of the user's own."""
    return (*_FACTORIES, "module:function")


def is_known(name: str) -> bool:
    """Is it a known data set, or of the form module:function? Imports nothing."""
    return name in _FACTORIES or own.is_reference(name)


def load(name: str, /, seed: int = 0, **options: Any) -> Task:
    """Data set `name`; `seed` fixes its split (or its noise), `options` are keywords of its function.

    "module:function" calls the user's function; see `qprune.tasks.own`.
    """
    if not is_known(name):
        raise DataError(f"unknown data set {name!r}; known: {', '.join(forms())}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise DataError(f"data set {name!r}, option seed: expected a whole number, got {seed!r}")
    if name not in _FACTORIES:
        return own.task(name, seed, options)
    check_keywords(name, _KEYWORDS.get(name, _FACTORIES[name]), options)
    return _FACTORIES[name](seed, **options)

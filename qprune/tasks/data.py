"""The known data sets, small enough to live in memory, by name.

task = load("digits", seed=0)
for x, y in task.loader("train", 64, generator=torch.Generator().manual_seed(1)):
    ...
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch

from .digits import digits
from .task import DataError, Loader, Split, Task, stratified

__all__ = ["DataError", "Loader", "Split", "Task", "digits", "load", "names", "stratified", "synthetic"]


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
    generator = torch.Generator().manual_seed(seed)

    def split(count: int) -> Split:
        x = torch.randn(count, in_channels, image_size, image_size, generator=generator)
        return Split(x, torch.randint(num_classes, (count,), generator=generator))

    return Task("synthetic", in_channels, image_size, num_classes, split(train), split(val), split(test))


def _factories() -> dict[str, Callable[..., Task]]:
    return {"digits": digits, "synthetic": synthetic}


def names() -> tuple[str, ...]:
    """The known data sets."""
    return tuple(_factories())


def load(name: str, seed: int = 0, **options: object) -> Task:
    """Data set `name`; `seed` fixes its split (or its noise), `options` are keywords of its function."""
    factories = _factories()
    if name not in factories:
        raise DataError(f"unknown data set {name!r}; known: {', '.join(factories)}")
    known = [key for key in inspect.signature(factories[name]).parameters if key != "seed"]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise DataError(f"data set {name!r} has no option {', '.join(unknown)}; its options: {', '.join(known)}")
    return factories[name](seed, **options)

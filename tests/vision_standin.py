"""A stand-in for torchvision: its names and signatures, enough of its behaviour to see what is asked of it, drawing from torch's global
generator as it does."""

from __future__ import annotations

import sys
import types
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn


class Compose:
    def __init__(self, transforms: Sequence[Any]) -> None:
        self.transforms = transforms

    def __call__(self, image: Any) -> Any:
        for transform in self.transforms:
            image = transform(image)
        return image


class RandomCrop:
    def __init__(self, size: int, padding: int | None = None) -> None:
        self.size, self.padding = size, padding or 0

    def __call__(self, image: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(image, [self.padding] * 4)
        top, left = (int(torch.randint(padded.shape[-1] - self.size + 1, ())) for _ in range(2))
        return padded[:, top : top + self.size, left : left + self.size]


class RandomHorizontalFlip:
    def __call__(self, image: Any) -> Any:
        if torch.rand(()) >= 0.5:
            return image
        return image.flip(-1) if isinstance(image, Tensor) else image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


class RandomResizedCrop:
    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: Image.Image) -> Image.Image:
        share = 0.5 + 0.5 * float(torch.rand(()))
        width, height = max(1, int(image.width * share)), max(1, int(image.height * share))
        left, top = int(torch.randint(image.width - width + 1, ())), int(torch.randint(image.height - height + 1, ()))
        return image.resize((self.size, self.size), box=(left, top, left + width, top + height))


class Resize:
    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: Image.Image) -> Image.Image:
        share = self.size / min(image.size)
        return image.resize((round(image.width * share), round(image.height * share)))


class CenterCrop:
    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: Image.Image) -> Image.Image:
        left, top = (image.width - self.size) // 2, (image.height - self.size) // 2
        return image.crop((left, top, left + self.size, top + self.size))


class PILToTensor:
    def __call__(self, image: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def small_net(num_classes: int = 1000) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))


def get_model(name: str, weights: Any = "default", **options: Any) -> nn.Module:
    assert name == "small_net" and weights is None
    return small_net(**options)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the stand-in where `import torchvision` finds it."""
    v2 = types.ModuleType("torchvision.transforms.v2")
    for one in (Compose, RandomCrop, RandomHorizontalFlip, RandomResizedCrop, Resize, CenterCrop, PILToTensor):
        setattr(v2, one.__name__, one)
    models = types.ModuleType("torchvision.models")
    models.__dict__.update(get_model=get_model, list_models=lambda module: ["small_net"])
    transforms = types.ModuleType("torchvision.transforms")
    package = types.ModuleType("torchvision")
    transforms.__dict__["v2"] = v2
    package.__dict__.update(transforms=transforms, models=models, __path__=[])
    transforms.__dict__["__path__"] = []
    for module in (package, transforms, v2, models):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def remove(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `import torchvision` fail as where it is not installed."""
    for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.v2", "torchvision.models"):
        monkeypatch.setitem(sys.modules, name, None)

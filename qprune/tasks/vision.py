"""The standard augmentations, from torchvision, which is imported when they are asked for."""

from __future__ import annotations

from typing import Any

from .lazy import Normalise, Transforms
from .order import DataError

IMAGENET = Normalise((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
RESIZED = 256 / 224
"""The short side of an image, relative to the crop from its middle that networks are evaluated on."""


def transforms_v2(what: str) -> Any:
    """The module torchvision.transforms.v2. Raises DataError where it cannot be imported; `what` needs it."""
    try:
        from torchvision.transforms import v2
    except Exception as error:  # a torchvision built for another torch raises whatever its first failing operator does
        reason = " ".join(str(error).split())
        raise DataError(
            f"{what} needs torchvision, which cannot be imported ({type(error).__name__}: {reason}); pip install 'qprune[vision]', "
            "with a torchvision that is built for this torch"
        ) from error
    return v2


def shifted_crops(size: int, padding: int, finish: Normalise, augment: bool, what: str) -> Transforms:
    """For tensors [C, size, size]: crops of the image with a black border of `padding` pixels, half of them mirrored. Plain images are left
    as they are. Without `augment` torchvision is not needed, and nothing is augmented."""
    if not augment:
        return Transforms(None, None, finish)
    v2 = transforms_v2(f"augmentation of {what} (option augment=false goes without)")
    return Transforms(None, v2.Compose([v2.RandomCrop(size, padding=padding), v2.RandomHorizontalFlip()]), finish)


def resized_crops(size: int, finish: Normalise, augment: bool, what: str) -> Transforms:
    """For PIL images of any size: crops of 8 to 100 % of the area, resized to size x size, half of them mirrored. Plain images are resized
    so that the crop from the middle is 7/8 of the short side."""
    v2 = transforms_v2(what)
    plain = v2.Compose([v2.Resize(round(size * RESIZED)), v2.CenterCrop(size), v2.PILToTensor()])
    if not augment:
        return Transforms(plain, plain, finish)
    return Transforms(plain, v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), v2.PILToTensor()]), finish)

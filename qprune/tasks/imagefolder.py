"""Images in folders, one folder per class, read while they are used: train/dog/1.jpg, train/cat/2.png, val/dog/3.jpg, …

Parts: with train/, val/ and test/, those; with two of them, the one that is not train/ is for the end, and val is a share of train/; with
none of them, the folders are classes and all three parts are shares.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .damage import Damage, DamagedImageError
from .lazy import Images, Normalise, Transforms, number_of_workers
from .order import DataError
from .task import Task
from .vision import IMAGENET, resized_crops

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp")
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")
"""What a file's content may be, whatever its name says: formats that only hold pixels."""
MAX_PIXELS = 100_000_000
MAX_ASPECT = 100
"""Resized by its short side, an image that is narrower would become huge."""
MAX_SIZE = 4096


@dataclass(frozen=True)
class Files:
    """A reader of image files.

    paths  [N] byte strings, relative to root; an array costs workers no copy
    """

    root: Path
    paths: np.ndarray[Any, np.dtype[np.bytes_]]

    def image(self, index: int) -> Any:
        """A PIL image in RGB."""
        from PIL import Image, UnidentifiedImageError

        path = self.root / self.name(index)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of odd metadata, which does not matter, and of size, which is checked here
                with Image.open(path, formats=FORMATS) as image:
                    if image.width * image.height > MAX_PIXELS:
                        raise DamagedImageError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}")
                    if max(image.size) > MAX_ASPECT * min(image.size):
                        raise DamagedImageError(
                            f"{image.width} x {image.height} pixels are too narrow; one side may be {MAX_ASPECT} x the other"
                        )
                    return image.convert("RGB")
        except UnidentifiedImageError as error:
            raise DamagedImageError(f"not an image in one of the formats {', '.join(FORMATS)}") from error
        except DamagedImageError:
            raise
        except Exception as error:  # decoders of damaged files raise SyntaxError, struct.error, EOFError, OSError and more
            raise DamagedImageError(f"{type(error).__name__}: {' '.join(str(error).split())}") from error

    def name(self, index: int) -> str:
        return os.fsdecode(bytes(self.paths[index]))


def imagefolder(
    seed: int = 0,
    *,
    directory: str | Path = "data",
    image_size: int = 224,
    val_fraction: float = 0.1,
    test_fraction: float = 0.1,
    augment: bool = True,
    workers: int | None = None,
    max_damaged: int = 10,
    mean: Sequence[float] = IMAGENET.mean,
    std: Sequence[float] = IMAGENET.std,
) -> Task:
    """3 x image_size x image_size in as many classes as train/ has folders, in the order of their names.

    Training batches hold crops of 8 to 100 % of an image, resized, half of them mirrored; others the middle of the image. `seed` draws
    shares of the training images. Images that cannot be read are skipped and logged, up to `max_damaged`; one more is a DataError.

    workers    processes that read and augment; None: as many as processors but one, at most 8
    mean, std  of the channels, 0 … 1
    """
    if not 8 <= image_size <= MAX_SIZE or max_damaged < 0:
        raise DataError(f"imagefolder: expected image_size from 8 to {MAX_SIZE} and max_damaged from 0, got {image_size} and {max_damaged}")
    processes = number_of_workers(workers, 8, "imagefolder")
    _pillow()
    root = Path(directory)
    parts = {name: root / name for name in ("train", "val", "test") if (root / name).is_dir()}
    if parts and "train" not in parts:
        raise DataError(f"imagefolder: {root} has {' and '.join(parts)}, but no folder train")
    transforms = resized_crops(image_size, _normalise(mean, std), augment, "imagefolder")
    place = _Place(transforms, processes, Damage(max_damaged))
    classes = _classes(parts.get("train", root))
    if not parts:
        split = (1 - val_fraction - test_fraction, val_fraction, test_fraction)
        if not all(0 < share < 1 for share in split):
            raise DataError(f"imagefolder: val_fraction and test_fraction must leave something, got {val_fraction!r} and {test_fraction!r}")
        train, val, test = place.part(root, classes, root).divided(split, seed)
    elif len(parts) == 3:
        train, val, test = (place.part(folder, classes, root) for folder in parts.values())
    else:
        if not 0 < val_fraction < 1:
            raise DataError(f"imagefolder: val_fraction must be between 0 and 1, got {val_fraction!r}")
        if len(parts) == 1:
            raise DataError(f"imagefolder: {root} has train, but neither val nor test; put class folders into {root} to have it divided")
        train, val = place.part(parts["train"], classes, root).divided((1 - val_fraction, val_fraction), seed)
        test = place.part(parts.get("test") or parts["val"], classes, root)
    train, val, test = (replace(images, name=name) for name, images in (("train", train), ("val", val), ("test", test)))
    return Task("imagefolder", 3, image_size, len(classes), train, val, test)


@dataclass(frozen=True)
class _Place:
    """What the parts of a folder share."""

    transforms: Transforms
    workers: int
    damage: Damage

    def part(self, folder: Path, classes: list[str], root: Path) -> Images:
        """All images below the class folders of `folder`, by class and name. Raises DataError for folders that are no class of train/."""
        strange = sorted(set(_classes(folder)) - set(classes))
        if strange:
            raise DataError(f"imagefolder: {folder / strange[0]} is a class that {root / 'train'} has not")
        paths: list[bytes] = []
        labels: list[int] = []
        for label, name in enumerate(classes):
            found = _images(folder / name)
            if not found and folder in (root, root / "train"):
                raise DataError(f"imagefolder: {folder / name} holds no image; known names end in {', '.join(SUFFIXES)}")
            paths += [os.fsencode(path.relative_to(root)) for path in found]
            labels += [label] * len(found)
        if not paths:
            raise DataError(f"imagefolder: {folder} holds no image; known names end in {', '.join(SUFFIXES)}")
        y: Tensor = torch.tensor(labels)
        return Images(Files(root, np.array(paths)), torch.arange(len(y)), y, self.transforms, self.workers, self.damage)


def _classes(folder: Path) -> list[str]:
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"imagefolder: {folder} cannot be read ({error.strerror}); name the folder with --data-dir") from error
    if not names:
        raise DataError(f"imagefolder: {folder} holds no class folders; expected folder/class/image.jpg")
    return names


def _images(folder: Path) -> list[Path]:
    """Below a class folder at any depth, by name; links are followed."""
    found = []
    for place, folders, names in os.walk(folder, followlinks=True):
        folders.sort()
        found += [Path(place, name) for name in names if name.lower().endswith(SUFFIXES)]
    return sorted(found)


def _normalise(mean: Sequence[float], std: Sequence[float]) -> Normalise:
    if not (len(mean) == len(std) == 3 and min(std) > 0):
        raise DataError(f"imagefolder: mean and std must be three numbers each, std positive, got {mean!r} and {std!r}")
    return Normalise(tuple(mean), tuple(std))


def _pillow() -> None:
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise DataError("imagefolder reads images with pillow, which is not installed: pip install 'qprune[vision]'") from error

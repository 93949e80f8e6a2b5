"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) from their binary versions: records of one or two label bytes and 3 x 32 x 32 bytes of pixels.

Nothing is downloaded. `directory` holds the archive of the data set's page (cifar-10-binary.tar.gz, cifar-100-binary.tar.gz) or the folder
in it; the Python version is a pickle, which is not opened.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .archive import check_md5, read_members
from .lazy import Images, Normalise, number_of_workers
from .order import DataError
from .task import Task, stratified
from .vision import shifted_crops

SIZE, PIXELS = 32, 3 * 32 * 32
PADDING = 4


@dataclass(frozen=True)
class Version:
    """A data set's files.

    labels   what the label bytes of a record count: coarse classes first, the last is used
    files    name → number of records, training files first
    """

    name: str
    archive: str
    folder: str
    python: tuple[str, str]
    md5: str
    labels: tuple[int, ...]
    train: dict[str, int]
    test: dict[str, int]
    finish: Normalise

    @property
    def record(self) -> int:
        return len(self.labels) + PIXELS


CIFAR10 = Version(
    "cifar10", "cifar-10-binary.tar.gz", "cifar-10-batches-bin", ("cifar-10-python.tar.gz", "cifar-10-batches-py"),
    "c32a1d4ab5d03f1284b67883e8d87530", (10,), {f"data_batch_{i}.bin": 10_000 for i in range(1, 6)}, {"test_batch.bin": 10_000},
    Normalise((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
)  # fmt: skip
CIFAR100 = Version(
    "cifar100", "cifar-100-binary.tar.gz", "cifar-100-binary", ("cifar-100-python.tar.gz", "cifar-100-python"),
    "03b5dce01913d631647c71ecec9e9cb8", (20, 100), {"train.bin": 50_000}, {"test.bin": 10_000},
    Normalise((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
)  # fmt: skip


@dataclass(frozen=True)
class Pixels:
    """A reader of images in memory, x [N, 3, 32, 32] uint8."""

    x: Tensor
    title: str

    def image(self, index: int) -> Tensor:
        return self.x[index]

    def images(self, indices: Tensor) -> Tensor:
        return self.x[indices]

    def name(self, index: int) -> str:
        return f"image {index} of {self.title}"


def cifar10(seed: int = 0, **options: Any) -> Task:
    """10 classes, 3x32x32; see `cifar`."""
    return cifar(CIFAR10, seed, **options)


def cifar100(seed: int = 0, **options: Any) -> Task:
    """100 classes (the fine labels), 3x32x32; see `cifar`."""
    return cifar(CIFAR100, seed, **options)


def cifar(
    version: Version,
    seed: int = 0,
    *,
    directory: str | Path = "data",
    val_fraction: float = 0.1,
    augment: bool = True,
    workers: int | None = None,
    complete: bool = True,
    verify: bool = False,
) -> Task:
    """The training images without a stratified share `val_fraction`, drawn by `seed`, which is val; and the test images.

    Pixels stay uint8 in memory and become (x / 255 - mean) / std in their batch. Training batches hold 32x32 crops of the images with a
    border of 4 black pixels, half of them mirrored.

    workers   processes that augment, in training; None: at most two
    complete  refuse files with fewer records than the data set has
    verify    compare the archive's MD5 sum with that on the data set's page
    """
    if not 0 < val_fraction < 1:
        raise DataError(f"{version.name}: val_fraction must be between 0 and 1, got {val_fraction!r}")
    processes = number_of_workers(workers, 2, version.name)
    contents = _contents(version, Path(directory), verify)
    train_x, train_y = _joined(version, {name: contents[name] for name in version.train}, version.train, complete)
    test_x, test_y = _joined(version, {name: contents[name] for name in version.test}, version.test, complete)
    transforms = shifted_crops(SIZE, PADDING, version.finish, augment, version.name)
    train = Images(
        Pixels(train_x, f"{version.name}'s training files"), torch.arange(len(train_y)), train_y, transforms, processes if augment else 0
    )
    test = Images(Pixels(test_x, f"{version.name}'s test file"), torch.arange(len(test_y)), test_y, transforms)
    kept, held_out = stratified(train_y, (1 - val_fraction, val_fraction), seed)
    val = Images(train.reader, held_out, train_y[held_out], transforms)
    return Task(version.name, 3, SIZE, version.labels[-1], train.subset(kept), val, test)


def _contents(version: Version, directory: Path, verify: bool) -> dict[str, bytes]:
    """The files' contents, from the folder, from a folder of its name in there, or from the archive in there."""
    expected = {**version.train, **version.test}
    for folder in (directory, directory / version.folder):
        if any((folder / name).is_file() for name in expected):
            return {name: _file(folder / name, version.record * records) for name, records in expected.items()}
    archive = directory / version.archive
    if archive.is_file():
        if verify:
            check_md5(archive, version.md5)
        wanted = {f"{version.folder}/{name}": version.record * records for name, records in expected.items()}
        return {name.rpartition("/")[2]: content for name, content in read_members(archive, wanted).items()}
    for name in version.python:
        if (directory / name).exists():
            raise DataError(
                f"{directory / name} is the Python version of {version.name}, a pickle, which can run code and is not opened; "
                f"put the binary version, {version.archive}, into {directory}"
            )
    raise DataError(
        f"{version.name}: {directory} holds neither {version.archive} nor {version.folder}; take the binary version from the data set's "
        "page, put it there, or name its folder with --data-dir"
    )


def _file(path: Path, limit: int) -> bytes:
    try:
        size = path.stat().st_size
        if size > limit:
            raise DataError(f"{path} has {size} bytes, at most {limit} expected")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _joined(version: Version, contents: dict[str, bytes], expected: dict[str, int], complete: bool) -> tuple[Tensor, Tensor]:
    """(x [N, 3, 32, 32] uint8, y [N] int64) of all files together."""
    images, labels = [], []
    for name, content in contents.items():
        count, rest = divmod(len(content), version.record)
        if rest or not count:
            raise DataError(
                f"{version.name}: {name} has {len(content)} bytes, which are not records of {version.record} bytes; copy it again"
            )
        if complete and count != expected[name]:
            raise DataError(
                f"{version.name}: {name} has {count} records, expected {expected[name]}; option complete=false takes it as it is"
            )
        records = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(count, version.record)
        for column, classes in enumerate(version.labels):
            wrong = (records[:, column] >= classes).nonzero()
            if len(wrong):
                where = int(wrong[0])
                raise DataError(
                    f"{version.name}: record {where} of {name} has label {int(records[where, column])}, "
                    f"expected less than {classes}; the file is damaged or of another data set"
                )
        labels.append(records[:, len(version.labels) - 1].long())
        images.append(records[:, len(version.labels) :].reshape(count, 3, SIZE, SIZE))
    return torch.cat(images), torch.cat(labels)

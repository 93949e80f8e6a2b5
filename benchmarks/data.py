"""How many images per second the data sets with files deliver, augmented, by number of worker processes.

    python -m benchmarks.data
    python -m benchmarks.data --images 2000 --workers 0,2,4,8 --size 224

Files are made up and written first: CIFAR-10's records, and JPEGs of 500 x 375 pixels. A training step that takes longer than its batch
takes to come never waits. Without torchvision CIFAR is read without augmentation, and folders of images are left out.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from qprune.tasks import data
from qprune.tasks.cifar import CIFAR10

WIDTH, HEIGHT, CLASSES = 500, 375, 4


def write_cifar(folder: Path, records: int) -> None:
    """All files of CIFAR-10's binary version, with so many random records each."""
    generator = np.random.default_rng(0)
    for name in (*CIFAR10.train, *CIFAR10.test):
        rows = generator.integers(0, 256, (records, CIFAR10.record), dtype=np.uint8)
        rows[:, 0] = np.arange(records) % 10
        (folder / name).write_bytes(rows.tobytes())


def write_folder(folder: Path, images: int) -> None:
    """JPEGs of noise that is smooth, and so about as large as photographs are."""
    from PIL import Image

    generator = np.random.default_rng(0)
    for number in range(images):
        place = folder / f"class{number % CLASSES}"
        place.mkdir(exist_ok=True)
        small = Image.fromarray(generator.integers(0, 256, (HEIGHT // 6, WIDTH // 6, 3), dtype=np.uint8))
        small.resize((WIDTH, HEIGHT)).save(place / f"{number}.jpg", quality=90)


def rate(task: data.Task, batch: int) -> float:
    """Images per second of a training pass, including the start of the workers."""
    loader = task.loader("train", batch, torch.Generator().manual_seed(0))
    started, images = time.perf_counter(), 0
    for _, y in loader:
        images += len(y)
    return images / (time.perf_counter() - started)


def measured(title: str, load: Callable[[int], data.Task], workers: Sequence[int], batch: int, told: Callable[[Any], object]) -> None:
    table = Table(title=title, title_justify="left")
    table.add_column("workers", justify="right")
    table.add_column("images/s", justify="right")
    table.add_column(f"ms per batch of {batch}", justify="right")
    for count in workers:
        found = rate(load(count), batch)
        table.add_row(str(count), f"{found:,.0f}", f"{1000 * batch / found:.1f}")
    told(table)


def main(arguments: Sequence[str] | None = None, told: Callable[[Any], object] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000, help="JPEGs; CIFAR has twenty times as many")
    parser.add_argument("--workers", default=f"0,1,{max(2, len(os.sched_getaffinity(0)))}", help="numbers of processes")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=224, help="pixels of a side")
    given = parser.parse_args(arguments)
    told = told or Console().print
    workers = [int(word) for word in given.workers.split(",")]
    with tempfile.TemporaryDirectory() as place:
        cifar, folder = Path(place, "cifar"), Path(place, "images")
        cifar.mkdir()
        folder.mkdir()
        write_cifar(cifar, given.images * 20 // 6)
        options: dict[str, Any] = {"directory": cifar, "complete": False}
        try:
            data.load("cifar10", **options)
        except data.DataError:
            options["augment"] = False
        title = f"cifar10, {'not augmented' if 'augment' in options else 'augmented'}"
        measured(title, lambda count: data.load("cifar10", workers=count, **options), workers, given.batch, told)
        if "augment" in options:
            told("imagefolder is left out: torchvision cannot be imported")
            return 0
        write_folder(folder, given.images)
        title = f"imagefolder, {WIDTH} x {HEIGHT} to {given.size} x {given.size}, augmented"
        options = {"directory": folder, "image_size": given.size}
        measured(title, lambda count: data.load("imagefolder", workers=count, **options), workers, given.batch, told)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

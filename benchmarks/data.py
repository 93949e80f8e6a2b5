"""How many images per second the data sets deliver, augmented, by number of worker processes.

    python -m benchmarks.data
    python -m benchmarks.data --images 2000 --workers 0,2,4,8 --size 224 --out benchmarks/results/data-cpu.json

Files are made up and written first: CIFAR-10's records, and JPEGs of 500 x 375 pixels. A training step that takes longer than its batch
takes to come never waits. Without torchvision CIFAR is read without augmentation, and folders of images are not measured; `decode` is what
Pillow alone takes for such a JPEG: decoding it, cutting a part out and resizing it, in this process, in processor time.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from qprune.tasks import data
from qprune.tasks.cifar import CIFAR10

from . import machine
from . import table as tables

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


def decoded(folder: Path, size: int) -> float:
    """Images per second of processor time that Pillow decodes, cuts and resizes."""
    from PIL import Image

    paths = sorted(folder.rglob("*.jpg"))
    started = time.process_time()
    for path in paths:
        with Image.open(path) as image:
            box = (0, 0, 0.7 * image.width, 0.7 * image.height)
            np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR, box=box))
    return len(paths) / (time.process_time() - started)


@dataclass(frozen=True)
class Row:
    """rate: images per second; None: not measured, and why."""

    data: str
    workers: int | None
    batch: int
    rate: float | None
    why: str = ""


def rows(title: str, load: Callable[[int], data.Task], workers: Sequence[int], batch: int) -> list[Row]:
    return [Row(title, count, batch, rate(load(count), batch)) for count in workers]


def table(found: Sequence[Row]) -> Table:
    shown = Table(title="images per second of a training pass", title_justify="left")
    for column in ("data", "workers", "images/s", "ms per batch"):
        shown.add_column(column, justify="left" if column == "data" else "right")
    for row in found:
        rates = ("not measured", row.why) if row.rate is None else (f"{row.rate:,.0f}", f"{1000 * row.batch / row.rate:.1f}")
        shown.add_row(row.data, "" if row.workers is None else str(row.workers), *rates)
    return shown


def measure(images: int, workers: Sequence[int], batch: int, size: int, place: Path) -> list[Row]:
    """Digits, CIFAR, a folder of images, and Pillow alone; files are written to `place`."""
    cifar, folder = place / "cifar", place / "images"
    cifar.mkdir()
    folder.mkdir()
    write_cifar(cifar, images * 20 // 6)
    write_folder(folder, images)
    found = rows("digits, in memory", lambda count: data.load("digits"), [0], batch)
    options: dict[str, Any] = {"directory": cifar, "complete": False}
    try:
        data.load("cifar10", **options)
    except data.DataError:
        options["augment"] = False
    title = f"cifar10, {'not augmented' if 'augment' in options else 'augmented'}"
    found += rows(title, lambda count: data.load("cifar10", workers=count, **options), workers, batch)
    title = f"imagefolder, {WIDTH} x {HEIGHT} to {size} x {size}"
    if "augment" in options:
        found.append(Row(title, None, batch, None, "torchvision cannot be imported"))
    else:
        options = {"directory": folder, "image_size": size}
        found += rows(f"{title}, augmented", lambda count: data.load("imagefolder", workers=count, **options), workers, batch)
    return [*found, Row(f"decode, {WIDTH} x {HEIGHT} to {size} x {size}", None, batch, decoded(folder, size))]


def main(arguments: Sequence[str] | None = None, told: Callable[[Any], object] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000, help="JPEGs; CIFAR has twenty times as many")
    parser.add_argument("--workers", default=f"0,1,{max(2, len(os.sched_getaffinity(0)))}", help="numbers of processes")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=224, help="pixels of a side")
    parser.add_argument("--out", type=Path, help="write the numbers to this JSON file")
    given = parser.parse_args(arguments)
    described = machine.describe("cpu")
    with tempfile.TemporaryDirectory() as place:
        found = measure(given.images, [int(word) for word in given.workers.split(",")], given.batch, given.size, Path(place))
    (told or Console().print)(table(found))
    if given.out is not None:
        command = " ".join(["python -m benchmarks.data", *(sys.argv[1:] if arguments is None else arguments)])
        tables.write_json(given.out, [asdict(row) for row in found], {**described, "load after": round(os.getloadavg()[0], 2)}, command)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

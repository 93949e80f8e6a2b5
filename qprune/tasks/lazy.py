"""Parts whose images are read and transformed while they are used, by worker processes.

    part = Images(reader, labels, transforms)

What a batch holds depends on the seed of its pass alone: every image is augmented with random numbers of its own, whichever worker does
it, however many there are.
"""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .damage import Damage, DamagedImageError
from .order import DataError, Order
from .prefetch import prefetched
from .task import Augment, stratified

Transform = Callable[[Any], Tensor]


class Reader(Protocol):
    """Images by number, read from wherever they are. It is copied to worker processes.

    A reader of tensors in memory may have images(indices), which gives several at once, [N, C, H, W].
    """

    def image(self, index: int) -> Any:
        """What transforms take: a PIL image, or a tensor [C, H, W] uint8. Raises DamagedImageError."""

    def name(self, index: int) -> str:
        """What the image is called in messages."""


@dataclass(frozen=True)
class Transforms:
    """plain and augmented make [C, S, S] uint8 tensors of one size from what a reader gives; augmented draws from torch's global generator.
    None leaves images as they are. finish makes a batch of them the float32 input of a network, on the device."""

    plain: Transform | None
    augmented: Transform | None
    finish: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Normalise:
    """uint8 [N, C, H, W] in 0 … 255 → float32 in channels_last, (x / 255 − mean) / std per channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, x: Tensor) -> Tensor:
        mean, std = (torch.tensor(values, device=x.device).view(1, -1, 1, 1) * 255 for values in (self.mean, self.std))
        return ((x.float() - mean) / std).contiguous(memory_format=torch.channels_last)


MAX_WORKERS = 256


def number_of_workers(asked: int | None, most: int, what: str) -> int:
    """What was asked for; for None one process less than there are processors, and at most `most`."""
    if asked is None:
        return min(most, len(os.sched_getaffinity(0)) - 1)
    if not 0 <= asked <= MAX_WORKERS:
        raise DataError(f"{what}: workers must be a number of processes from 0 to {MAX_WORKERS}, got {asked}")
    return asked


@dataclass(frozen=True, eq=False)
class Images:
    """A part read while it is used.

    index   [N] ints, which of the reader's images
    y       [N] int64, their labels
    workers processes that read and transform; 0 for none but this one
    damage  counts images that cannot be read. In shuffled batches the next one of the part that can be read takes their place; other
            batches are smaller, and one without any image is left out
    name    of the part: "train", "val" or "test"
    """

    reader: Reader
    index: Tensor
    y: Tensor
    transforms: Transforms
    workers: int = 0
    damage: Damage = field(default_factory=Damage)
    device: str = "cpu"
    name: str = ""

    def __len__(self) -> int:
        return self.y.shape[0]

    def subset(self, chosen: Tensor) -> Images:
        """Those at the given places."""
        return replace(self, index=self.index[chosen], y=self.y[chosen])

    def divided(self, fractions: Sequence[float], seed: int) -> list[Images]:
        return [self.subset(chosen) for chosen in stratified(self.y, fractions, seed)]

    def to(self, device: torch.device | str) -> Images:
        return replace(self, device=str(device))

    def example(self, count: int) -> Tensor:
        found: list[Tensor] = []
        for batch in range(0, len(self), count):
            found += self.subset(torch.arange(batch, min(batch + count, len(self))))._now()
            if len(found) >= count:
                break
        if not found:
            raise DataError(f"none of the {len(self)} images can be read")
        return self.transforms.finish(torch.stack(found[:count]).to(self.device))

    def _now(self) -> list[Tensor]:
        x, _, damaged = _Pass(self, [torch.arange(len(self))])[0]
        for name, reason in damaged:
            self.damage.add(name, reason, self.name)
        return list(x)

    def loader(
        self, batch_size: int, generator: torch.Generator | None, augment: Augment | None, drop_last: bool, shard: tuple[int, int]
    ) -> ImageLoader:
        return ImageLoader(self, Order(len(self), batch_size, generator, drop_last, shard), augment is not None)


@dataclass
class ImageLoader:
    """Batches of `Images`, as `Loader` gives them of a split: x [B, C, S, S] float32 in channels_last, y [B] int64, on the device."""

    part: Images
    order: Order
    augment: bool = False

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.following(0)

    def following(self, done: int) -> Iterator[tuple[Tensor, Tensor]]:
        """A pass without its first `done` batches, which are drawn, but not read."""
        batches, drawn = self.order.draw()
        seeds = None
        if drawn is not None and self.augment:
            seeds = torch.randint(2**32, (self.order.total,), generator=drawn)
        dataset = _Pass(self.part, [self.order.share(batch) for batch in batches[done:]], seeds, replace=drawn is not None)
        for x, y in prefetched(self._read(dataset), torch.device(self.part.device)):
            yield self.part.transforms.finish(x), y

    def _read(self, dataset: _Pass) -> Iterator[tuple[Tensor, Tensor]]:
        loader = DataLoader(
            dataset,
            batch_size=None,
            num_workers=self.part.workers,
            collate_fn=_as_it_is,
            worker_init_fn=_leave_signals_to_the_parent,
            generator=torch.Generator(),  # else a pass would take a number from the global one
            pin_memory=torch.device(self.part.device).type == "cuda",
        )
        with warnings.catch_warnings():
            # of Python 3.12 and later, for any process with threads, such as torch's; the workers call nothing that waits for these
            warnings.filterwarnings("ignore", message=".*use of fork\\(\\) may lead to deadlocks", category=DeprecationWarning)
            batches = iter(loader)
        for x, y, damaged in batches:
            for name, reason in damaged:
                self.part.damage.add(name, reason, self.part.name)
            if len(y):
                yield x, y


def _leave_signals_to_the_parent(worker: int) -> None:
    """A terminal interrupts all processes, but the parent decides when the workers end, with SIGTERM if they do not by themselves."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _as_it_is(item: Any) -> Any:
    return item


class _Pass(Dataset[tuple[Tensor, Tensor, list[tuple[str, str]]]]):
    """Item i is the i-th batch of a pass: (x uint8 [B, C, S, S], y [B], [(name, reason)] of images that cannot be read).

    seeds    [N] one per image of the part, to augment with; None for plain images
    replace  put another image in the place of one that cannot be read
    """

    def __init__(self, part: Images, batches: list[Tensor], seeds: Tensor | None = None, replace: bool = False) -> None:
        self.part, self.chosen, self.seeds, self.replace = part, batches, seeds, replace
        self.transform = part.transforms.plain if seeds is None else part.transforms.augmented

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor, list[tuple[str, str]]]:
        at_once = getattr(self.part.reader, "images", None)
        if at_once is not None and self.transform is None:
            chosen = self.chosen[number]
            return at_once(self.part.index[chosen]), self.part.y[chosen], []
        images, labels = [], []
        damaged: dict[str, str] = {}
        generator = torch.default_generator
        before = generator.get_state()
        try:
            for place in self.chosen[number].tolist():
                found = self._image(place, damaged)
                if found is not None:
                    images.append(found[0])
                    labels.append(found[1])
        finally:
            generator.set_state(before)
        if not images:
            return torch.empty(0), torch.empty(0, dtype=torch.int64), list(damaged.items())
        return torch.stack(images), torch.stack(labels), list(damaged.items())

    def _image(self, place: int, damaged: dict[str, str]) -> tuple[Tensor, Tensor] | None:
        part = self.part
        attempts = min(len(part), part.damage.limit + 1) if self.replace else 1
        for attempt in range(attempts):
            at = (place + attempt) % len(part)
            index = int(part.index[at])
            try:
                image = part.reader.image(index)
            except DamagedImageError as error:
                damaged[part.reader.name(index)] = str(error)
                continue
            if self.seeds is not None:
                torch.default_generator.manual_seed(int(self.seeds[place]))
            return image if self.transform is None else self.transform(image), part.y[at]
        return None

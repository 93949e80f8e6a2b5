"""A task: three parts of labelled images, and how batches are drawn from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from .order import DataError, Order

__all__ = ["Augment", "Batches", "DataError", "Loader", "Part", "Split", "Task", "stratified"]

Augment = Callable[[Tensor, torch.Generator], Tensor]


class Batches(Protocol):
    """A loader: a known number of batches (x [B, C, H, W] float32, y [B] int64), afresh on every pass."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...
    def __len__(self) -> int: ...


class Part(Protocol):
    """One part of a data set, wherever its images are."""

    def __len__(self) -> int: ...

    def example(self, count: int) -> Tensor:
        """The first images as a network gets them, x [count, C, H, W], not augmented."""

    def divided(self, fractions: Sequence[float], seed: int) -> Sequence[Part]:
        """Disjoint parts that hold these fractions, and together everything; class proportions are kept where labels are known."""

    def to(self, device: torch.device | str) -> Part:
        """The same part, whose batches come on `device`."""

    def loader(
        self, batch_size: int, generator: torch.Generator | None, augment: Augment | None, drop_last: bool, shard: tuple[int, int]
    ) -> Batches:
        """Batches as `Task.loader` describes them. Parts that augment in ways of their own do so if `augment` is not None."""


@dataclass(frozen=True, eq=False)
class Split:
    """A part in memory: x [N, C, H, W] float32, y [N] int64. Indexing gives (x, y), so torch's DataLoader takes it too."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return self.y.shape[0]

    def __getitem__(self, index: int | slice | Tensor) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]

    def to(self, device: torch.device | str) -> Split:
        return Split(self.x.to(device), self.y.to(device))

    def example(self, count: int) -> Tensor:
        return self.x[:count]

    def divided(self, fractions: Sequence[float], seed: int) -> list[Split]:
        return [Split(*self[index]) for index in stratified(self.y, fractions, seed)]

    def loader(
        self, batch_size: int, generator: torch.Generator | None, augment: Augment | None, drop_last: bool, shard: tuple[int, int]
    ) -> Loader:
        return Loader(self, batch_size, generator, augment, drop_last, shard)


@dataclass
class Loader:
    """Batches of a split: x [B, C, H, W] in channels_last, y [B], on the device of the split.

    With a generator every pass is shuffled anew and augmented; without one, the order is that of the split and nothing is augmented.
    A pass takes exactly one number from the generator, when it starts: its state between passes is all that a resumed run needs, and
    leaving a pass early changes nothing later. `shard` = (rank, number of ranks) gives this rank its share of every batch when all ranks
    hold generators in the same state (see Order); what it gets is augmented as in the batch of one process.
    """

    split: Split
    batch_size: int
    generator: torch.Generator | None = None
    augment: Augment | None = None
    drop_last: bool = False
    shard: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        self.order = Order(len(self.split), self.batch_size, self.generator, self.drop_last, self.shard)

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        batches, generator = self.order.draw()
        for index in batches:
            x, y = self.split[index.to(self.split.x.device)]
            if generator is not None and self.augment is not None:
                x = self.augment(x, generator)
            yield self.order.share(x).contiguous(memory_format=torch.channels_last), self.order.share(y)


def unchanged(x: Tensor, generator: torch.Generator) -> Tensor:
    """No augmentation."""
    return x


@dataclass(frozen=True, eq=False)
class Task:
    """A classification problem: images of in_channels x image_size x image_size, and disjoint parts train, val and test.

    A search sees train and val; test is for the number that is reported at the end.
    """

    name: str
    in_channels: int
    image_size: int
    num_classes: int
    train: Part
    val: Part
    test: Part
    augment: Augment | None = None

    def part(self, name: str) -> Part:
        parts = {"train": self.train, "val": self.val, "test": self.test}
        if name not in parts:
            raise DataError(f"unknown part {name!r} of {self.name}; parts: train, val, test")
        return parts[name]

    def loader(
        self,
        part: str | Part,
        batch_size: int,
        generator: torch.Generator | None = None,
        augment: bool | None = None,
        *,
        drop_last: bool = False,
        shard: tuple[int, int] = (0, 1),
    ) -> Batches:
        """Batches of "train", "val", "test" or of a part such as a training half.

        batch_size counts the samples of all ranks. Shuffled if a generator is given. augment=None augments exactly when a generator is
        given and `part` is neither "val" nor "test"; a part that is no name is taken to be training data.
        """
        chosen = self.part(part) if isinstance(part, str) else part
        if augment is None:
            augment = generator is not None and part not in ("val", "test")
        if augment and generator is None:
            raise DataError("augmentation draws random numbers: give the loader a generator")
        return chosen.loader(batch_size, generator, (self.augment or unchanged) if augment else None, drop_last, shard)

    def example(self, count: int = 2) -> Tensor:
        """The first training images as a network gets them, x [count, C, H, W], not augmented."""
        return self.train.example(count)

    def train_halves(self, seed: int = 0) -> tuple[Part, Part]:
        """Two disjoint stratified halves of train: for bilevel searches, weights learn on the first and logits on the second."""
        first, second = self.train.divided((0.5, 0.5), seed)
        return first, second

    def to(self, device: torch.device | str) -> Task:
        """The same task with its batches on `device`; generators stay on the CPU."""
        return replace(self, train=self.train.to(device), val=self.val.to(device), test=self.test.to(device))


def stratified(labels: Tensor, fractions: Sequence[float], seed: int) -> list[Tensor]:
    """Indices of disjoint parts that hold the given fractions of every class (up to one sample) and together everything.

    labels [N] ints; the parts depend on labels, fractions and seed only; every part is sorted.
    """
    if min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-6:
        raise DataError(f"fractions must be positive and sum to 1, got {tuple(fractions)}")
    labels = labels.cpu()
    generator = torch.Generator().manual_seed(seed)
    bounds = torch.tensor([0.0, *fractions], dtype=torch.float64).cumsum(0)
    parts: list[list[Tensor]] = [[] for _ in fractions]
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        cuts = (bounds * len(members)).round().long().tolist()
        for part, start, stop in zip(parts, cuts, cuts[1:]):
            part.append(members[start:stop])
    return [torch.cat(part).sort().values for part in parts]

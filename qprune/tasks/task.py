"""A task: three splits of labelled images, and how batches are drawn from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..kernels import QPruneError

Augment = Callable[[Tensor, torch.Generator], Tensor]


class DataError(QPruneError, ValueError):
    """An unknown data set or part, an impossible option, or a package that the data set needs and that is missing."""


@dataclass(frozen=True, eq=False)
class Split:
    """One part of a data set: x [N, C, H, W] float32, y [N] int64. Indexing gives (x, y), so torch's DataLoader takes it too."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return self.y.shape[0]

    def __getitem__(self, index: int | slice | Tensor) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]

    def to(self, device: torch.device | str) -> Split:
        return Split(self.x.to(device), self.y.to(device))


@dataclass
class Loader:
    """Batches of a split: x [B, C, H, W] in channels_last, y [B], on the device of the split.

    With a generator every pass is shuffled anew and augmented; without one, the order is that of the split and nothing is augmented.
    A pass takes exactly one number from the generator, when it starts: its state between passes is all that a resumed run needs, and
    leaving a pass early changes nothing later. `shard` = (rank, number of ranks) gives this rank its equal share of every pass when all
    ranks hold generators in the same state; up to ranks - 1 samples of a pass are then left out.
    """

    split: Split
    batch_size: int
    generator: torch.Generator | None = None
    augment: Augment | None = None
    drop_last: bool = False
    shard: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        rank, ranks = self.shard
        if self.batch_size < 1:
            raise DataError(f"batch_size must be at least 1, got {self.batch_size}")
        if not 0 <= rank < ranks:
            raise DataError(f"shard must be (rank, ranks) with 0 <= rank < ranks, got {self.shard}")
        if len(self) == 0:
            raise DataError(f"no batch of {self.batch_size} in {len(self.split)} samples over {ranks} ranks (drop_last={self.drop_last})")

    def __len__(self) -> int:
        samples = len(self.split) // self.shard[1]
        return samples // self.batch_size if self.drop_last else -(-samples // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        rank, ranks = self.shard
        total = len(self.split)
        generator = None
        order = torch.arange(total)
        if self.generator is not None:
            seed = int(torch.randint(2**62, (), generator=self.generator, device=self.generator.device))
            generator = torch.Generator().manual_seed(seed)
            order = torch.randperm(total, generator=generator)
        order = order[rank : total // ranks * ranks : ranks].to(self.split.x.device)
        for index in order.split(self.batch_size)[: len(self)]:
            x, y = self.split[index]
            if generator is not None and self.augment is not None:
                x = self.augment(x, generator)
            yield x.contiguous(memory_format=torch.channels_last), y


@dataclass(frozen=True, eq=False)
class Task:
    """A classification problem: images of in_channels x image_size x image_size, and disjoint parts train, val and test.

    A search sees train and val; test is for the number that is reported at the end.
    """

    name: str
    in_channels: int
    image_size: int
    num_classes: int
    train: Split
    val: Split
    test: Split
    augment: Augment | None = None

    def part(self, name: str) -> Split:
        if name not in ("train", "val", "test"):
            raise DataError(f"unknown part {name!r} of {self.name}; parts: train, val, test")
        split: Split = getattr(self, name)
        return split

    def loader(
        self,
        part: str | Split,
        batch_size: int,
        generator: torch.Generator | None = None,
        augment: bool | None = None,
        *,
        drop_last: bool = False,
        shard: tuple[int, int] = (0, 1),
    ) -> Loader:
        """Batches of "train", "val", "test" or of a split such as a training half.

        Shuffled if a generator is given. augment=None augments exactly when a generator is given and `part` is neither "val" nor
        "test"; a split is taken to be training data.
        """
        split = part if isinstance(part, Split) else self.part(part)
        if augment is None:
            augment = generator is not None and part not in ("val", "test")
        if augment and generator is None:
            raise DataError("augmentation draws random numbers: give the loader a generator")
        return Loader(split, batch_size, generator, self.augment if augment else None, drop_last, shard)

    def train_halves(self, seed: int = 0) -> tuple[Split, Split]:
        """Two disjoint stratified halves of train: for bilevel searches, weights learn on the first and logits on the second."""
        first, second = stratified(self.train.y, (0.5, 0.5), seed)
        return Split(*self.train[first]), Split(*self.train[second])

    def to(self, device: torch.device | str) -> Task:
        """The same task with its tensors on `device`; generators stay on the CPU."""
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

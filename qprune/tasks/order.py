"""In which order a pass draws samples: shuffled anew from one number of a generator, cut into batches, shared between ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import QPruneError


class DataError(QPruneError, ValueError):
    """An unknown data set or part, an impossible option, files that are missing or damaged, or a package that is missing."""


@dataclass
class Order:
    """Batches of indices into `total` samples. A pass takes exactly one number from the generator, when it starts.

    shard  (rank, ranks): of every batch, those that this rank has. In shuffled passes all ranks have equally many, for which up to
           ranks - 1 samples of a pass are left out; in plain passes they have all together, and a rank may have no share of the last batch
    """

    total: int
    batch_size: int
    generator: torch.Generator | None = None
    drop_last: bool = False
    shard: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        rank, ranks = self.shard
        if self.batch_size < 1:
            raise DataError(f"batch_size must be at least 1, got {self.batch_size}")
        if not 0 <= rank < ranks:
            raise DataError(f"shard must be (rank, ranks) with 0 <= rank < ranks, got {self.shard}")
        if self.generator is not None and self.batch_size % ranks:
            raise DataError(f"batch_size: {self.batch_size} samples cannot be shared equally by {ranks} ranks; choose a multiple")
        if self.batch_size < ranks or not self._sizes(0):
            raise DataError(f"no batch of {self.batch_size} in {self.total} samples over {ranks} ranks (drop_last={self.drop_last})")

    def __len__(self) -> int:
        return len(self._sizes(self.shard[0]))

    def draw(self) -> tuple[list[Tensor], torch.Generator | None]:
        """The next pass: its batches of indices, of all ranks, and a generator for whatever else is random in it; without a generator, the
        samples as they lie, and None."""
        drawn, order = None, torch.arange(self.total)
        if self.generator is not None:
            seed = int(torch.randint(2**62, (), generator=self.generator, device=self.generator.device))
            drawn = torch.Generator().manual_seed(seed)
            order = torch.randperm(self.total, generator=drawn)
        sizes = self._sizes(self.shard[0])
        return list(order[: sum(sizes)].split(sizes)), drawn

    def share(self, batch: Tensor) -> Tensor:
        """This rank's items of a batch."""
        return batch[self.shard[0] :: self.shard[1]]

    def _sizes(self, rank: int) -> list[int]:
        """Of the batches in which a rank has a share; theirs, not the share's."""
        ranks = self.shard[1]
        total = self.total if self.generator is None else self.total // ranks * ranks
        whole, rest = divmod(total, self.batch_size)
        return [self.batch_size] * whole + ([rest] if rest > rank and not self.drop_last else [])

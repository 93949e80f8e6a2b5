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
    """Batches of indices into `total` samples. A pass takes exactly one number from the generator, when it starts."""

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
        if len(self) == 0:
            raise DataError(f"no batch of {self.batch_size} in {self.total} samples over {ranks} ranks (drop_last={self.drop_last})")

    def __len__(self) -> int:
        samples = self.total // self.shard[1]
        return samples // self.batch_size if self.drop_last else -(-samples // self.batch_size)

    def draw(self) -> tuple[list[Tensor], torch.Generator | None]:
        """The next pass: its batches of indices, and a generator for whatever else is random in it; without a generator, the samples as
        they lie, and None."""
        rank, ranks = self.shard
        drawn, order = None, torch.arange(self.total)
        if self.generator is not None:
            seed = int(torch.randint(2**62, (), generator=self.generator, device=self.generator.device))
            drawn = torch.Generator().manual_seed(seed)
            order = torch.randperm(self.total, generator=drawn)
        order = order[rank : self.total // ranks * ranks : ranks]
        return list(order.split(self.batch_size)[: len(self)]), drawn

"""A task around the user's own loaders, taken as they are: their batches, their order, their augmentation."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, RandomSampler, SequentialSampler, Subset

from .order import DataError
from .prefetch import prefetched
from .task import Augment, Batches, Task, stratified

log = logging.getLogger("qprune")

PARTS = ("train", "val", "test")


@dataclass(frozen=True, eq=False)
class Taken:
    """A part whose batches come from a loader: torch's DataLoader, or anything with a length that gives (x, y) afresh on every pass."""

    name: str
    source: Any
    device: str = "cpu"

    def __len__(self) -> int:
        dataset: Any = getattr(self.source, "dataset", None)
        return len(dataset) if hasattr(dataset, "__len__") else len(self.source)

    def example(self, count: int) -> Tensor:
        found: list[Tensor] = []
        for x, _ in OwnLoader(self, None):
            found += x
            if len(found) >= count:
                break
        if not found:
            raise DataError(f"{self.name}: the loader gave no batch")
        return torch.stack(found[:count])

    def divided(self, fractions: Sequence[float], seed: int) -> list[Taken]:
        loader = self.source
        plain = isinstance(loader, DataLoader) and isinstance(loader.sampler, RandomSampler | SequentialSampler)
        if not plain or loader.batch_size is None or not hasattr(loader.dataset, "__getitem__"):
            raise DataError(
                f"{self.name}: this method trains on parts of the training data, and {type(loader).__name__} cannot be divided; return a "
                "torch DataLoader over a map-style dataset, with or without shuffle, or a qprune.tasks.data.Task"
            )
        targets = getattr(loader.dataset, "targets", None)
        known = targets is not None and len(targets) == len(self)
        labels = torch.as_tensor(targets) if known else torch.zeros(len(self), dtype=torch.int64)
        return [replace(self, source=_on(loader, Subset(loader.dataset, i.tolist()))) for i in stratified(labels, fractions, seed)]

    def to(self, device: torch.device | str) -> Taken:
        return replace(self, device=str(device))

    def loader(
        self, batch_size: int, generator: torch.Generator | None, augment: Augment | None, drop_last: bool, shard: tuple[int, int]
    ) -> OwnLoader:
        return OwnLoader(replace(self, source=_shared(self.source, shard, generator is not None)), generator)


def _on(loader: DataLoader[Any], dataset: Dataset[Any]) -> DataLoader[Any]:
    """A loader like this one over other data."""
    shuffle = isinstance(loader.sampler, RandomSampler)
    return _like(loader, dataset, batch_size=loader.batch_size, shuffle=shuffle, drop_last=loader.drop_last)


def _like(loader: DataLoader[Any], dataset: Dataset[Any], **order: Any) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        **order,
    )


def _shared(loader: Any, shard: tuple[int, int], even: bool) -> Any:
    """A loader of this rank's share of every batch. One with a DistributedSampler, whose batches are shares already, stays as it is; of one
    that is no DataLoader over a map-style dataset, every rank reads whole batches."""
    if shard[1] == 1 or isinstance(getattr(loader, "sampler", None), DistributedSampler):
        return loader
    if isinstance(loader, DataLoader) and loader.batch_sampler is not None:
        shares = _like(loader, loader.dataset, batch_sampler=_Shares(loader.batch_sampler, shard, even))
        shares.generator = loader.generator
        return shares
    return _Shares(loader, shard, even)


@dataclass
class _Shares:
    """Of every batch of `source`, a list or a pair of tensors, this rank's share; batches of which it has none are left out.

    even  shares are as large as those of the others
    """

    source: Any
    shard: tuple[int, int]
    even: bool

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.source:
            pair = isinstance(batch, tuple | list) and any(isinstance(item, Tensor) for item in batch)
            share = [self._of(item) for item in batch] if pair else self._of(batch)
            if len(share[0] if pair else share):
                yield share

    def _of(self, items: Any) -> Any:
        rank, ranks = self.shard
        return items[rank : len(items) // ranks * ranks if self.even else len(items) : ranks]


@dataclass
class OwnLoader:
    """Passes over the loader of a part, each with the random numbers of one seed, taken from the generator when the pass starts.

    The loader's sampler, its workers and what draws from torch's global generator in it get that seed; the global generator itself is as if
    nothing had been drawn. Python's and numpy's generators are seeded in worker processes only.
    """

    part: Taken
    generator: torch.Generator | None = None

    def __len__(self) -> int:
        return len(self.part.source)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        seed = 0
        if self.generator is not None:
            seed = int(torch.randint(2**62, (), generator=self.generator, device=self.generator.device))
        yield from prefetched(self._batches(seed), torch.device(self.part.device))

    def _batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        source, state = self.part.source, _State(seed)
        for owner in _chain(source):
            own = getattr(owner, "generator", None)
            if isinstance(own, torch.Generator):
                own.manual_seed(seed)
            if isinstance(owner, DistributedSampler):
                owner.set_epoch(seed % 2**31)
        with state.current():
            batches = iter(source)
        while True:
            with state.current():
                batch = next(batches, None)
            if batch is None:
                return
            yield _checked(self.part.name, batch)


def _chain(loader: Any) -> Iterator[Any]:
    """A loader, and what it draws its order from."""
    yield loader
    for name in ("sampler", "batch_sampler", "source"):
        inner = getattr(loader, name, None)
        if inner is not None:
            yield from _chain(inner)


class _State:
    """A state of torch's global generator beside the one in use."""

    def __init__(self, seed: int) -> None:
        self.state = torch.Generator().manual_seed(seed).get_state()

    @contextmanager
    def current(self) -> Iterator[None]:
        before = torch.default_generator.get_state()
        torch.default_generator.set_state(self.state)
        try:
            yield
        finally:
            self.state = torch.default_generator.get_state()
            torch.default_generator.set_state(before)


def _checked(name: str, batch: Any) -> tuple[Tensor, Tensor]:
    """(x, y), x in channels_last. Raises DataError for anything but float images and whole-numbered labels."""
    if not (isinstance(batch, list | tuple) and len(batch) == 2 and all(isinstance(item, Tensor) for item in batch)):
        raise DataError(f"{name}: a batch is {_described(batch)}; expected (x, y), x [B, C, H, W] float, y [B] int64")
    x, y = batch
    if x.dim() != 4 or not x.is_floating_point() or y.shape != x.shape[:1] or y.is_floating_point():
        raise DataError(f"{name}: a batch is {_described(batch)}; expected x [B, C, H, W] float, y [B] int64")
    return x.contiguous(memory_format=torch.channels_last), y.long()


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, list | tuple) and len(value) <= 4:
        return f"({', '.join(_described(item) for item in value)})"
    return type(value).__name__


def of_loaders(name: str, made: Any, num_classes: int | None) -> Task:
    """A task of three loaders, in a sequence or in a mapping by part."""
    if isinstance(made, Mapping):
        made = [made.get(part) for part in PARTS]
    if not isinstance(made, list | tuple) or len(made) != len(PARTS) or not all(_is_loader(loader) for loader in made):
        raise DataError(
            f"{name} returned {_described(made)}; expected a qprune.tasks.data.Task, or loaders (train, val, test) that have a length "
            "and give batches (x, y)"
        )
    train, val, test = (Taken(f"{name}, {part}", loader) for part, loader in zip(PARTS, made))
    example = train.example(1)
    classes = num_classes if num_classes is not None else _classes(made[0])
    if isinstance(classes, bool) or not isinstance(classes, int) or classes < 2:
        raise DataError(f"{name}: the number of classes is unknown; give --data-option num_classes=N, or the dataset an attribute classes")
    return Task(name, example.shape[1], example.shape[-1], classes, train, val, test)


def _is_loader(value: Any) -> bool:
    return hasattr(value, "__iter__") and hasattr(value, "__len__") and not isinstance(value, Tensor | str)


def _classes(loader: Any) -> int | None:
    dataset = getattr(loader, "dataset", None)
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    classes: Any = getattr(dataset, "classes", None)
    return len(classes) if hasattr(classes, "__len__") else None


__all__ = ["Batches", "OwnLoader", "Taken", "of_loaders"]

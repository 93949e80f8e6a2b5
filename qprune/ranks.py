"""The processes of a distributed job: which one this is, and how they come to agree.

Programs that torchrun starts join with `joined`; what takes a `Ranks` then works for any number of processes, `ALONE` being one. All ranks
must call what is collective here, in the same order.
"""

from __future__ import annotations

import gc
import hashlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qprune.kernels import QPruneError
from qprune.wrappers import distributed

T = TypeVar("T")
_PATIENCE = 5.0
"""Seconds that a rank with an error waits for the others to have one."""


class RankError(QPruneError, RuntimeError):
    """Another process of the job failed or is gone, or the processes do not agree."""


@dataclass(frozen=True)
class Ranks:
    """rank   of this process, 0 … count - 1; rank 0 writes files and reports
    local  the number of this process on its machine
    group  of torch.distributed; None: the default one
    place  of what it exchanges: "cpu", or "cuda" where it connects GPUs only
    """

    rank: int = 0
    count: int = 1
    local: int = 0
    group: Any = None
    place: str = "cpu"

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self.count == 1

    @property
    def shard(self) -> tuple[int, int]:
        return self.rank, self.count

    def largest(self, *numbers: int) -> tuple[int, ...]:
        """Of every number, the largest that a rank has."""
        if self.alone:
            return numbers
        found = torch.tensor(numbers, dtype=torch.int64, device=self.place)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, group=self.group)
        return tuple(found.tolist())

    def all(self, flag: Tensor | bool) -> bool:
        """Is it so on every rank?"""
        return not self.largest(int(not bool(flag)))[0]

    def total(self, value: Tensor) -> Tensor:
        """The sum over the ranks."""
        if not self.alone:
            value = value.clone()
            torch.distributed.all_reduce(value, group=self.group)
        return value

    def mean(self, value: Tensor) -> Tensor:
        return value if self.alone else self.total(value) / self.count

    def means(self, values: Sequence[Tensor]) -> list[Tensor]:
        """The means of tensors of one type on one device."""
        if self.alone or not values:
            return list(values)
        together = self.mean(torch.cat([value.flatten() for value in values]))
        return [mean.view(value.shape) for mean, value in zip(together.split([v.numel() for v in values]), values, strict=True)]

    def gathered(self, value: T) -> list[T]:
        """The values of all ranks, in their order."""
        if self.alone:
            return [value]
        found: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(found, value, group=self.group)
        return found

    def from_main(self, work: Callable[..., T], *args: Any) -> T:
        """What work(*args) returns on rank 0, which alone calls it. Where it raises, RankError on the others."""
        if self.alone:
            return work(*args)
        result: list[Any] = [None, None]
        error: BaseException | None = None
        if self.main:
            try:
                result[1] = work(*args)
            except BaseException as raised:
                error, result[0] = raised, f"{type(raised).__name__}: {' '.join(str(raised).split())}"
        torch.distributed.broadcast_object_list(result, group=self.group, group_src=0)
        if error is not None:
            raise error
        if result[0] is not None:
            raise RankError(f"rank 0 stopped ({result[0]})")
        return result[1]  # type: ignore[no-any-return]

    def agree(self, what: str, text: str) -> None:
        """Raise RankError unless all ranks have the same text."""
        digests = self.gathered(hashlib.sha256(text.encode()).hexdigest())
        others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
        if others:
            raise RankError(
                f"the ranks have come to different results: the {what} of rank {others[0]} is not that of rank 0; run all of them on the "
                "same kind of hardware and with the same versions"
            )

    def wrapped(self, model: nn.Module) -> nn.Module:
        """The model in DistributedDataParallel, which begins with the parameters of rank 0; alone, the model itself."""
        if self.alone or not any(p.requires_grad for p in model.parameters()):
            return model
        # of a weight with one input channel, whose layout has two names
        warnings.filterwarnings("ignore", message=r"Grad strides do not match bucket view strides(.|\n)*grad\.sizes\(\) = \[\d+, 1, ")
        device = next(model.parameters()).device
        places = [device.index] if device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=places, process_group=self.group)

    @torch.no_grad()
    def synchronise(self, model: nn.Module) -> None:
        """Give all ranks the parameters and buffers of rank 0."""
        if not self.alone:
            for value in (*model.parameters(), *model.buffers()):
                dense = value if value.is_contiguous() else value.contiguous()
                torch.distributed.broadcast(dense, group=self.group, group_src=0)
                if dense is not value:
                    value.copy_(dense)


ALONE = Ranks()


def current() -> Ranks:
    """Of the job that torch.distributed knows; alone where it knows none."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return _ranks(None)
    return ALONE


def ranks_of(model: nn.Module) -> Ranks:
    """Those that train the model together: the ranks of its DistributedDataParallel; alone without it."""
    wrapper = distributed(model)
    return ALONE if wrapper is None else _ranks(wrapper.process_group)


def _ranks(group: Any) -> Ranks:
    local = int(os.environ.get("LOCAL_RANK", "0"))
    place = "cpu" if "cpu:" in torch.distributed.get_backend_config(group) else "cuda"
    return Ranks(torch.distributed.get_rank(group), torch.distributed.get_world_size(group), local, group, place)


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean over the ranks of a distributed job; the value itself where there is none."""
    return current().mean(value)


@contextmanager
def joined(minutes: float = 10.0) -> Iterator[Ranks]:
    """The job that torchrun started this process for, until the end; alone if it did not. NCCL connects the GPUs, of which the process
    gets the one with its number on the machine, gloo the CPUs.

    minutes  that a rank waits for the others before it gives up

    Raises RankError where another rank is gone.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield current()
        return
    backend = "gloo"
    if torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local < torch.cuda.device_count():
            torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    torch.distributed.init_process_group(backend, timeout=timedelta(minutes=minutes))
    ranks = current()
    try:
        yield ranks
        _leave(ranks, minutes * 60)
    except RankError:
        raise
    except BaseException as error:
        if is_lost(error):
            raise lost(error) from error
        _leave(ranks, _PATIENCE)
        raise
    finally:
        gc.collect()  # wrappers hold the group, and with it threads, in reference cycles
        torch.distributed.destroy_process_group()


def _leave(ranks: Ranks, seconds: float) -> None:
    """Wait until all ranks have come here: a connection that is closed spoils what another one is about to finish."""
    store, wait = torch.distributed.distributed_c10d._get_default_store(), timedelta(seconds=seconds)
    try:
        store.set(f"qprune/left/{ranks.rank}", "")
        store.wait([f"qprune/left/{rank}" for rank in range(ranks.count)] if ranks.main else ["qprune/left/all"], wait)
        if ranks.main:
            store.set("qprune/left/all", "")
    except RuntimeError:
        pass  # too late, or rank 0, which may keep the store, is gone


def lost(error: BaseException, where: str = "") -> RankError:
    """What to raise for an error that `is_lost`."""
    return RankError(f"{where}another process of the run ended, or does not answer ({' '.join(str(error).split())[:200]})")


def is_lost(error: BaseException) -> bool:
    """Does the error say that another rank is gone, or did not answer in time?"""
    text = str(error)
    known = isinstance(error, torch.distributed.DistError) if torch.distributed.is_available() else False
    return known or any(word in text for word in ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer"))

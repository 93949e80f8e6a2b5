"""Batches on the device before they are asked for: while one is used, the next is copied on a stream of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

Batch = tuple[Tensor, Tensor]


def prefetched(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches on `device`, in the same order. Copies overlap with computing only on CUDA, and from pinned memory."""
    if device.type != "cuda":
        for x, y in batches:
            yield x.to(device), y.to(device)
        return
    stream = torch.cuda.Stream(device)
    waiting: tuple[Batch, torch.cuda.Event] | None = None
    for x, y in batches:
        with torch.cuda.stream(stream):
            moved = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(stream)
        if waiting is not None:
            yield _handed_over(*waiting)
        waiting = moved, copied
    if waiting is not None:
        yield _handed_over(*waiting)


def _handed_over(batch: Batch, copied: torch.cuda.Event) -> Batch:
    """The batch, for use on the current stream: work there waits for the copy, and the memory is not given away before that work."""
    stream = torch.cuda.current_stream(batch[0].device)
    stream.wait_event(copied)
    for tensor in batch:
        tensor.record_stream(stream)
    return batch

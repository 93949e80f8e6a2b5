"""A training step as a CUDA graph: recorded once for every shape of batch, then replayed with one launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qprune.errors import InputError

Update = Callable[..., Tensor]
"""(closure, batch) → a tensor of numbers about the step. Works on the device alone: nothing in it may wait for a result."""


class Recorder:
    """Calls update(closure, batch), and after `warmup` calls with one shape of batch records it and replays the record.

    A record repeats what the first recorded closure did: later closures must do the same with their batch. New batches are copied into
    the tensors that were recorded.
    """

    def __init__(self, device: torch.device, warmup: int = 3) -> None:
        if device.type != "cuda":
            raise InputError(f"cuda_graph=True needs a model on a CUDA device, got {device}: leave it out, or move the model first")
        self.warmup = warmup
        self.calls: dict[Any, int] = {}
        self.records: dict[Any, tuple[Callable[[], Tensor], list[Tensor]]] = {}
        self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def __call__(self, update: Update, closure: Callable[..., Tensor], batch: Sequence[Tensor]) -> Tensor:
        key = (getattr(update, "__name__", ""), *((t.shape, t.dtype, t.stride()) for t in batch))
        if key not in self.records:
            self.calls[key] = self.calls.get(key, 0) + 1
            if self.calls[key] <= self.warmup:
                return self.aside(lambda: update(closure, batch))
            static = [t.clone() for t in batch]
            self.records[key] = (self.record(lambda: update(closure, static)), static)
        replay, static = self.records[key]
        for target, source in zip(static, batch, strict=True):
            target.copy_(source, non_blocking=True)
        return replay().clone()

    def clear(self) -> None:
        """Forget the records, since tensors that they work on were replaced."""
        self.calls.clear()
        self.records.clear()

    def aside(self, run: Callable[[], Tensor]) -> Tensor:
        """Run on a stream of its own, as calls before a capture must."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            out = run()
        torch.cuda.current_stream().wait_stream(self.stream)
        return out

    def record(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Capture `run`, without its effects. The result replays it and returns its output, which the next replay overwrites."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            out = run()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay

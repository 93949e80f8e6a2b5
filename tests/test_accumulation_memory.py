"""Gradient accumulation: the memory of a part, and whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accumulation_cases import data, search_on, trainer_on
from resume_cases import METHODS, Small, options, patch
from test_seeds import Silent
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qprune.seeds import run


class Peak(TorchDispatchMode):
    """The most bytes that tensors made meanwhile took at a time, each storage once."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.given = {t.untyped_storage().data_ptr() for t in given}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.alive = {address: entry for address, entry in self.alive.items() if not entry[0].expired()}
        for t in tree_leaves(out):
            storage = t.untyped_storage() if isinstance(t, Tensor) else None
            if storage is not None and storage.data_ptr() not in self.given:
                self.alive[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return out


@pytest.mark.parametrize("case", ["edmips", "darts", "darts-second", "zur", "zur-gumbel", "slimmable", "sbs", "annc"])
def test_memory_is_that_of_a_part(case: str) -> None:
    """And the gradients so far."""
    gradients = 0

    def most(size: int, accumulate: int) -> int:
        nonlocal gradients
        search, (batch, other) = search_on(case, accumulate), data(2, size)
        search.fit([batch], [other])  # what stays from step to step is there then
        with Peak(*batch, *other, *search.model.parameters(), *search.model.buffers()) as peak:
            search.fit([batch], [other])
        gradients = sum(p.nbytes for p in search.model.parameters())
        return peak.most

    part, whole, accumulated = most(64, 1), most(256, 1), most(256, 4)
    assert whole > 3 * part
    assert accumulated <= 1.05 * part + gradients


def test_memory_of_training() -> None:
    def most(size: int, accumulate: int) -> int:
        trainer, (batch,) = trainer_on(accumulate), data(1, size)
        with Peak(*batch, *trainer.model.parameters()) as peak:
            trainer.fit([batch])
        return peak.most

    part, whole, accumulated = most(64, 1), most(256, 1), most(256, 4)
    assert whole > 3 * part
    assert accumulated <= 1.05 * part


@pytest.mark.parametrize("case", METHODS)
def test_run(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every phase trains on parts: no pass with gradients sees more than 4 of 11 samples."""
    patch(monkeypatch)
    sizes: set[int] = set()
    forward = Small.forward

    def watched(self: Small, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and self.training:
            sizes.add(len(x))
        return forward(self, x)

    monkeypatch.setattr(Small, "forward", watched)
    short = {"float_epochs": 1, "search_epochs": 1, "finetune_epochs": 1, "batch_size": 11, "accumulate": 3}
    result = run(options(case, **short), tmp_path, Silent())
    assert sizes <= {2, 3, 4} and {3, 4} <= sizes, sizes
    assert result["options"]["accumulate"] == 3
    assert all(0 <= network["accuracy"] <= 1 for network in result["runs"][0]["networks"].values())

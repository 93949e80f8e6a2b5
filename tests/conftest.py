"""Fixtures for every test: seeds, and outputs that are NaN until something writes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import qprune.kernels.layout


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An element that a kernel leaves unwritten is NaN, so that some comparison fails."""
    original: Callable[..., torch.Tensor] = qprune.kernels.layout.empty_output

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = original(*args, **kwargs)
        return out if isinstance(out, torch._subclasses.FakeTensor) else out.fill_(torch.nan)

    monkeypatch.setattr(qprune.kernels.layout, "empty_output", poisoned)
    yield

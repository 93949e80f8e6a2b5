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

    def poisoned(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
            out = original(*args, **kwargs)
            return out.fill_(torch.nan) if out.is_floating_point() and not isinstance(out, torch._subclasses.FakeTensor) else out

        return empty

    for name in ("empty", "empty_output"):
        monkeypatch.setattr(qprune.kernels.layout, name, poisoned(getattr(qprune.kernels.layout, name)))
    yield

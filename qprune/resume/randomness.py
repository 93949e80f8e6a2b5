"""Every source of random numbers that a run draws from."""

from __future__ import annotations

import os
import random
from typing import Any

import numpy as np
import torch


def seed_all(seed: int) -> None:
    """Seed torch on all devices, Python and NumPy."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def differ(seed: int, rank: int) -> None:
    """Let torch draw other random numbers on every rank but 0 from now on: their batches should not all lose the same units to dropout."""
    if rank:
        torch.manual_seed((seed + rank * 0x9E3779B97F4A7C15) % 2**63)


def snapshot(generator: torch.Generator) -> dict[str, Any]:
    """The states of `generator` and of the global ones of torch (with that of the present GPU), Python and NumPy."""
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "generator": generator.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        "python": (version, torch.tensor(words, dtype=torch.int64), gauss),
        "numpy": (torch.from_numpy(np.asarray(keys).astype(np.int64)), int(position), int(has_gauss), float(cached)),
    }


def restore(state: dict[str, Any], generator: torch.Generator) -> None:
    """Put all of them where they were at the snapshot."""
    generator.set_state(state["generator"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, cached))


def be_deterministic() -> None:
    """Let torch use deterministic algorithms only, from now on: with the same seed, one device gives the same bits again. Operations that
    have none then raise RuntimeError. Call it before anything runs on a GPU."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False

"""Versions and machine of a piece of work, as its files and reports show them."""

from __future__ import annotations

import platform
from importlib.metadata import version

import torch

from qprune._version import __version__
from qprune.precision import described, device_of
from qprune.ranks import ALONE, Ranks


def environment(device: str = "cpu", ranks: Ranks = ALONE) -> dict[str, str]:
    """device: a word of `qprune.precision.device_of`."""
    found = device_of(device)
    return {
        "qprune": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": version("numpy"),
        "scipy": version("scipy"),
        "device": described(found),
        "computed on": str(found),
        "threads": str(torch.get_num_threads()),
        "processes": str(ranks.count),
    }

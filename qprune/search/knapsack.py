"""The multiple-choice knapsack: one choice per item, highest score, under several limits."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

_GAP = 1e-5
_SECONDS = 30.0
_MARGINS = (0.0, 2e-6, 1e-4)


@dataclass(frozen=True)
class Choices:
    """The choices of one item: score [n], cost [n, limits]."""

    score: np.ndarray
    cost: np.ndarray


def solve(items: Sequence[Choices], limits: np.ndarray) -> list[int] | None:
    """The choice of every item that maximises the summed score with summed cost ≤ limits, or None if none was found.

    Solved by HiGHS to a relative gap of 1e-5, or to the best solution found in 30 s. HiGHS meets limits to within 1e-6 or so: where its
    choice exceeds them, it is asked again for one a little below.
    """
    if not items:
        return []
    if (limits < 0).any():
        return None
    sizes = [len(item.score) for item in items]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    scale = np.maximum(limits, 1e-300)
    exact = np.concatenate([item.cost for item in items])
    costs = (exact / scale).T
    rows = np.repeat(np.arange(len(items)), sizes)
    one_each = csr_array((np.ones(starts[-1]), (rows, np.arange(starts[-1]))), shape=(len(items), starts[-1]))
    for margin in _MARGINS:
        with _quiet_stdout():
            result = milp(
                -np.concatenate([item.score for item in items]),
                constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(costs, -np.inf, 1.0 - margin)],
                integrality=np.ones(starts[-1]),
                bounds=Bounds(0, 1),
                options={"mip_rel_gap": _GAP, "time_limit": _SECONDS},
            )
        if result.x is None:
            return None
        picks = [int(np.argmax(result.x[a:b])) for a, b in itertools.pairwise(starts.tolist())]
        if (exact[starts[:-1] + picks].sum(0) <= limits).all():
            return picks
    return None


@contextlib.contextmanager
def _quiet_stdout() -> Iterator[None]:
    """HiGHS prints notes of its own to the process's standard output."""
    sys.stdout.flush()
    try:
        saved = os.dup(1)
    except OSError:
        yield
        return
    try:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)

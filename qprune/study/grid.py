"""The points of a study: every way to share out one layer's filters, and every choice of one ratio per stage."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qprune.errors import InputError


@dataclass(frozen=True)
class Point:
    """One configuration of a study.

    label        unique in its study, as shown in tables
    choice       filters per candidate (bits), or a ratio per stage (widths)
    homogeneous  one candidate, or one ratio, throughout
    cost         per sample, in the study's measure
    """

    label: str
    choice: tuple[float, ...]
    homogeneous: bool
    cost: float


def partitions(filters: int, candidates: int, step: int = 1) -> list[tuple[int, ...]]:
    """All counts of filters per candidate that are multiples of `step` and sum to `filters`, in descending order.

    There are C(filters/step + candidates − 1, candidates − 1): 165 for 16 filters, 4 candidates and step 2, the grid of Zur et al.
    (1904.09872). Raises InputError unless step divides filters.
    """
    if filters < 1 or candidates < 1:
        raise InputError(f"partitions: expected at least one filter and one candidate, got {filters} and {candidates}")
    if step < 1 or filters % step:
        divisors = [d for d in range(1, filters + 1) if filters % d == 0]
        raise InputError(f"step: expected a divisor of the layer's {filters} filters ({', '.join(map(str, divisors))}), got {step}")
    return [tuple(step * n for n in counts) for counts in _compositions(filters // step, candidates)]


def _compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    if parts == 1:
        yield (total,)
        return
    for first in range(total, -1, -1):
        for rest in _compositions(total - first, parts - 1):
            yield (first, *rest)


def assigned(counts: Sequence[int]) -> tuple[int, ...]:
    """Candidate index of every filter: the first counts[0] filters get candidate 0, and so on, as in Zur et al."""
    return tuple(k for k, count in enumerate(counts) for _ in range(count))


def width_grid(stages: int, ratios: Sequence[float]) -> list[tuple[float, ...]]:
    """One ratio per stage, in all combinations: 64 for 3 stages and 4 ratios."""
    if stages < 1 or not ratios:
        raise InputError(f"width_grid: expected at least one stage and one ratio, got {stages} and {len(ratios)}")
    return list(itertools.product(ratios, repeat=stages))

"""One-dimensional k-means: optimal clusters by dynamic programming, refined by Lloyd's iterations on every value."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

Array = np.ndarray
GROUPS = 1024
_STRIDE = 16
_RANGES = (1.0, 0.8, 0.6, 0.45, 0.3, 0.2)


@dataclass(frozen=True)
class Values:
    """The values of one clustering problem.

    values  [n] float32, ascending
    sums    [n + 1] float64: sums[i] is the sum of the first i values
    square  the sum of their squares
    starts  where each distinct value begins, [distinct values]
    """

    values: Array
    sums: Array
    square: float
    starts: Array

    @classmethod
    def ascending(cls, values: Array) -> Values:
        """From float32 values in ascending order."""
        exact = values.astype(np.float64)
        sums = np.zeros(len(values) + 1)
        np.cumsum(exact, out=sums[1:])
        changes = np.flatnonzero(values[1:] != values[:-1]) + 1
        starts = np.concatenate([[0], changes]) if len(values) else changes
        return cls(values, sums, float(np.square(exact, out=exact).sum()), starts)

    @property
    def distinct(self) -> Array:
        return self.values[self.starts]

    def clusters(self, centers: Array) -> tuple[Array, Array]:
        """How many values are nearest to each of the ascending centers, and their sums; ties go to the lower center."""
        halves = (centers[1:] + centers[:-1]) / 2
        edges = np.concatenate([[0], np.searchsorted(self.values, halves.astype(np.float32), side="right"), [len(self.values)]])
        return np.diff(edges), np.diff(self.sums[edges])

    def error(self, centers: Array) -> float:
        """Σ (value − nearest center)²."""
        counts, sums = self.clusters(centers)
        c = centers.astype(np.float64)
        return max(0.0, self.square - 2 * float(c @ sums) + float(c * c @ counts))


def kmeans(values: Values, sizes: Sequence[int], groups: int = GROUPS, iterations: int = 100, tolerance: float = 1e-4) -> dict[int, Array]:
    """Centers of k-means for every number of clusters in sizes, each [size] float32 and ascending.

    Up to `groups` distinct values the clusters are optimal, by dynamic programming over them (Bellman 1973; Wang and Song 2011). Of more,
    neighbours are first joined to at most so many groups, as many per interval as an optimal quantizer has levels there (density to
    the power 1/3: Panter and Dite 1951); the optimal clusters of the groups are where `lloyd` begins. With fewer distinct values than
    clusters the centers are those values, the last one repeated. Without any values they are 0.
    """
    found: dict[int, Array] = {}
    trivial = [k for k in sizes if k >= len(values.starts)]
    for k in trivial:
        found[k] = _padded(values.distinct, k)
    others = [k for k in sizes if k < len(values.starts)]
    if others:
        edges = _groups(values, groups)
        for k, bounds in _partitions(edges, values.sums[edges], others).items():
            counts = np.diff(bounds)
            means = np.diff(values.sums[bounds])[counts > 0] / counts[counts > 0]
            found[k] = lloyd(values, _padded(means.astype(np.float32), k), iterations, tolerance)
    return found


def lloyd(values: Values, centers: Array, iterations: int, tolerance: float = 0.0) -> Array:
    """Lloyd's iterations from the given ascending centers, until the squared error falls by at most `tolerance` of itself.

    A center that is nearest to no value stays where it is.
    """
    if not len(values.values):
        return centers
    before = values.error(centers)
    for _ in range(iterations):
        counts, sums = values.clusters(centers)
        moved = np.sort(np.where(counts > 0, sums / np.maximum(counts, 1), centers)).astype(np.float32)
        after = values.error(moved)
        if after > before:
            break
        centers, gain, before = moved, before - after, after
        if gain <= tolerance * after:
            break
    return centers


def equidistant(values: Values, size: int, iterations: int = 100, tolerance: float = 1e-4) -> Array:
    """Centers in equal distances, [size] float32: a uniform quantizer whose offset and step are fitted to least squares.

    Begins from the whole range of the values and from parts of it, alternates assignment and linear regression, and keeps the best.
    """
    if not len(values.values):
        return _padded(values.values, size)
    low, high, mean = float(values.values[0]), float(values.values[-1]), float(values.sums[-1]) / len(values.values)
    starts = [np.linspace(part * low + (1 - part) * mean, part * high + (1 - part) * mean, size) for part in _RANGES]
    fitted = min((_regressed(values, start, iterations, tolerance) for start in starts), key=values.error)
    return points_on_line(float(fitted[0]), float(fitted[-1]), size)


def points_on_line(first: float, last: float, size: int) -> Array:
    """[size] float32 in equal distances, computed in float64; the first and last are exact."""
    return np.linspace(first, last, size, dtype=np.float64).astype(np.float32)


def _regressed(values: Values, centers: Array, iterations: int, tolerance: float) -> Array:
    levels = np.arange(len(centers), dtype=np.float64)
    centers = centers.astype(np.float32)
    before = values.error(centers)
    for _ in range(iterations):
        counts, sums = values.clusters(centers)
        n, total = counts.sum(), sums.sum()
        middle = levels @ counts / n
        spread = (levels - middle) ** 2 @ counts
        if spread == 0:
            break
        step = (levels - middle) @ sums / spread
        moved = (total / n + step * (levels - middle)).astype(np.float32)
        after = values.error(moved)
        if after > before:
            break
        centers, gain, before = moved, before - after, after
        if gain <= tolerance * after:
            break
    return centers


def _padded(centers: Array, size: int) -> Array:
    filler = centers[-1] if len(centers) else np.float32(0)
    return np.concatenate([centers, np.full(size - len(centers), filler, np.float32)])


def _groups(values: Values, most: int) -> Array:
    """Edges of the groups as positions among the values, ascending from 0 to n: single distinct values if these are few enough."""
    n = len(values.values)
    if len(values.starts) <= most:
        return np.append(values.starts, n)
    places = np.linspace(0, n - 1, min(n, 64 * most + 1)).astype(np.int64)
    levels = np.cbrt(np.diff(values.values[places].astype(np.float64)) ** 2 * np.diff(places))
    rank = np.concatenate([[0.0], np.cumsum(levels)])
    inner = np.interp(np.arange(1, most) / most * rank[-1], rank, places)
    return np.unique(np.concatenate([[0], np.rint(inner).astype(np.int64), [n]]))


def _partitions(edges: Array, sums: Array, sizes: Iterable[int]) -> dict[int, Array]:
    """The partitions of groups into at most k clusters of least squared error, for every k in sizes, as the clusters' edges [k + 1].

    edges  [m + 1] positions of the groups' edges     sums  [m + 1] the sum of the values before each edge

    With best_k(j) the least error of the first j groups in k clusters, less the sum of their squares (the same for every partition),
    best_k(j) = min over i ≤ j of best_{k−1}(i) − (sums_j − sums_i)² / (n_j − n_i). The minimising i grows with j: it is sought among all i
    for every 16th j, and between the neighbours' for the others.
    """
    counts = edges.astype(np.float64)
    sums = sums - counts * (sums[-1] / counts[-1])
    last = len(edges) - 1
    coarse = np.unique(np.append(np.arange(0, last + 1, _STRIDE), last))
    fine = np.minimum(coarse[:-1, None] + np.arange(1, _STRIDE), last)
    best = -np.square(sums) / np.maximum(counts, 1)
    rows = np.arange(len(fine))[:, None]
    sizes = sorted(set(sizes))
    origin = np.zeros((sizes[-1] + 1, last + 1), np.int32)
    saved = _saved(counts, sums, coarse, np.arange(last + 1))
    for k in range(2, sizes[-1] + 1):
        after = np.empty_like(best)
        cost = best - saved
        pick = cost.argmin(1)
        origin[k, coarse], after[coarse] = pick, cost[np.arange(len(coarse)), pick]
        low, high = np.minimum(pick[:-1], pick[1:]), np.maximum(pick[:-1], pick[1:])  # rounding may swap equally good ones
        begins = np.minimum(low[:, None] + np.arange(max(1, int((high - low).max()) + 1)), last)
        cost = best[begins][:, None] - _saved(counts, sums, fine, begins[:, None])
        pick = cost.argmin(2)
        origin[k, fine], after[fine] = begins[rows, pick], cost[rows, np.arange(fine.shape[1]), pick]
        best = after
    found = {}
    for size in sizes:
        bounds = [last]
        for k in range(size, 1, -1):
            bounds.append(int(origin[k, bounds[-1]]))
        found[size] = edges[np.array([0, *bounds[::-1]])]
    return found


def _saved(counts: Array, sums: Array, ends: Array, begins: Array) -> Array:
    """(sums_j − sums_i)² / (n_j − n_i) for every end j, along a new last axis of begins i; −∞ where i > j."""
    saved = sums[ends][..., None] - sums[begins]
    np.square(saved, out=saved)
    saved /= np.maximum(counts[ends][..., None] - counts[begins], 1)
    np.putmask(saved, begins > ends[..., None], -np.inf)
    return saved

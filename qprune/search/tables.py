"""One layer's configurations with their scores and costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qprune.geometry import LayerGeometry
from qprune.policy import LayerBits
from qprune.space import PRUNED, SearchSpace


@dataclass(frozen=True)
class Point:
    """A configuration of a layer: the weight candidate of every row, the activation candidate, score and cost [limits]."""

    rows: np.ndarray
    activation: int
    score: float
    cost: np.ndarray


@dataclass(frozen=True)
class Move:
    """Give one row another weight candidate (row −1: none), and the layer another activation candidate (or the one it has): cost
    [limits], and score gained per scaled cost."""

    row: int
    weight: int
    activation: int
    cost: np.ndarray
    gain: float


class LayerTable:
    """The scores of one layer: weight [R, K_w] (R = 1 for a layer-wise choice), input [K_a], pair [K_w, K_a] or [R, K_w, K_a]; −inf: not a
    candidate."""

    def __init__(
        self, layer: LayerGeometry, space: SearchSpace, weight: np.ndarray, input: np.ndarray, pair: np.ndarray | None, bypass: bool
    ) -> None:
        self.layer, self.space, self.input, self.bypass = layer, space, input, bypass
        self.value = weight[:, :, None] + (np.zeros((weight.shape[1], len(input))) if pair is None else pair)
        self.w_bits, self.a_bits = np.array(space.w_bits), np.array(space.a_bits)
        self.pruned = self.w_bits == PRUNED

    @property
    def prunes_filters(self) -> bool:
        """Filters may have 0 bits, each for itself."""
        per_filter = self.space.granularity == "filter" and len(self.value) == self.layer.filters
        return bool(per_filter and self.pruned.any() and not self.pruned.all())

    def activations(self) -> list[int]:
        """The activation candidates that leave the layer a signal, or all where something passes around it."""
        alive = [j for j, b in enumerate(self.space.a_bits) if b != PRUNED]
        return alive if alive and not self.bypass else list(range(len(self.space.a_bits)))

    def score(self, rows: np.ndarray, activation: int) -> float:
        return float(self.value[np.arange(len(rows)), rows, activation].sum() + self.input[activation])

    def bits(self, rows: np.ndarray, activation: int) -> LayerBits:
        chosen = [self.space.w_bits[k] for k in rows]
        return LayerBits(chosen[0] if len(set(chosen)) == 1 else tuple(chosen), self.space.a_bits[activation])

    def read(self, bits: LayerBits) -> tuple[np.ndarray, int]:
        """The inverse of `bits`."""
        per_row = bits.per_filter(len(self.value))
        return np.array([self.space.w_bits.index(b) for b in per_row]), self.space.a_bits.index(bits.a_bits)

    def _choose(self, price: np.ndarray, activation: int, multiplier: float, pruned: np.ndarray | None = None) -> np.ndarray:
        """Every row's best candidate at a multiplier, keeping one filter alive where the signal needs it. price [R, K_w], scaled.

        pruned  which rows have 0 bits [R], where that is decided
        """
        value = self.value[:, :, activation]
        value = np.where(np.isfinite(value), -price, -np.inf) if np.isinf(multiplier) else value - multiplier * price
        if pruned is not None:
            value = np.where(pruned[:, None] == self.pruned, value, -np.inf)
        rows = value.argmax(1)
        if pruned is None and self.pruned[rows].all() and not self.bypass and not self.pruned.all():
            alive = np.where(self.pruned, -np.inf, value)
            loss = value.max(1) - alive.max(1)
            keep = int(loss.argmin())
            rows[keep] = alive[keep].argmax()
        return rows

    def worth(self, price: np.ndarray, multiplier: float) -> np.ndarray:
        """How much better every row is with bits than with none, at a multiplier and the activation candidate that is best there. price
        [R, K_w, K_a], scaled."""
        value = np.where(np.isfinite(self.value), -price, -np.inf) if np.isinf(multiplier) else self.value - multiplier * price
        gains = value.max(1).sum(0) + (0.0 if np.isinf(multiplier) else self.input)
        options = self.activations()
        value = value[:, :, options[int(gains[options].argmax())]]
        none, some = value[:, self.pruned].max(1), value[:, ~self.pruned].max(1)
        return np.where(np.isfinite(none), some - np.where(np.isfinite(none), none, 0.0), np.inf)

    def point(self, rows: np.ndarray, activation: int, prices: np.ndarray) -> Point:
        cost = prices[np.arange(len(rows)), rows, activation].sum(0)
        return Point(rows, activation, self.score(rows, activation), cost)

    def frontier(self, prices: np.ndarray, scale: np.ndarray, points: int) -> list[Point]:
        """Configurations worth considering at prices [R, K_w, K_a, limits]: all of a layer-wise choice; else, for every activation
        candidate, the rows' best choices at `points` multipliers, which lie on the upper hull of (cost, score)."""
        found = []
        for j in self.activations():
            if len(self.value) == 1:
                options = [k for k in range(len(self.pruned)) if not self.pruned[k] or self.bypass or self.pruned.all()]
                found += [self.point(np.array([k]), j, prices) for k in options if np.isfinite(self.score(np.array([k]), j))]
                continue
            price = prices[:, :, j] @ scale
            seen: set[bytes] = set()
            for multiplier in _multipliers(self.value[:, :, j], price, points):
                rows = self._choose(price, j, multiplier)
                if rows.tobytes() not in seen and np.isfinite(self.score(rows, j)):
                    seen.add(rows.tobytes())
                    found.append(self.point(rows, j, prices))
        return found

    def frontiers(self, prices: np.ndarray, scale: np.ndarray, points: int, pruned: Sequence[np.ndarray]) -> list[list[Point]]:
        """The frontiers if it is decided which rows have 0 bits, for several such decisions [R]."""
        found: list[list[Point]] = [[] for _ in pruned]
        row = np.arange(len(self.value))
        for j in self.activations():
            price, value = prices[:, :, j] @ scale, self.value[:, :, j]
            multipliers = _multipliers(value[:, ~self.pruned], price[:, ~self.pruned], points)
            kept = np.stack([self._choose(price, j, multiplier, np.zeros(len(row), bool)) for multiplier in multipliers])
            kept = np.stack(list({chosen.tobytes(): chosen for chosen in kept}.values()))
            none = self._choose(price, j, 0.0, np.ones(len(row), bool))
            kept_score, none_score = value[row, kept], value[row, none]
            kept_cost, none_cost = prices[row, kept, j], prices[row, none, j]
            for frontier, gone in zip(found, pruned, strict=True):
                scores = np.where(gone, none_score, kept_score).sum(1) + self.input[j]
                costs = np.where(gone[:, None], none_cost, kept_cost).sum(1)
                rows = np.where(gone, none, kept)
                frontier += [Point(rows[n], j, scores[n], costs[n]) for n in np.flatnonzero(np.isfinite(scores))]
        return found

    def cheapest(self, prices: np.ndarray, scale: np.ndarray, pruned: np.ndarray | None = None) -> tuple[np.ndarray, int]:
        """Rows and activation candidate of least scaled cost; of several the one with the higher score.

        pruned  which rows have 0 bits [R], where that is decided
        """
        options = [self.point(self._choose(prices[:, :, j] @ scale, j, np.inf, pruned), j, prices) for j in self.activations()]
        best = min(options, key=lambda point: (not np.isfinite(point.score), float(point.cost @ scale), -point.score))
        return best.rows, best.activation

    def best_move(
        self, rows: np.ndarray, activation: int, prices: np.ndarray, left: np.ndarray, scale: np.ndarray, raised: int | None = None
    ) -> Move | None:
        """The move that gains most score per scaled cost within `left`, or None. Never prunes or unprunes: that would change what other
        layers cost.

        raised  None: only moves that gain score; else moves that cost something and raise bits, to at most `raised`, whatever the score
        """
        which, gain, extra = self._moves(rows, activation, prices)
        w_from, a_from = np.where(which[:, 0] < 0, 1, self.w_bits[rows[which[:, 0]]]), self.a_bits[activation]
        w_to, a_to = np.where(which[:, 0] < 0, 1, self.w_bits[which[:, 1]]), self.a_bits[which[:, 2]]
        allowed = (extra <= left).all(1) & (w_from != PRUNED) & (w_to != PRUNED) & (a_from != PRUNED) & (a_to != PRUNED)
        allowed &= (w_to != w_from) | (a_to != a_from)  # sums of the same terms may differ by rounding: no move must not look like a gain
        price = extra @ scale
        if raised is None:
            allowed &= gain > 1e-9
        else:
            allowed &= np.isfinite(gain) & (w_to >= w_from) & (a_to >= a_from) & (price > 0)
            allowed &= ((w_to == w_from) | (w_to <= raised)) & ((a_to == a_from) | (a_to <= raised))
        if not allowed.any():
            return None
        ratio = np.where(allowed, gain / np.maximum(price, 1e-12), -np.inf)
        best = int(ratio.argmax())
        row, weight, activation = (int(n) for n in which[best])
        return Move(row, weight, activation, extra[best], float(ratio[best]))

    def _moves(self, rows: np.ndarray, activation: int, prices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All moves [n, (row, weight, activation)], their gain [n] and extra cost [n, limits]: any pair of a layer-wise choice; else any
        weight candidate of a row, and any activation candidate."""
        index, limits = np.arange(len(rows)), prices.shape[3]
        value, paid = self.value[index, rows, activation], prices[index, rows, activation]
        if len(rows) == 1:
            which = np.indices((1, len(self.w_bits), len(self.a_bits))).reshape(3, -1).T
            gain = self.value[0] + self.input - (value + self.input[activation])
            return which, gain.reshape(-1), (prices[0] - paid).reshape(-1, limits)
        filters = np.indices((len(rows), len(self.w_bits))).reshape(2, -1).T
        by_row = np.column_stack([filters, np.full(len(filters), activation)])
        by_input = np.column_stack([np.tile([-1, 0], (len(self.a_bits), 1)), np.arange(len(self.a_bits))])
        gain = (self.value[:, :, activation] - value[:, None]).reshape(-1)
        extra = (prices[:, :, activation] - paid[:, None]).reshape(-1, limits)
        inputs = self.value[index, rows].sum(0) - value.sum() + self.input - self.input[activation]
        which = np.concatenate([by_row, by_input])
        return which, np.concatenate([gain, inputs]), np.concatenate([extra, prices[index, rows].sum(0) - paid.sum(0)])


def exchange_rates(score: np.ndarray, price: np.ndarray) -> np.ndarray:
    """Score per price between any two candidates of a row, of those that gain score and cost more. score, price [R, K]."""
    extra = price[:, :, None] - price[:, None, :]
    with np.errstate(divide="ignore", invalid="ignore"):
        rates = (score[:, :, None] - score[:, None, :]) / extra
    return rates[np.isfinite(rates) & (rates > 0) & (extra > 0)]


def _multipliers(score: np.ndarray, price: np.ndarray, points: int) -> list[float]:
    """0, infinity, and quantiles of the exchange rates."""
    rates = exchange_rates(score, price)
    if not rates.size:
        return [0.0, np.inf]
    inner = np.quantile(rates, np.linspace(0, 1, points)) * (1 + 1e-9)
    return [0.0, *np.unique(inner).tolist(), np.inf]

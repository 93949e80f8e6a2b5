"""One layer's configurations with their scores and costs, and what costs depend on between layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from qprune.conventions import CONVENTIONS
from qprune.cost import evaluate, kept_inputs, policy_choices
from qprune.geometry import Geometry, LayerGeometry
from qprune.policy import LayerBits, Policy
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
    """Give one row another weight candidate: cost [limits], and score gained per scaled cost."""

    row: int
    weight: int
    cost: np.ndarray
    gain: float


class LayerTable:
    """The scores of one layer: weight [R, K_w] (R = 1 for a layer-wise choice), input [K_a], pair [K_w, K_a] (−inf: not a candidate)."""

    def __init__(
        self, layer: LayerGeometry, space: SearchSpace, weight: np.ndarray, input: np.ndarray, pair: np.ndarray | None, bypass: bool
    ) -> None:
        self.layer, self.space, self.weight, self.input, self.bypass = layer, space, weight, input, bypass
        self.pair = np.zeros((weight.shape[1], len(input))) if pair is None else pair
        self.pruned = np.array([b == PRUNED for b in space.w_bits])

    def activations(self) -> list[int]:
        """The activation candidates that leave the layer a signal, or all where something passes around it."""
        alive = [j for j, b in enumerate(self.space.a_bits) if b != PRUNED]
        return alive if alive and not self.bypass else list(range(len(self.space.a_bits)))

    def score(self, rows: np.ndarray, activation: int) -> float:
        return float((self.weight[np.arange(len(rows)), rows] + self.pair[rows, activation]).sum() + self.input[activation])

    def bits(self, rows: np.ndarray, activation: int) -> LayerBits:
        chosen = [self.space.w_bits[k] for k in rows]
        return LayerBits(chosen[0] if len(set(chosen)) == 1 else tuple(chosen), self.space.a_bits[activation])

    def read(self, bits: LayerBits) -> tuple[np.ndarray, int]:
        """The inverse of `bits`."""
        per_row = bits.per_filter(len(self.weight))
        return np.array([self.space.w_bits.index(b) for b in per_row]), self.space.a_bits.index(bits.a_bits)

    def _choose(self, price: np.ndarray, activation: int, multiplier: float) -> np.ndarray:
        """Every row's best candidate at a multiplier, keeping one filter alive where the signal needs it. price [R, K_w], scaled."""
        value = self.weight + self.pair[:, activation]
        value = np.where(np.isfinite(value), -price, -np.inf) if np.isinf(multiplier) else value - multiplier * price
        rows = value.argmax(1)
        if self.pruned[rows].all() and not self.bypass and not self.pruned.all():
            alive = np.where(self.pruned, -np.inf, value)
            loss = value.max(1) - alive.max(1)
            keep = int(loss.argmin())
            rows[keep] = alive[keep].argmax()
        return rows

    def _point(self, rows: np.ndarray, activation: int, prices: np.ndarray) -> Point:
        cost = prices[np.arange(len(rows)), rows, activation].sum(0)
        return Point(rows, activation, self.score(rows, activation), cost)

    def frontier(self, prices: np.ndarray, scale: np.ndarray, points: int) -> list[Point]:
        """Configurations worth considering at prices [R, K_w, K_a, limits]: all of a layer-wise choice; else, for every activation
        candidate, the rows' best choices at `points` multipliers, which lie on the upper hull of (cost, score)."""
        found = []
        for j in self.activations():
            if len(self.weight) == 1:
                options = [k for k in range(len(self.pruned)) if not self.pruned[k] or self.bypass or self.pruned.all()]
                found += [self._point(np.array([k]), j, prices) for k in options if np.isfinite(self.pair[k, j])]
                continue
            price = prices[:, :, j] @ scale
            seen: set[bytes] = set()
            for multiplier in _multipliers(self.weight + self.pair[:, j], price, points):
                rows = self._choose(price, j, multiplier)
                if rows.tobytes() not in seen and np.isfinite(self.score(rows, j)):
                    seen.add(rows.tobytes())
                    found.append(self._point(rows, j, prices))
        return found

    def cheapest(self, prices: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, int]:
        """Rows and activation candidate of least scaled cost; of several the one with the higher score."""
        options = [self._point(self._choose(prices[:, :, j] @ scale, j, np.inf), j, prices) for j in self.activations()]
        best = min(options, key=lambda point: (float(point.cost @ scale), -point.score))
        return best.rows, best.activation

    def best_move(self, rows: np.ndarray, activation: int, prices: np.ndarray, left: np.ndarray, scale: np.ndarray) -> Move | None:
        """The row and candidate that gain most score per scaled cost within `left`, or None. Never prunes or unprunes: that would change
        what other layers cost."""
        index = np.arange(len(rows))
        value = self.weight + self.pair[:, activation]
        gain = value - value[index, rows][:, None]
        extra = prices[:, :, activation] - prices[index, rows, activation][:, None]
        allowed = (gain > 1e-12) & (extra <= left).all(2) & ~self.pruned & ~self.pruned[rows][:, None]
        if not allowed.any():
            return None
        ratio = np.where(allowed, gain / np.maximum(extra @ scale, 1e-12), -np.inf)
        row, weight = np.unravel_index(int(ratio.argmax()), ratio.shape)
        return Move(int(row), int(weight), extra[row, weight], float(ratio[row, weight]))


def _multipliers(score: np.ndarray, price: np.ndarray, points: int) -> list[float]:
    """0, infinity, and quantiles of the exchange rates between any two candidates of a row."""
    gain = score[:, :, None] - score[:, None, :]
    extra = price[:, :, None] - price[:, None, :]
    with np.errstate(divide="ignore", invalid="ignore"):
        rates = gain / extra
    rates = rates[np.isfinite(rates) & (rates > 0) & (extra > 0)]
    if not rates.size:
        return [0.0, np.inf]
    inner = np.quantile(rates, np.linspace(0, 1, points)) * (1 + 1e-9)
    return [0.0, *np.unique(inner).tolist(), np.inf]


class Pricing:
    """What configurations cost against the limits, in the order of `limits`; scale is 1/limit."""

    def __init__(
        self,
        geometry: Geometry,
        fixed: Mapping[str, LayerBits | None],
        limits: Mapping[str, float],
        convention: str,
        tables: list[LayerTable],
    ) -> None:
        self.geometry, self.limits, self.convention = geometry, dict(limits), CONVENTIONS[convention]
        self.fixed = {name: bits for name, bits in fixed.items() if bits is not None}
        self.tables = tables
        self.scale = 1.0 / np.array(list(limits.values()))

    def totals(self, layers: Mapping[str, LayerBits]) -> dict[str, float]:
        """The exact cost, by name of limit."""
        policy = Policy({**self.fixed, **layers}, self.geometry)
        cost = evaluate(self.geometry, policy_choices(self.geometry, policy), self.convention)
        return {name: float(getattr(cost, name)) for name in self.limits}

    def left(self, layers: Mapping[str, LayerBits]) -> np.ndarray:
        return np.array([self.limits[name] - value for name, value in self.totals(layers).items()])

    def fits(self, layers: Mapping[str, LayerBits]) -> bool:
        return bool((self.left(layers) >= -1e-12 * np.array(list(self.limits.values()))).all())

    def prices(self, layers: Mapping[str, LayerBits]) -> dict[str, np.ndarray]:
        """Cost of every row, weight candidate and activation candidate [R, K_w, K_a, limits] of every table, with the input channels that
        the pruned filters of `layers` leave (none pruned where a layer is not named)."""
        policy = Policy({**self.fixed, **layers}, self.geometry)
        choices = policy_choices(self.geometry, policy)
        pruned = {name: choice.pruned() for name, choice in choices.items() if PRUNED in choice.w_bits}
        kept = kept_inputs(self.geometry, pruned)
        return {table.layer.name: self._price(table, kept.get(table.layer.name)) for table in self.tables}

    def rest(self, layers: Mapping[str, LayerBits]) -> np.ndarray:
        """What the layers without a table cost, given the filters that `layers` prunes."""
        policy = Policy({**self.fixed, **layers}, self.geometry)
        rows = evaluate(self.geometry, policy_choices(self.geometry, policy), self.convention).rows
        searched = {table.layer.name for table in self.tables}
        return np.array([sum(float(getattr(row, name)) for row in rows if row.name not in searched) for name in self.limits])

    def _price(self, table: LayerTable, kept: torch.Tensor | None) -> np.ndarray:
        layer, space = table.layer, table.space
        w = torch.tensor(space.w_bits, dtype=torch.float64).view(1, -1, 1)
        a = torch.tensor(space.a_bits, dtype=torch.float64).view(1, 1, -1)
        full = torch.ones(layer.channels, dtype=torch.float64) if kept is None else kept.double()
        inputs = full.view(layer.groups, layer.inputs).sum(1).view(-1, 1, 1)
        alive = (w > 0) & (a > 0)
        measures = {
            "bops": layer.positions * torch.where(alive, self.convention(layer, w, a, inputs), 0.0),
            "size_bits": layer.kernel * inputs * w * torch.ones_like(a),
            "macs": layer.positions * layer.kernel * inputs * alive,
        }
        per_group = torch.stack([measures[name].expand(layer.groups, w.size(1), a.size(2)) for name in self.limits], dim=3)
        per_filter = per_group.repeat_interleave(layer.filters // layer.groups, dim=0)
        rows = per_filter if len(table.weight) > 1 else per_filter.sum(0, keepdim=True)
        return np.asarray(rows)

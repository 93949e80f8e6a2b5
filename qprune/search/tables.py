"""One layer's configurations with their scores and costs, and what costs depend on between layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from qprune.conventions import CONVENTIONS, Inputs
from qprune.cost import FLOAT_CHOICE, Choice, evaluate, layer_cost, policy_choices
from qprune.geometry import Geometry, LayerGeometry
from qprune.inputs import kept_inputs
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

    def _choose(self, price: np.ndarray, activation: int, multiplier: float) -> np.ndarray:
        """Every row's best candidate at a multiplier, keeping one filter alive where the signal needs it. price [R, K_w], scaled."""
        value = self.value[:, :, activation]
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
            if len(self.value) == 1:
                options = [k for k in range(len(self.pruned)) if not self.pruned[k] or self.bypass or self.pruned.all()]
                found += [self._point(np.array([k]), j, prices) for k in options if np.isfinite(self.score(np.array([k]), j))]
                continue
            price = prices[:, :, j] @ scale
            seen: set[bytes] = set()
            for multiplier in _multipliers(self.value[:, :, j], price, points):
                rows = self._choose(price, j, multiplier)
                if rows.tobytes() not in seen and np.isfinite(self.score(rows, j)):
                    seen.add(rows.tobytes())
                    found.append(self._point(rows, j, prices))
        return found

    def cheapest(self, prices: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, int]:
        """Rows and activation candidate of least scaled cost; of several the one with the higher score."""
        options = [self._point(self._choose(prices[:, :, j] @ scale, j, np.inf), j, prices) for j in self.activations()]
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
        self.scale = 1.0 / np.maximum(np.array(list(limits.values())), 1e-300)

    def totals(self, layers: Mapping[str, LayerBits]) -> dict[str, float]:
        """The exact cost, by name of limit."""
        policy = Policy({**self.fixed, **layers}, self.geometry)
        cost = evaluate(self.geometry, policy_choices(self.geometry, policy), self.convention)
        return {name: float(getattr(cost, name)) for name in self.limits}

    def left(self, layers: Mapping[str, LayerBits]) -> np.ndarray:
        return np.array([self.limits[name] - value for name, value in self.totals(layers).items()])

    def fits(self, layers: Mapping[str, LayerBits]) -> bool:
        return bool((self.left(layers) >= 0).all())

    def prices(self, layers: Mapping[str, LayerBits]) -> dict[str, np.ndarray]:
        """Cost of every row, weight candidate and activation candidate [R, K_w, K_a, limits] of every table, with the input channels that
        the pruned filters of `layers` leave (none pruned where a layer is not named)."""
        policy = Policy({**self.fixed, **layers}, self.geometry)
        choices = policy_choices(self.geometry, policy)
        pruned = {name: choice.pruned() for name, choice in choices.items() if PRUNED in choice.w_bits}
        kept = kept_inputs(self.geometry, pruned)
        return {table.layer.name: self._price(table, kept.get(table.layer.name)) for table in self.tables}

    def credits(self, layers: Mapping[str, LayerBits]) -> dict[str, np.ndarray]:
        """What the consumers of every filter pay for it to be there [F, limits], by table: nothing where another producer keeps the
        channel anyway."""
        choices = policy_choices(self.geometry, Policy({**self.fixed, **layers}, self.geometry))
        pruned = {name: choice.pruned().expand(self.geometry.layers[name].filters).numpy() for name, choice in choices.items()}
        credits = {table.layer.name: np.zeros((table.layer.filters, len(self.limits))) for table in self.tables}
        for group in self.geometry.groups:
            shared = group.producers.keys() & group.consumers.keys()
            price = np.zeros((group.size, len(self.limits)))
            for name in group.consumers.keys() - shared:
                unit = self._per_input(self.geometry.layers[name], choices.get(name))
                np.add.at(price, [r for _, r in group.consumers[name]], unit)
            for name in group.producers.keys() & credits.keys():
                others = [
                    pruned[o][list(rows)] if o in pruned else np.zeros(group.size) for o, rows in group.producers.items() if o != name
                ]
                alone = np.prod(others, axis=0) if others else np.ones(group.size)
                np.add.at(credits[name], list(group.producers[name]), price * alone[:, None])
        return credits

    def _per_input(self, layer: LayerGeometry, choice: Choice | None) -> np.ndarray:
        """What one of a layer's input channels costs on average [limits]."""
        row = layer_cost(layer, choice or FLOAT_CHOICE, None, self.convention)
        return np.array([float(getattr(row, name)) for name in self.limits]) / layer.channels

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
        there = torch.tensor([float(layer.inputs)]).double() if kept is None else kept.double().view(layer.groups, -1).sum(1)
        count = there.view(-1, 1, 1)
        alive = (w > 0) & (a > 0)
        measures = {
            "bops": layer.positions * torch.where(alive, self.convention(layer, w, Inputs.alike(count, a)), 0.0),
            "size_bits": layer.kernel * count * w * torch.ones_like(a),
            "macs": layer.positions * layer.kernel * count * alive,
        }
        shared = torch.stack([measures[name].expand(len(count), w.size(1), a.size(2)) for name in self.limits], dim=3)
        per_filter = shared.repeat_interleave(layer.filters // len(count), dim=0)
        rows = per_filter if len(table.value) > 1 else per_filter.sum(0, keepdim=True)
        return np.asarray(rows)

"""What the allocation chooses in one piece: a layer, or layers whose filters are pruned together."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qprune.policy import LayerBits
from qprune.search.pricing import Pricing, Quotes
from qprune.search.tables import LayerTable, Point, exchange_rates
from qprune.ties import Tie

_SETS = 12
_RATES = 48
_ALL_SETS = 4
_COMBINATIONS = 256

Layers = dict[str, LayerBits]


@dataclass(frozen=True)
class Option:
    """A configuration of all layers of a block, with its score and cost [limits]."""

    tables: Sequence[LayerTable]
    points: Sequence[Point]
    score: float
    cost: np.ndarray

    @property
    def layers(self) -> Layers:
        pairs = zip(self.tables, self.points, strict=True)
        return {table.layer.name: table.bits(point.rows, point.activation) for table, point in pairs}


class Block:
    """One layer that shares nothing."""

    def __init__(self, table: LayerTable) -> None:
        self.tables = [table]

    def options(self, quotes: Quotes, points: int) -> list[Option]:
        """Configurations worth considering."""
        table = self.tables[0]
        return [_option([table], [point]) for point in table.frontier(quotes.prices[table.layer.name], quotes.scale, points)]

    def cheapest(self, quotes: Quotes, scale: np.ndarray) -> Layers:
        """The configuration of least scaled cost."""
        table = self.tables[0]
        return {table.layer.name: table.bits(*table.cheapest(quotes.prices[table.layer.name], scale))}


class TiedBlock(Block):
    """Layers whose filters follow shared choices of 0 bits: what is pruned is chosen for all of them, bits within every layer.

    Which choices are pruned: at a series of multipliers, those whose filters are worth less than they cost, summed over the layers; of few
    choices, every combination. Given that, the layers' frontiers are independent, and are added: every combination where these are few,
    else the layers' best points at common multipliers, which lie on the upper hull of the sum.
    """

    def __init__(self, tables: Sequence[LayerTable], tie: Tie, pricing: Pricing) -> None:
        self.tables, self.size = list(tables), tie.size
        self.channels = [np.array(tie.channels[table.layer.name]) for table in tables]
        names = [table.layer.name for table in tables if pricing.reads(table.layer.name, tie.channels)]
        self.readers = set(names)
        self.exact = {name for name in names if not pricing.reads_its_own(name)}

    def options(self, quotes: Quotes, points: int) -> list[Option]:
        sets = self._sets(quotes, quotes.scale)
        columns = []
        for table, channels, price in zip(self.tables, self.channels, self._given(quotes, np.zeros(self.size, bool)), strict=True):
            gone = [pruned[channels] for pruned in sets]
            if table.layer.name in self.exact:
                each = [(quotes.given(table, self._rows(pruned)), rows) for pruned, rows in zip(sets, gone, strict=True)]
                columns.append([table.frontiers(price, quotes.scale, points, [rows])[0] for price, rows in each])
            else:
                columns.append(table.frontiers(price, quotes.scale, points, gone))
        found = []
        for frontiers in zip(*columns, strict=True):
            if all(frontiers):
                found += [_option(self.tables, combination) for combination in _sums(list(frontiers), quotes.scale, points)]
        return _undominated(found)

    def cheapest(self, quotes: Quotes, scale: np.ndarray) -> Layers:
        found = []
        for pruned in self._sets(quotes, scale):
            prices = self._given(quotes, pruned)
            chosen = [
                table.cheapest(price, scale, pruned[channels])
                for table, channels, price in zip(self.tables, self.channels, prices, strict=True)
            ]
            points = [table.point(*bits, price) for table, bits, price in zip(self.tables, chosen, prices, strict=True)]
            found.append(_option(self.tables, points))
        best = min(found, key=lambda option: (not np.isfinite(option.score), float(option.cost @ scale), -option.score))
        return best.layers

    def _rows(self, pruned: np.ndarray) -> dict[str, np.ndarray]:
        """Whether the filters of every layer are pruned."""
        return {table.layer.name: pruned[channels] for table, channels in zip(self.tables, self.channels, strict=True)}

    def _given(self, quotes: Quotes, pruned: np.ndarray) -> list[np.ndarray]:
        """Prices of the layers, exact in what those that read channels of the block find there."""
        named = [(table.layer.name, table) for table in self.tables]
        return [quotes.given(table, self._rows(pruned)) if name in self.readers else quotes.prices[name] for name, table in named]

    def _sets(self, quotes: Quotes, scale: np.ndarray) -> list[np.ndarray]:
        """Which choices are pruned [size], in every set that is considered."""
        if self.size <= _ALL_SETS:
            every = (np.array(bits) for bits in itertools.product((False, True), repeat=self.size))
            return [pruned for pruned in every if self._passes(pruned)]
        paid = [price @ scale for price in self._given(quotes, np.zeros(self.size, bool))]
        rates = np.concatenate(
            [exchange_rates(t.value.reshape(len(t.value), -1), p.reshape(len(p), -1)) for t, p in zip(self.tables, paid)]
        )
        multipliers = [0.0, *(np.quantile(rates, np.linspace(0, 1, _RATES)) if rates.size else ()), math.inf]
        path = {kept.tobytes(): kept for kept in (self._worth_less(paid, multiplier) for multiplier in multipliers)}
        sets = sorted(path.values(), key=lambda pruned: int(pruned.sum()))
        picked = [sets[i] for i in sorted({round(x) for x in np.linspace(0, len(sets) - 1, min(_SETS, len(sets)))})]
        if quotes.at:
            before = self._before(quotes.at)
            near = int(np.argmin([np.abs(pruned.astype(int) - before).sum() for pruned in sets]))
            picked += [before, *sets[max(near - 2, 0) : near + 3]]
        return list({pruned.tobytes(): pruned for pruned in (np.zeros(self.size, bool), *picked)}.values())

    def _before(self, at: Mapping[str, LayerBits]) -> np.ndarray:
        pruned = np.zeros(self.size, bool)
        for table, channels in zip(self.tables, self.channels, strict=True):
            pruned[channels] = table.pruned[table.read(at[table.layer.name])[0]]
        return pruned

    def _passes(self, pruned: np.ndarray) -> bool:
        return all(table.bypass or not pruned[channels].all() for table, channels in zip(self.tables, self.channels, strict=True))

    def _worth_less(self, paid: list[np.ndarray], multiplier: float) -> np.ndarray:
        """The choices that are better pruned at a multiplier, but for the filters that the signal needs. paid: [R, K_w, K_a], scaled."""
        worth = np.zeros(self.size)
        for table, channels, price in zip(self.tables, self.channels, paid, strict=True):
            np.add.at(worth, channels, table.worth(price, multiplier))
        pruned = worth < 0
        for table, channels in zip(self.tables, self.channels, strict=True):
            if not table.bypass and pruned[channels].all():
                pruned[channels[worth[channels].argmax()]] = False
        return pruned


def _option(tables: Sequence[LayerTable], points: Sequence[Point]) -> Option:
    return Option(tables, points, sum(point.score for point in points), sum((point.cost for point in points[1:]), points[0].cost))


def _sums(frontiers: list[list[Point]], scale: np.ndarray, points: int) -> list[tuple[Point, ...]]:
    """One point of every frontier: all combinations, or the best at common multipliers."""
    if math.prod(len(frontier) for frontier in frontiers) <= _COMBINATIONS:
        return list(itertools.product(*frontiers))
    scores = [np.array([point.score for point in frontier]) for frontier in frontiers]
    prices = [np.array([point.cost @ scale for point in frontier]) for frontier in frontiers]
    rates = np.concatenate([exchange_rates(s[None], p[None]) for s, p in zip(scores, prices, strict=True)])
    multipliers = [0.0, *(np.quantile(rates, np.linspace(0, 1, 2 * points)) * (1 + 1e-9) if rates.size else ())]
    picks = {tuple(int((s - m * p).argmax()) for s, p in zip(scores, prices, strict=True)) for m in multipliers}
    picks.add(tuple(int(np.lexsort((-s, p))[0]) for s, p in zip(scores, prices, strict=True)))
    return [tuple(frontier[k] for frontier, k in zip(frontiers, pick, strict=True)) for pick in sorted(picks)]


def _undominated(options: list[Option]) -> list[Option]:
    """Without those that score no more than another that costs no more."""
    found: list[Option] = []
    costs = np.zeros((len(options), len(options[0].cost) if options else 0))
    for option in sorted(options, key=lambda option: -option.score):
        if not (costs[: len(found)] <= option.cost).all(1).any():
            costs[len(found)] = option.cost
            found.append(option)
    return found

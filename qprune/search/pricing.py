"""What configurations cost, and what costs depend on between layers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from qprune.conventions import CONVENTIONS, Inputs
from qprune.cost import FLOAT_CHOICE, Choice, evaluate, layer_cost, policy_choices
from qprune.geometry import ChannelGroup, Geometry, LayerGeometry
from qprune.inputs import Shares, kept_inputs, own_reads
from qprune.policy import LayerBits, Policy
from qprune.search.tables import LayerTable
from qprune.space import PRUNED
from qprune.ties import Tie


class Pricing:
    """What configurations cost against the limits, in the order of `limits`; scale is 1/limit. ties: of the layers' filters."""

    def __init__(
        self,
        geometry: Geometry,
        fixed: Mapping[str, LayerBits | None],
        limits: Mapping[str, float],
        convention: str,
        tables: list[LayerTable],
        ties: Sequence[Tie] = (),
    ) -> None:
        self.geometry, self.limits, self.convention = geometry, dict(limits), CONVENTIONS[convention]
        self.fixed = {name: bits for name, bits in fixed.items() if bits is not None}
        self.tables = tables
        self.shares = {name: Shares(owner, channels) for owner, tie in enumerate(ties) for name, channels in tie.channels.items()}
        self.scale = 1.0 / np.maximum(np.array(list(limits.values())), 1e-300)
        self._read: dict[str, Geometry] = {}

    def totals(self, layers: Mapping[str, LayerBits]) -> dict[str, float]:
        """The exact cost, by name of limit."""
        policy = Policy({**self.fixed, **layers}, self.geometry)
        cost = evaluate(self.geometry, policy_choices(self.geometry, policy), self.convention)
        return {name: float(getattr(cost, name)) for name in self.limits}

    def left(self, layers: Mapping[str, LayerBits]) -> np.ndarray:
        return np.array([self.limits[name] - value for name, value in self.totals(layers).items()])

    def fits(self, layers: Mapping[str, LayerBits]) -> bool:
        return bool((self.left(layers) >= 0).all())

    def read_by(self, name: str) -> Geometry:
        """The channel groups that a layer reads."""
        if name not in self._read:
            groups = (g for g in self.geometry.groups if name in g.consumers)
            only = tuple(replace(group, consumers={name: group.consumers[name]}) for group in groups)
            self._read[name] = Geometry(self.geometry.layers, only)
        return self._read[name]

    def reads(self, name: str, producers: Collection[str]) -> bool:
        """True if a layer reads channels of one of the producers that can go."""
        return any(not group.producers.keys().isdisjoint(producers) for group in self.read_by(name).groups)

    def reads_its_own(self, name: str) -> bool:
        """True if every filter of a layer reads nothing but channels that it shares its choice with, as depthwise filters do: what it finds
        does not depend on the other choices."""
        layer = self.geometry.layers[name]
        each = layer.filters // layer.groups
        return all(len(own_reads(g, layer, self.shares)[0]) == each * len(g.consumers[name]) for g in self.read_by(name).groups)

    def per_input(self, layer: LayerGeometry, choice: Choice | None) -> np.ndarray:
        """What one of a layer's input channels costs on average [limits]."""
        row = layer_cost(layer, choice or FLOAT_CHOICE, None, self.convention)
        return np.array([float(getattr(row, name)) for name in self.limits]) / layer.channels

    def price(self, table: LayerTable, kept: Tensor | None) -> np.ndarray:
        """Cost of every row, weight candidate and activation candidate [R, K_w, K_a, limits], where input channels are there with
        probability `kept` [channels] (None: all are)."""
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


class Quotes:
    """Prices that hold when the layers are as in `at` (layers not named: nothing pruned; none named: no filter is paid for by readers).

    own       by table: [R, K_w, K_a, limits] with the input channels that are left
    prices    the same with what readers pay for the filter to be there
    rest      what the layers without a table cost, less what is in the prices twice [limits]
    """

    def __init__(self, pricing: Pricing, at: Mapping[str, LayerBits]) -> None:
        self.pricing, self.at, self.scale = pricing, at, pricing.scale
        geometry = pricing.geometry
        self.choices = policy_choices(geometry, Policy({**pricing.fixed, **at}, geometry))
        self.pruned = {name: choice.pruned() for name, choice in self.choices.items() if PRUNED in choice.w_bits}
        kept = kept_inputs(geometry, self.pruned)
        self.credits = self._credits() if at else {}
        self.own = {table.layer.name: pricing.price(table, kept.get(table.layer.name)) for table in pricing.tables}
        self.prices = {table.layer.name: self.own[table.layer.name] + self._credit(table) for table in pricing.tables}

    def given(self, table: LayerTable, pruned: Mapping[str, np.ndarray]) -> np.ndarray:
        """A table's prices if some layers prune other filters than in `at`: layer → [F]."""
        name = table.layer.name
        known = self.pruned | {other: torch.from_numpy(rows).double() for other, rows in pruned.items()}
        return self.pricing.price(table, kept_inputs(self.pricing.read_by(name), known).get(name)) + self._credit(table)

    @property
    def rest(self) -> np.ndarray:
        pricing = self.pricing
        rows = evaluate(pricing.geometry, self.choices, pricing.convention).rows
        searched = {table.layer.name for table in pricing.tables}
        total = np.array([sum(float(getattr(row, name)) for row in rows if row.name not in searched) for name in pricing.limits])
        for table in pricing.tables if self.at else ():
            rows_at, _ = table.read(self.at[table.layer.name])
            total = total - (self._of_rows(table) * ~table.pruned[rows_at][:, None]).sum(0)
        return total

    def _of_rows(self, table: LayerTable) -> np.ndarray:
        credit = self.credits[table.layer.name]
        return credit if len(table.value) > 1 else credit.sum(0, keepdims=True)

    def _credit(self, table: LayerTable) -> np.ndarray | float:
        return self._of_rows(table)[:, None, None, :] * ~table.pruned[:, None, None] if self.credits else 0.0

    def _credits(self) -> dict[str, np.ndarray]:
        """What the readers of every filter pay for it to be there [F, limits], by table: nothing where another producer keeps the channel
        anyway, and nothing for readers whose prices are made for what their own block prunes."""
        pricing = self.pricing
        pruned = {name: p.expand(pricing.geometry.layers[name].filters).numpy() for name, p in self.pruned.items()}
        credits = {table.layer.name: np.zeros((table.layer.filters, len(pricing.limits))) for table in pricing.tables}
        for group in pricing.geometry.groups:
            price: dict[int | None, np.ndarray] = {}
            for name, pairs in group.consumers.items():
                if name not in group.producers:
                    owner = pricing.shares[name].owner if name in pricing.shares else None
                    per_channel = price.setdefault(owner, np.zeros((group.size, len(pricing.limits))))
                    np.add.at(per_channel, [r for _, r in pairs], pricing.per_input(pricing.geometry.layers[name], self.choices.get(name)))
            for name, filters in group.producers.items():
                if name in credits:
                    owner = pricing.shares[name].owner if name in pricing.shares else -1
                    paid = np.sum([p for reader, p in price.items() if reader != owner], axis=0) if price else np.zeros(())
                    np.add.at(credits[name], list(filters), paid * self._decides(group, name, pruned)[:, None])
        return credits

    def _decides(self, group: ChannelGroup, name: str, pruned: Mapping[str, np.ndarray]) -> np.ndarray:
        """[size]: 1 where a producer's filter alone decides whether channel r is there, the others being gone; of filters that share a
        choice the first counts."""
        alone, first = np.ones(group.size), True
        for other, filters in group.producers.items():
            if other == name:
                first = False
                continue
            gone = pruned[other][list(filters)] if other in pruned else np.zeros(group.size)
            alone *= np.where(self._same_choice(group, name, other), 0.0 if first else 1.0, gone)
        return alone

    def _same_choice(self, group: ChannelGroup, one: str, other: str) -> np.ndarray:
        shares = self.pricing.shares
        if one not in shares or other not in shares or shares[one].owner != shares[other].owner:
            return np.zeros(group.size, bool)
        a, b = (np.array(shares[name].of(tuple(group.producers[name]))) for name in (one, other))
        return np.asarray(a == b)

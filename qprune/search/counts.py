"""The likeliest policy of a model of units within the exact budget: how many filters of every layer get which candidate. Ours.

    maximise  Σ_l log P_l(n_l)    subject to    cost(n) ≤ every limit,    log P(n) = log F! − Σ_k log n_k! + Σ_k n_k log p_k

The mode of this without a limit is about F p, as the paper's extraction (see qprune.search.extraction). Costs are not separable: a filter
pays its weight bits times the activation bits of its input channels, which another layer's counts decide.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from qprune.budget import Budget
from qprune.cost import cost
from qprune.errors import InfeasibleBudgetError
from qprune.policy import Policy
from qprune.record import record_of
from qprune.search.extraction import CountsTable, counts_tables, floored, unit_policy
from qprune.search.unitcost import UnitCost
from qprune.wrappers import unwrap

_GAIN = 1e-9
_ROUNDING = 1e-9
_BISECTIONS = 20
_SWEEPS = 3
_EXCHANGES = 30
_KEPT = 3


class _State:
    """Counts of every unit, with their cost and the moves that lead away from them."""

    def __init__(self, tables: Mapping[str, CountsTable], costs: UnitCost, counts: Mapping[str, np.ndarray]) -> None:
        self.tables, self.costs = tables, costs
        self.counts = dict(counts)
        self.choices = {name: tables[name].choice(n).unsqueeze(0) for name, n in self.counts.items()}
        self.layers = {name: costs.of(name, self.choices)[0].numpy() for name in (*costs.units, *costs.sources)}
        self._moves: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def copy(self) -> _State:
        twin = object.__new__(_State)
        twin.tables, twin.costs = self.tables, self.costs
        twin.counts, twin.choices, twin.layers, twin._moves = dict(self.counts), dict(self.choices), dict(self.layers), dict(self._moves)
        return twin

    @property
    def total(self) -> np.ndarray:
        return self.costs.rest.numpy() + sum(self.layers.values())

    @property
    def score(self) -> float:
        return sum(table.score(self.counts[name]) for name, table in self.tables.items())

    @property
    def key(self) -> tuple[bytes, ...]:
        return tuple(counts.tobytes() for counts in self.counts.values())

    def alternatives(self, name: str, counts: np.ndarray) -> np.ndarray:
        """What the network would cost more with other counts [M, K] of one unit: [M, fields]."""
        bits, choice = self.costs.bits[name], self.tables[name].choice(counts)
        source = self.costs.sources.get(name)
        inputs = None if source is None else self.costs.bits[source].out[self.choices[source]]
        extra = self.costs.layer(name, bits.weight[choice], inputs) - torch.from_numpy(self.layers[name])
        for reader in self.costs.readers[name]:
            weight = self.costs.bits[reader].weight[self.choices[reader]] if reader in self.tables else None
            extra = extra + self.costs.layer(reader, weight, bits.out[choice]) - torch.from_numpy(self.layers[reader])
        return extra.numpy()

    def moves(self, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(pairs, gains, extra cost) of a unit's moves."""
        if name not in self._moves:
            table, counts = self.tables[name], self.counts[name]
            pairs, gain = table.moves(counts)
            if len(pairs):
                eye = np.eye(table.candidates, dtype=np.int64)
                extra = self.alternatives(name, counts - eye[pairs[:, 0]] + eye[pairs[:, 1]])
            else:
                extra = np.zeros((0, len(self.costs.fields)))
            self._moves[name] = pairs, gain, extra
        return self._moves[name]

    def all_moves(self) -> tuple[list[tuple[str, int, int]], np.ndarray, np.ndarray]:
        """(unit, from, to) of every move, gains [M] and extra cost [M, fields]."""
        found = {name: self.moves(name) for name in self.tables}
        which = [(name, int(i), int(j)) for name, (pairs, _, _) in found.items() for i, j in pairs]
        return which, np.concatenate([m[1] for m in found.values()]), np.concatenate([m[2] for m in found.values()])

    def set(self, name: str, counts: np.ndarray) -> None:
        self.counts[name] = counts
        self.choices[name] = self.tables[name].choice(counts).unsqueeze(0)
        source = self.costs.sources.get(name)
        for changed in (name, *self.costs.readers[name]):
            self.layers[changed] = self.costs.of(changed, self.choices)[0].numpy()
            self._moves.pop(changed, None)
        if source is not None:
            self._moves.pop(source, None)

    def apply(self, move: tuple[str, int, int]) -> None:
        name, i, j = move
        counts = self.counts[name].copy()
        counts[i] -= 1
        counts[j] += 1
        self.set(name, counts)


class _Allocator:
    """Counts within limits, one per field of `costs`."""

    def __init__(self, tables: Mapping[str, CountsTable], costs: UnitCost, limits: np.ndarray) -> None:
        self.tables, self.costs, self.limits = tables, costs, limits
        self.scale = 1 / np.maximum(limits, 1e-300)

    def state(self, counts: Mapping[str, np.ndarray]) -> _State:
        return _State(self.tables, self.costs, counts)

    def fits(self, state: _State) -> bool:
        return bool((state.total <= self.limits).all())

    def best(self) -> _State | None:
        """The best counts found, or None if nothing fits."""
        likeliest = self.state({name: table.likeliest() for name, table in self.tables.items()})
        if self.fits(likeliest):
            return likeliest
        found = [state for start in self._starts(likeliest) if (state := self._descend(start)) is not None]
        if not found:
            return None
        improved = {state.key: state for state in map(self.improve, found)}
        best = sorted(improved.values(), key=lambda state: -state.score)[:_KEPT]
        return max(map(self._exchange, best), key=lambda state: state.score)

    def _starts(self, likeliest: _State) -> list[_State]:
        paper = self.state({name: floored(table) for name, table in self.tables.items()})
        return [*self._tilted(likeliest), paper, likeliest, self.state(self.cheapest(self.scale))]

    def _tilted(self, start: _State) -> list[_State]:
        """The likeliest counts under a price on cost, just low and just high enough for the limits. The price of a candidate is taken with
        the other layers as they are, layer by layer, in a few sweeps."""
        low, high, state = np.log(1e-3), np.log(1e7), start
        below: list[_State] = []
        above: list[_State] = []
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            state = state.copy()
            for _ in range(_SWEEPS):
                moved = [self._reprice(state, name, float(np.exp(middle))) for name in self.tables]
                if not any(moved):
                    break
            if self.fits(state):
                high, above = middle, [state]
            else:
                low, below = middle, [state]
        return above + below

    def _reprice(self, state: _State, name: str, multiplier: float) -> bool:
        table = self.tables[name]
        pure = state.alternatives(name, np.eye(table.candidates, dtype=np.int64) * table.rows)
        counts = table.likeliest(multiplier * (pure @ self.scale) / table.rows)
        if (counts == state.counts[name]).all():
            return False
        state.set(name, counts)
        return True

    def _descend(self, state: _State) -> _State | None:
        """Cheaper counts until they fit: the move that loses least score per excess removed, again and again. None if that ends above."""
        state = state.copy()
        while not self.fits(state):
            which, gain, extra = state.all_moves()
            removed = self._excess(state.total) - self._excess(state.total + extra)
            if not (removed > 0).any():
                return None
            ratio = np.where(gain >= 0, gain + 1.0, gain / np.maximum(removed, 1e-300))
            state.apply(which[int(np.where(removed > 0, ratio, -np.inf).argmax())])
        return state

    def _excess(self, total: np.ndarray) -> np.ndarray:
        return np.asarray((np.maximum(total - self.limits, 0) * self.scale).sum(-1))

    def improve(self, state: _State, raised: int | None = None) -> _State:
        """Moves that fit and gain most score per cost, until there is none.

        raised  instead: moves that cost something and lower no bits, to at most `raised` bits, whatever the score
        """
        state = state.copy()
        while True:
            which, gain, extra = state.all_moves()
            price = extra @ self.scale
            allowed = (state.total + extra <= self.limits).all(1)
            allowed &= gain > _GAIN if raised is None else self._raises(which, raised) & (price > 0)
            if not allowed.any():
                return state
            ratio = np.where(price <= 0, 1e300, gain / np.maximum(price, 1e-12))
            state.apply(which[int(np.where(allowed, ratio, -np.inf).argmax())])

    def _raises(self, which: list[tuple[str, int, int]], most: int) -> np.ndarray:
        def check(name: str, i: int, j: int) -> bool:
            sides = ((side[i], side[j]) for side in (self.tables[name].weight, self.tables[name].out))
            return all(after == before or before < after <= most for before, after in sides)

        return np.array([check(*move) for move in which], dtype=bool)

    def _exchange(self, state: _State) -> _State:
        """Give a filter fewer bits where that loses least per cost, spend what it frees: kept where the score rises in sum."""
        left, improved = _EXCHANGES, True
        while improved and left > 0:
            improved = False
            which, gain, extra = state.all_moves()
            price = extra @ self.scale
            order = np.where(price < 0, gain / np.minimum(price, -1e-300), np.inf).argsort()
            for move in [which[m] for m in order if price[m] < 0][:left]:
                left -= 1
                other = state.copy()
                other.apply(move)
                other = self.improve(other)
                if self.fits(other) and other.score > state.score + _GAIN:
                    state, improved = other, True
                    break
        return state

    def cheapest(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Counts of least weights · cost with one candidate per layer: exact over those, by dynamic programming along the sources.

        That is the least cost of all counts if a candidate has the fewest bits of both kinds, or where the cost is linear in the counts.
        """
        costs = self.costs
        ahead: dict[str, np.ndarray] = {}  # [K_source]: least cost of a layer and all behind it, per candidate of its source
        picks: dict[str, np.ndarray] = {}
        for name in [name for name in reversed(costs.geometry.layers) if name in costs.units or name in costs.sources]:
            source = costs.sources.get(name)
            inputs = None if source is None else self._pure_bits(source, costs.bits[source].out)
            if name not in self.tables:
                ahead[name] = costs.layer(name, None, inputs).numpy() @ weights
                continue
            weight = self._pure_bits(name, costs.bits[name].weight)
            k, sources = len(weight), 1 if inputs is None else len(inputs)
            spread = None if inputs is None else inputs.repeat(k, 1)
            own = (costs.layer(name, weight.repeat_interleave(sources, 0), spread).numpy() @ weights).reshape(k, sources)
            total = own + sum((ahead[reader] for reader in costs.readers[name]), np.zeros(k))[:, None]
            picks[name], ahead[name] = total.argmin(0), total.min(0)
        chosen: dict[str, int] = {}
        for name in [name for name in costs.geometry.layers if name in self.tables]:
            source = costs.sources.get(name)
            chosen[name] = int(picks[name][0 if source is None else chosen[source]])
        return {name: np.eye(t.candidates, dtype=np.int64)[chosen[name]] * t.rows for name, t in self.tables.items()}

    def _pure_bits(self, name: str, bits: Tensor) -> Tensor:
        return bits.unsqueeze(1).expand(-1, self.tables[name].filters)

    def infeasible(self) -> InfeasibleBudgetError:
        """Names the limit that the cheapest counts, by that limit alone, miss most."""
        least = np.array([self.state(self.cheapest(row)).total[number] for number, row in enumerate(np.eye(len(self.limits)))])
        worst = int((least * self.scale).argmax())
        name, value, limit = self.costs.fields[worst], float(least[worst]), float(self.limits[worst])
        if value > limit:
            what = f"{name} is limited to {limit:.6g}, the cheapest policy needs {value:.6g}"
        else:
            each = zip(self.costs.fields, self.limits, least, strict=True)
            what = "no policy was found that meets all limits at once: " + ", ".join(f"{n} {m:.6g} (at least {v:.6g})" for n, m, v in each)
        return InfeasibleBudgetError(f"no policy meets the budget: {what}; raise the budget or add cheaper candidates", value, limit)


def allocate_counts(
    model: nn.Module,
    budget: Budget,
    convention: str = "product",
    spend: bool = False,
    sensitivity: Mapping[str, Tensor] | None = None,
    likelihood: str = "counts",
) -> Policy:
    """The likeliest policy of a model of units whose exact cost is within the budget, as far as a local search finds it.

    model        prepared with placement="output" and example_inputs
    spend        True: spend what then remains of the budget on more bits even where the likelihood falls, least loss per cost first
    sensitivity  per unit [F], as `Zur` measures it: more sensitive filters get more bits. None: filters in index order, as the paper
    likelihood   "counts": log P(n) of the multinomial; "filters": Σ_k n_k log p_k, the likelihood of one assignment, whose mode puts all
                 filters of a layer on the likeliest candidate

    Starts: the likeliest counts under a price on cost that is just high enough, and just too low; the paper's extraction; the likeliest
    counts; the cheapest. From each, single filters move between candidates, cheapest loss of likelihood per cost first, until it fits;
    then moves that gain likelihood within what is left, and exchanges of two kinds of moves. Raises InfeasibleBudgetError, with the
    cheapest possible cost, if nothing fits.
    """
    record = record_of(model)
    inner = unwrap(model)
    fields = budget.limits(UnitCost(inner, (), convention).geometry, record.fixed if record is not None else {}, convention)
    costs = UnitCost(inner, tuple(fields), convention, torch.device("cpu"))
    tables = counts_tables(costs, sensitivity, likelihood)
    limits = np.array(list(fields.values()))
    for limit in (limits, limits * (1 - _ROUNDING)):  # the second if sums of the same terms, added in another order, exceed the limit
        allocator = _Allocator(tables, costs, limit)
        state = allocator.best()
        if state is None:
            raise allocator.infeasible()
        for bits in (8, 32) if spend else ():
            state = allocator.improve(state, bits)
        policy = unit_policy(inner, {name: choice[0] for name, choice in state.choices.items()})
        exact = cost(inner, convention=convention, policy=policy)
        if all(float(getattr(exact, name)) <= value for name, value in fields.items()):
            return policy
    raise allocator.infeasible()


def check_feasible_counts(model: nn.Module, budget: Budget, convention: str = "product") -> None:
    """Raise InfeasibleBudgetError, as `allocate_counts` would, if no policy of a model of units is within the budget."""
    record = record_of(model)
    costs = UnitCost(model, (), convention)
    fields = budget.limits(costs.geometry, record.fixed if record is not None else {}, convention)
    costs = UnitCost(model, tuple(fields), convention, torch.device("cpu"))
    allocator = _Allocator(counts_tables(costs), costs, np.array(list(fields.values())))
    if not allocator.fits(allocator.state(allocator.cheapest(allocator.scale))) and allocator.best() is None:
        raise allocator.infeasible()

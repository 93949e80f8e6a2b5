"""From scores to bits: the policy with the highest total score within the budget."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import nn

from qprune.budget import Budget
from qprune.convert import has_bypass
from qprune.cost import geometry_of
from qprune.errors import InfeasibleBudgetError
from qprune.geometry import weighted_layers
from qprune.nn.mixing import Mixing
from qprune.policy import LayerBits, Policy
from qprune.record import record_of, unwrap
from qprune.search.knapsack import Choices, solve
from qprune.search.tables import LayerTable, Pricing
from qprune.space import PRUNED, SearchSpace

_POINTS = 24
_ROUNDS = 6


@dataclass(frozen=True)
class LayerScores:
    """How good each candidate of a layer is; higher is better, sums over layers and filters are maximised.

    weight  [F, K_w] per filter, or [1, K_w] for one choice per layer
    input   [K_a]
    pair    bonus per pair [K_w, K_a] added for every row, −inf where a pair is no candidate; or None
    """

    space: SearchSpace
    weight: np.ndarray
    input: np.ndarray
    pair: np.ndarray | None = None


def gate_scores(model: nn.Module) -> dict[str, LayerScores]:
    """The logarithms of the gates' probabilities: the total is the log-likelihood of the policy."""
    scores = {}
    for name, layer in weighted_layers(unwrap(model)):
        if isinstance(layer, Mixing):
            p = layer.filter_probabilities().detach().double().cpu().numpy()
            with np.errstate(divide="ignore"):
                if layer.input_gate is not None:
                    scores[name] = LayerScores(layer.space, np.log(p.sum(2)), np.log(p.sum((0, 1)) / len(p)))
                else:
                    allowed = np.where(p.max(0) > 0, 0.0, -np.inf)
                    weight, share = p.sum(2), p.sum((0, 1)) / len(p)
                    scores[name] = LayerScores(layer.space, np.log(weight), np.log(share), allowed)
    return scores


def allocate(model: nn.Module, budget: Budget, scores: Mapping[str, LayerScores] | None = None, convention: str = "product") -> Policy:
    """The policy of highest total score whose exact cost is within the budget.

    model   prepared with example_inputs
    scores  per mixed layer; default: the log-probabilities of its gates

    Layers choose from the frontier of their own configurations (all of them at layer level; at filter level, for every activation width,
    the
    filters' best widths at a series of prices per cost), by a mixed-integer programme over all layers and all limits. Pruned filters make
    their consumers cheaper, which the programme does not see: it is solved again at the prices of the last solution while that improves the
    score. What
    is left of the budget is then spent greedily on single filters. Raises InfeasibleBudgetError, with the cheapest possible cost, if no
    policy fits.
    """
    geometry = geometry_of(model)
    record = record_of(model)
    fixed = dict(record.fixed) if record is not None else {}
    limits = budget.limits(geometry, fixed, convention)
    tables = [
        LayerTable(geometry.layers[name], layer.space, layer.weight, layer.input, layer.pair, has_bypass(geometry, name))
        for name, layer in (gate_scores(model) if scores is None else scores).items()
        if name in geometry.layers
    ]
    pricing = Pricing(geometry, fixed, limits, convention, tables)
    cheapest = _cheapest(tables, pricing)
    if not pricing.fits(cheapest):
        measure, value = max(pricing.totals(cheapest).items(), key=lambda item: item[1] / limits[item[0]])
        raise InfeasibleBudgetError(
            f"no policy meets the budget: {measure} is limited to {limits[measure]:.6g}, the cheapest policy needs {value:.6g}; "
            "raise the budget or add cheaper candidates",
            value,
            limits[measure],
        )
    best = _improve(cheapest, tables, pricing)
    for layers in _rounds(tables, pricing, cheapest):
        layers = _improve(layers, tables, pricing)
        if _score(layers, tables) > _score(best, tables):
            best = layers
    return Policy({**{n: b for n, b in fixed.items() if b is not None}, **best}, geometry)


Layers = dict[str, LayerBits]


def _cheapest(tables: list[LayerTable], pricing: Pricing) -> Layers:
    """Every layer at its cheapest: no policy costs less, as each layer's cost falls with its own bits and with its producers' filters."""
    prices = pricing.prices({})
    return {t.layer.name: t.bits(*t.cheapest(prices[t.layer.name], pricing.scale)) for t in tables}


def _rounds(tables: list[LayerTable], pricing: Pricing, cheapest: Layers) -> list[Layers]:
    """Solutions of the programme at the prices of: nothing pruned, the solution before, …; and of the cheapest policy. Those that fit."""
    found: list[Layers] = []
    for start in ({}, cheapest):
        layers: Layers | None = start
        for _ in range(_ROUNDS if any(PRUNED in t.space.w_bits for t in tables) else 1):
            previous = layers
            assert layers is not None
            layers = _solve(tables, pricing, layers)
            if layers is None or layers == previous:
                break
            if pricing.fits(layers):
                found.append(layers)
    return found


def _solve(tables: list[LayerTable], pricing: Pricing, at: Layers) -> Layers | None:
    """The programme's solution at the prices that hold when the layers are as in `at` ({}: nothing pruned)."""
    prices, room = pricing.prices(at), np.array(list(pricing.limits.values())) - pricing.rest(at)
    options, bits = [], []
    for table in tables:
        frontier = table.frontier(prices[table.layer.name], pricing.scale, _POINTS)
        options.append(Choices(np.array([p.score for p in frontier]), np.stack([p.cost for p in frontier])))
        bits.append([table.bits(p.rows, p.activation) for p in frontier])
    picks = solve(options, room)
    return None if picks is None else {t.layer.name: bits[i][pick] for i, (t, pick) in enumerate(zip(tables, picks, strict=True))}


def _improve(layers: Layers, tables: list[LayerTable], pricing: Pricing) -> Layers:
    """Spend what is left: the filter whose better width gains most score per cost, again and again; pruned filters stay pruned."""
    prices = pricing.prices(layers)
    left = pricing.left(layers)
    state = {t.layer.name: t.read(layers[t.layer.name]) for t in tables}
    moves = {t.layer.name: t.best_move(*state[t.layer.name], prices[t.layer.name], left, pricing.scale) for t in tables}
    by_name = {t.layer.name: t for t in tables}
    for _ in itertools.count():
        name = max(moves, key=lambda n: moves[n].gain if moves[n] is not None else -np.inf, default=None)  # type: ignore[union-attr]
        move = moves[name] if name is not None else None
        if name is None or move is None:
            break
        if (move.cost > left + 1e-9 * np.abs(left)).any():
            moves[name] = by_name[name].best_move(*state[name], prices[name], left, pricing.scale)
            continue
        left = left - move.cost
        state[name][0][move.row] = move.weight
        moves[name] = by_name[name].best_move(*state[name], prices[name], left, pricing.scale)
    return {name: by_name[name].bits(*rows) for name, rows in state.items()}


def _score(layers: Layers, tables: list[LayerTable]) -> float:
    return sum(t.score(*t.read(layers[t.layer.name])) for t in tables)

"""From scores to bits: the policy with the highest total score within the budget."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from qprune.budget import Budget
from qprune.convert import has_bypass, survives
from qprune.cost import geometry_of
from qprune.errors import InfeasibleBudgetError
from qprune.gates import TiedGate, gates
from qprune.geometry import weighted_layers
from qprune.nn.mixing import Mixing
from qprune.policy import Policy
from qprune.record import record_of
from qprune.search.blocks import Block, Layers, TiedBlock
from qprune.search.knapsack import Choices, solve
from qprune.search.pricing import Pricing, Quotes
from qprune.search.tables import LayerTable, Move
from qprune.space import BITS, FLOAT, PRUNED, SearchSpace
from qprune.ties import tied_channels
from qprune.wrappers import unwrap

_POINTS = 24
_ROUNDS = 8
_TINY = 1e-300
_WELL_USED = 0.9
_FIRST_BONUS, _LAST_BONUS, _HALVINGS = 0.5, 64.0, 3


@dataclass(frozen=True)
class LayerScores:
    """How good each candidate of a layer is; higher is better, sums over layers and filters are maximised.

    weight  [F, K_w] per filter, or [1, K_w] for one choice per layer
    input   [K_a]
    pair    bonus per pair added for every row, [K_w, K_a] or [F, K_w, K_a], −inf where a pair is no candidate; or None
    """

    space: SearchSpace
    weight: np.ndarray
    input: np.ndarray
    pair: np.ndarray | None = None


def gate_scores(model: nn.Module) -> dict[str, LayerScores]:
    """The logarithms of the gates' probabilities, without the noise of sampling: the total is the log-likelihood of the policy. A choice of
    0 bits that filters of several layers share counts in the first of these.

    Where 0 bits are a candidate, a filter is first kept or pruned, with the summed probability of either; bits then count relative to the
    likeliest ones. Otherwise the more widths a kept filter could have, and the more filters share a choice, the less likely each of them
    were, and undecided gates would prune.
    """
    scores: dict[str, LayerScores] = {}
    counted: set[nn.Module] = set()
    with _without_noise(model):
        for name, layer in weighted_layers(unwrap(model)):
            if isinstance(layer, Mixing):
                gate, again = layer.weight_gate, None
                if isinstance(gate, TiedGate):
                    again = gate.within() if gate.prune in counted else None
                    counted.add(gate.prune)
                p = layer.filter_probabilities(again).detach().double().cpu().numpy()
                space = layer.space
                if layer.input_gate is not None:
                    weight, share = p.sum(2), p.sum((0, 1)) / p.sum()
                    scores[name] = LayerScores(space, _in_two_steps(weight, space), np.log(np.maximum(share, _TINY)))
                else:
                    candidates = [[(w, a) in space.candidates for a in space.a_bits] for w in space.w_bits]
                    pair = np.where(candidates, _in_two_steps(p, space), -np.inf)
                    scores[name] = LayerScores(space, np.zeros(p.shape[:2]), np.zeros(p.shape[2]), pair)
    return scores


def _in_two_steps(p: np.ndarray, space: SearchSpace) -> np.ndarray:
    """log p [F, K_w] or [F, K_w, K_a], or where 0 bits are a candidate: log of the probability of being pruned, or kept, plus log of
    p / the largest p of that kind."""
    log_p = np.log(np.maximum(p, _TINY))
    pruned = np.array(space.w_bits) == PRUNED
    if pruned.all() or not pruned.any():
        return log_p
    for columns in (pruned, ~pruned):
        kind = p[:, columns].reshape(len(p), -1)
        log_p[:, columns] += np.log(np.maximum(kind.sum(1) / np.maximum(kind.max(1), _TINY), _TINY)).reshape(-1, *[1] * (p.ndim - 1))
    return log_p


@contextlib.contextmanager
def _without_noise(model: nn.Module) -> Iterator[None]:
    before = [(gate, gate.mode, gate.noise.clone()) for _, gate in gates(unwrap(model))]
    try:
        for gate, mode, _ in before:
            gate.mode = "relaxed" if mode == "sampled" else mode
            gate.noise.zero_()
        yield
    finally:
        for gate, mode, noise in before:
            gate.mode = mode
            gate.noise.copy_(noise)


def allocate(
    model: nn.Module,
    budget: Budget,
    scores: Mapping[str, LayerScores] | None = None,
    convention: str = "product",
    spend: bool = False,
    fill: bool = False,
) -> Policy:
    """The policy of highest total score whose exact cost is within the budget.

    model   prepared with example_inputs
    scores  per mixed layer; default: the log-probabilities of its gates
    spend   True: spend what then remains of the budget on more bits even where the score falls, least loss per cost first. Gates learn
            under the price of the budget's multiplier, so their likelihood undervalues bits once the allocation enforces the budget itself
    fill    True: where filters are pruned although a tenth of the budget remains, prune fewer: the scores of kept filters get the least
            common bonus with which the budget is used. A normalisation behind a mixture hides how much of a filter is pruned, so the gates
            of relaxed searches may prune nearly everything under the price of the budget: they say which filters rather than how many

    Layers choose from the frontier of their own configurations (all of them at layer level; at filter level, for every activation width,
    the filters' best widths at a series of prices per cost), by a mixed-integer programme over all layers and all limits. Pruned filters
    make their consumers cheaper, which the programme does not see: it is solved again at the prices of the last solution while that
    improves the score. Filters that can only be removed together (see qprune.ties) are pruned together or not at all. What is left of the
    budget is then spent greedily, on single filters and activations. Raises
    InfeasibleBudgetError, with the cheapest possible cost, if no policy fits.
    """
    scores = gate_scores(model) if scores is None else scores
    best, used = _allocate(model, budget, scores, convention, spend)
    if not fill or not best.pruned() or used >= _WELL_USED:
        return best
    low, high = 0.0, _FIRST_BONUS
    while used < _WELL_USED and high <= _LAST_BONUS:
        best, used = max((best, used), _allocate(model, budget, _favouring(scores, high), convention, spend), key=lambda pair: pair[1])
        low, high = (high, 2 * high) if used < _WELL_USED else (low, high)
    for _ in range(_HALVINGS if used >= _WELL_USED else 0):
        middle = (low + high) / 2
        policy, share = _allocate(model, budget, _favouring(scores, middle), convention, spend)
        if share >= _WELL_USED:
            best, high = policy, middle
        else:
            low = middle
    return best


def _allocate(model: nn.Module, budget: Budget, scores: Mapping[str, LayerScores], convention: str, spend: bool) -> tuple[Policy, float]:
    """The policy of highest score, and the share of the tightest limit that it uses."""
    blocks, pricing = _set_up(model, budget, scores, convention)
    found = [_improve(layers, pricing) for layers in _rounds(blocks, pricing)]
    if not found:
        raise _infeasible(blocks, pricing)
    best = max(found, key=lambda layers: _score(layers, pricing.tables))
    for bits in (max(b for b in BITS if b != FLOAT), FLOAT) if spend else ():
        best = _improve(best, pricing, bits)
    used = max(value / max(pricing.limits[name], _TINY) for name, value in pricing.totals(best).items())
    return Policy({**pricing.fixed, **best}, pricing.geometry), used


def _favouring(scores: Mapping[str, LayerScores], bonus: float) -> dict[str, LayerScores]:
    """Scores in which every filter that is kept counts so much more."""
    kept = {name: np.array(layer.space.w_bits) != PRUNED for name, layer in scores.items()}
    return {name: replace(layer, weight=layer.weight + bonus * kept[name]) for name, layer in scores.items()}


def check_feasible(model: nn.Module, budget: Budget, convention: str = "product") -> None:
    """Raise InfeasibleBudgetError, as `allocate` would, if no policy of a prepared model is within the budget."""
    blocks, pricing = _set_up(model, budget, gate_scores(model), convention)
    if not pricing.fits(_cheapest(blocks, pricing, pricing.scale)) and not _rounds(blocks, pricing):
        raise _infeasible(blocks, pricing)


def _set_up(model: nn.Module, budget: Budget, scores: Mapping[str, LayerScores], convention: str) -> tuple[list[Block], Pricing]:
    geometry = geometry_of(model)
    record = record_of(model)
    fixed = dict(record.fixed) if record is not None else {}
    limits = budget.limits(geometry, fixed, convention)
    tables = {
        name: LayerTable(geometry.layers[name], layer.space, layer.weight, layer.input, layer.pair, has_bypass(geometry, name))
        for name, layer in scores.items()
        if name in geometry.layers
    }
    ties = tied_channels(geometry, {name for name, table in tables.items() if table.prunes_filters})
    tie_of = {name: tie for tie in ties for name in tie.channels}
    blocks = [Block(table) for name, table in tables.items() if name not in tie_of]
    pricing = Pricing(geometry, fixed, limits, convention, list(tables.values()), ties)
    blocks += [TiedBlock([table for name, table in tables.items() if name in tie.channels], tie, pricing) for tie in ties]
    return blocks, pricing


def _cheapest(blocks: list[Block], pricing: Pricing, scale: np.ndarray) -> Layers:
    """Every layer at its cheapest: each layer's cost falls with its own bits and with its producers' filters."""
    quotes = Quotes(pricing, {})
    return {name: bits for block in blocks for name, bits in block.cheapest(quotes, scale).items()}


def _infeasible(blocks: list[Block], pricing: Pricing) -> InfeasibleBudgetError:
    """Names the limit that the cheapest policy, by that limit alone, misses most."""
    least = {}
    for number, measure in enumerate(pricing.limits):
        only = np.zeros(len(pricing.limits))
        only[number] = 1.0
        least[measure] = pricing.totals(_cheapest(blocks, pricing, only))[measure]
    measure = max(least, key=lambda name: least[name] / max(pricing.limits[name], 1e-300))
    value, limit = least[measure], pricing.limits[measure]
    if value > limit:
        what = f"{measure} is limited to {limit:.6g}, the cheapest policy needs {value:.6g}"
    else:
        what = "each of its limits can be met, but not all at once: " + ", ".join(
            f"{name} {pricing.limits[name]:.6g} (at least {least[name]:.6g})" for name in least
        )
    return InfeasibleBudgetError(f"no policy meets the budget: {what}; raise the budget or add cheaper candidates", value, limit)


def _rounds(blocks: list[Block], pricing: Pricing) -> list[Layers]:
    """The cheapest policy, and the programme's solutions at the prices of: nothing pruned, the solution before, …; and of the cheapest
    policy. Those that fit."""
    cheapest = _cheapest(blocks, pricing, pricing.scale)
    found: list[Layers] = [cheapest] if pricing.fits(cheapest) else []
    for start in ({}, cheapest):
        layers, tight = start, np.ones(len(pricing.limits))
        for number in range(_ROUNDS if any(PRUNED in t.space.w_bits for t in pricing.tables) else 1):
            solution = _solve(blocks, pricing, layers, tight)
            if solution is None or solution == layers:
                break
            layers = solution
            used = np.array(list(pricing.totals(layers).values())) * pricing.scale
            tight = 1 / np.maximum(used, 1) if number > 1 else tight  # it goes round in circles: ask for less the next time
            if pricing.fits(layers) and survives(layers, pricing.geometry):
                found.append(layers)
    return found


def _solve(blocks: list[Block], pricing: Pricing, at: Layers, tight: np.ndarray) -> Layers | None:
    """The programme's solution at the prices that hold when the layers are as in `at` ({}: nothing pruned), with limits scaled by
    `tight`."""
    quotes = Quotes(pricing, at)
    room = tight * np.array(list(pricing.limits.values())) - quotes.rest
    options = [block.options(quotes, _POINTS) for block in blocks]
    picks = solve([Choices(np.array([o.score for o in found]), np.stack([o.cost for o in found])) for found in options], room)
    if picks is None:
        return None
    chosen = {name: bits for found, pick in zip(options, picks, strict=True) for name, bits in found[pick].layers.items()}
    return {table.layer.name: chosen[table.layer.name] for table in pricing.tables}


def _improve(layers: Layers, pricing: Pricing, raised: int | None = None) -> Layers:
    """Spend what is left: the move that gains most score per cost, again and again; with `raised`, on moves that raise bits to at most
    that, whatever the score. Pruned filters stay pruned."""
    by_name, prices, left = {t.layer.name: t for t in pricing.tables}, Quotes(pricing, layers).own, pricing.left(layers)
    state = {name: t.read(layers[name]) for name, t in by_name.items()}

    def best_move(name: str) -> Move | None:
        return by_name[name].best_move(*state[name], prices[name], left, pricing.scale, raised)

    moves = {name: best_move(name) for name in by_name}
    while any(moves.values()):
        name, move = max(((n, m) for n, m in moves.items() if m is not None), key=lambda pair: pair[1].gain)
        if (move.cost <= left).all():
            left = left - move.cost
            rows, _ = state[name]
            if move.row >= 0:
                rows[move.row] = move.weight
            state[name] = rows, move.activation
        moves[name] = best_move(name)
    improved = {name: by_name[name].bits(*chosen) for name, chosen in state.items()}
    return improved if pricing.fits(improved) else layers


def _score(layers: Layers, tables: list[LayerTable]) -> float:
    return sum(t.score(*t.read(layers[t.layer.name])) for t in tables)

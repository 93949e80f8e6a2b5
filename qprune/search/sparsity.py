"""Which weights to keep within a budget of bits: a 0-1 knapsack over the weights, or over the filters, of all layers together.

The projection onto sparse weights in ANNC (Yang et al., CVPR 2020, as its programs do it): a weight z of layer l brings z² and costs the
layer's bits b_l; kept are those of largest z² / b_l, as many as the budget holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qprune.errors import InfeasibleBudgetError, InputError
from qprune.search.knapsack import Choices, solve

_LOW = 16
_FIRST = 0x7F800000
"""The score of what is kept in any case: the bits of infinity."""


@dataclass(frozen=True)
class Kept:
    """What is kept of every layer.

    masks  {layer: bool, True where kept}: like the weight for single weights, [F] for filters
    nnz    {layer: how many weights are kept}
    bits   Σ bits · nnz, never above the budget
    """

    masks: dict[str, Tensor]
    nnz: dict[str, int]
    bits: int


def keep_weights(weights: Mapping[str, Tensor], bits: Mapping[str, int], budget: float, at_least: int = 1) -> Kept:
    """The weights of largest z² / bits, over all layers, as many as cost no more than `budget` bits.

    weights   {layer: floating point, any shape}
    bits      {layer: bits of each of its weights that is kept}
    at_least  weights of every layer that are kept first, its largest, so that no layer dies (ours; 0: none, as in the programs)

    Kept is the longest prefix of that order that fits: the optimum but for one weight. Equal scores are taken in the order of the layers,
    within a layer in the order of the flattened weight. Weights equal to 0 are never kept. Linear time: two histograms of the scores'
    (float32) bits find the last score that is kept. Each layer stays on its device. Raises InfeasibleBudgetError if the budget is below
    what at_least needs, InputError for weights that are not finite.
    """
    _check(weights, bits)
    scores = {name: _scores(weight, bits[name], at_least) for name, weight in weights.items()}
    _check_first({name: bits[name] * int((score == _FIRST).sum()) for name, score in scores.items()}, budget, at_least)

    last, left = _last(scores, bits, int(budget))
    masks = {name: score > last for name, score in scores.items()}
    for name, score in scores.items() if last else ():
        ties = (score == last).nonzero().flatten()
        taken = min(len(ties), left // bits[name])
        masks[name][ties[:taken]] = True
        left -= taken * bits[name]
        if taken < len(ties):
            break
    nnz = {name: int(mask.sum()) for name, mask in masks.items()}
    return _kept({name: mask.view(weights[name].shape) for name, mask in masks.items()}, nnz, bits)


def keep_filters(weights: Mapping[str, Tensor], bits: Mapping[str, int], budget: float, at_least: int = 1, exact: bool = False) -> Kept:
    """The whole filters of largest energy per bit, over all layers, that cost no more than `budget` bits (ours).

    weights   {layer: [F, ...], filters first}
    bits      {layer: bits of each of its weights that is kept}
    at_least  filters of every layer that are kept first
    exact     True: the largest total energy, to 1e-5 of it, by a mixed-integer programme over the number of filters of every layer.
              False: by energy per bit, passing over filters that do not fit

    A filter brings Σ z² over its weights and costs bits times their number. What a dropped filter saves in the layers that read it is not
    counted. Filters that are all 0 are never kept. Errors as in `keep_weights`.
    """
    _check(weights, bits)
    energy = {name: weight.detach().double().flatten(1).square().sum(1).cpu().numpy() for name, weight in weights.items()}
    order = {name: np.argsort(-e, kind="stable") for name, e in energy.items()}
    cost = {name: bits[name] * (weight.numel() // max(len(weight), 1)) for name, weight in weights.items()}
    most = {name: int((e > 0).sum()) for name, e in energy.items()}
    least = {name: min(at_least, count) for name, count in most.items()}
    _check_first({name: cost[name] * count for name, count in least.items()}, budget, at_least)

    ranked = {name: energy[name][order[name]][: most[name]] for name in weights}
    counts = _greedy_filters(ranked, cost, least, int(budget))
    if exact:
        total = max(sum(float(e.sum()) for e in ranked.values()), 1e-300)
        choices = [
            Choices(np.cumsum(np.append(0.0, e))[least[name] :] / total, cost[name] * np.arange(least[name], len(e) + 1.0)[:, None])
            for name, e in ranked.items()
        ]
        picks = solve(choices, np.array([float(budget)]))
        found = counts if picks is None else {name: least[name] + pick for name, pick in zip(ranked, picks, strict=True)}
        counts = max(found, counts, key=lambda c: sum(float(e[: c[name]].sum()) for name, e in ranked.items()))

    masks = {}
    for name, weight in weights.items():
        mask = torch.zeros(len(weight), dtype=torch.bool)
        mask[torch.from_numpy(order[name][: counts[name]])] = True
        masks[name] = mask.to(weight.device)
    return _kept(masks, {name: counts[name] * (cost[name] // bits[name]) for name in weights}, bits)


def _scores(weight: Tensor, bits: int, at_least: int) -> Tensor:
    """The bits, as int32, of z² / bits in float32: non-negative floats are in the order of their bits."""
    score = weight.detach().flatten().float().square().div_(bits).clamp_(max=torch.finfo(torch.float32).max).view(torch.int32)
    if at_least > 0 and len(score):
        limit = score.topk(min(at_least, len(score))).values[-1]
        first = (score > limit).nonzero().flatten()
        ties = (score == limit).nonzero().flatten() if int(limit) else first[:0]
        score[torch.cat([first, ties[: at_least - len(first)]])] = _FIRST
    return score


def _last(scores: Mapping[str, Tensor], bits: Mapping[str, int], budget: int) -> tuple[int, int]:
    """The score at which the budget runs out (0: never), and what of it is left for the weights of that score."""
    high, left = _crossing({name: score >> _LOW for name, score in scores.items()}, bits, budget)
    if high < 0:
        return 0, left
    within = {name: score[score >> _LOW == high] & ((1 << _LOW) - 1) for name, score in scores.items()}
    low, left = _crossing(within, bits, left)
    return high << _LOW | low, left


def _crossing(levels: Mapping[str, Tensor], bits: Mapping[str, int], budget: int) -> tuple[int, int]:
    """The highest of 2^16 levels with which the cost from the top exceeds the budget (−1: none), and what is left above it."""
    cost = np.zeros(1 << _LOW, np.int64)
    for name, level in levels.items():
        cost += bits[name] * torch.bincount(level, minlength=len(cost)).cpu().numpy()
    spent = np.cumsum(cost[::-1])
    place = int(np.searchsorted(spent, budget, side="right"))
    return len(cost) - 1 - place, budget - (int(spent[place - 1]) if place else 0)


def _greedy_filters(ranked: Mapping[str, np.ndarray], cost: Mapping[str, int], least: Mapping[str, int], budget: int) -> dict[str, int]:
    """How many filters of every layer: by energy per bit, ties in the order of layers; a layer's filters all cost the same."""
    counts, left = dict(least), budget - sum(cost[name] * count for name, count in least.items())
    names = list(ranked)
    density = np.concatenate([ranked[name][least[name] :] / cost[name] for name in names] or [np.zeros(0)])
    owner = np.concatenate([np.full(len(ranked[name]) - least[name], i) for i, name in enumerate(names)] or [np.zeros(0, int)])
    for index in owner[np.argsort(-density, kind="stable")]:
        name = names[index]
        if cost[name] <= left:
            counts[name] += 1
            left -= cost[name]
    return counts


def _kept(masks: dict[str, Tensor], nnz: dict[str, int], bits: Mapping[str, int]) -> Kept:
    return Kept(masks, nnz, sum(bits[name] * count for name, count in nnz.items()))


def _check(weights: Mapping[str, Tensor], bits: Mapping[str, int]) -> None:
    for name, weight in weights.items():
        if bits.get(name, 0) < 1:
            raise InputError(f"layer {name}: got {bits.get(name)} bits per weight, expected 1 or more; give bits for every layer")
        if not bool(weight.detach().isfinite().all()):
            raise InputError(f"layer {name}: got weights that are NaN or infinite, expected finite ones; lower the learning rate")


def _check_first(costs: Mapping[str, int], budget: float, at_least: int) -> None:
    needed = sum(costs.values())
    if needed > budget:
        raise InfeasibleBudgetError(
            f"a budget of {budget:.6g} bits is below the {needed} that at_least={at_least} per layer needs; raise the budget",
            float(needed),
            float(budget),
        )

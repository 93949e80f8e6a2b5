"""What searches are compared with: uniform networks, and pruning followed by uniform quantization."""

from __future__ import annotations

import itertools
from bisect import bisect
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from qprune.budget import Budget
from qprune.conventions import CONVENTIONS
from qprune.cost import evaluate, policy_choices
from qprune.errors import InfeasibleBudgetError
from qprune.geometry import Geometry
from qprune.nn.slim import extract, flops, homogeneous, slim, state_of
from qprune.policy import LayerBits, Policy
from qprune.recipes.bits import BASELINE_BITS, BitRecipe

Fixed = Mapping[str, LayerBits | None]
_WIDEST_GAP = 1
_EXACT = 1e-12


def ratios(geometry: Geometry, fixed: Fixed, w: int, a: int, limits: Mapping[str, float], convention: str) -> list[float]:
    """What the uniform network costs over the limits, in every measure."""
    cost = evaluate(geometry, policy_choices(geometry, Policy.uniform(geometry, w, a, fixed)), CONVENTIONS[convention])
    return [float(getattr(cost, name)) / limit for name, limit in limits.items()]


def uniform_bits(
    geometry: Geometry, fixed: Fixed, limits: Mapping[str, float], convention: str = "product", above: bool = False
) -> tuple[int, int]:
    """The bits (w, a) of the costliest uniform network within the limits, or with `above` of the cheapest one that reaches one of them.

    w and a differ by 1 at most: among all pairs, budgets would often pick one like 7 and 1, which nobody would use. Costs are compared in
    the measure that is nearest to its limit, then in all together; of equally costly pairs the closer one counts, then the one with more
    activation bits.

    Raises InfeasibleBudgetError if 1 and 1 cost too much. With `above`, 8 and 8 if all cost less.
    """
    pairs = [(w, a) for w, a in itertools.product(BASELINE_BITS, BASELINE_BITS) if abs(w - a) <= _WIDEST_GAP]
    found = {pair: ratios(geometry, fixed, *pair, limits, convention) for pair in pairs}
    costs = {pair: (max(listed), sum(listed)) for pair, listed in found.items()}
    if above:
        reaching = [pair for pair in pairs if costs[pair][0] >= 1 - _EXACT]
        return min(reaching, key=lambda pair: (*costs[pair], abs(pair[0] - pair[1]), -pair[1]), default=pairs[-1])
    within = [pair for pair in pairs if costs[pair][0] <= 1 + _EXACT]
    if not within:
        over, name = max(zip(found[pairs[0]], limits))
        cheapest = over * limits[name]
        raise InfeasibleBudgetError(
            f"no uniform network is within the budget: w1a1 has {name} {cheapest:.6g}, the limit is {limits[name]:.6g}; raise the budget",
            cheapest,
            limits[name],
        )
    return max(within, key=lambda pair: (*costs[pair], -abs(pair[0] - pair[1]), pair[1]))


class Pruning:
    """The first stage of `prune-then-quantize`: every convolution loses the same share of its filters, those of the smallest L1 norm (Li et
    al., "Pruning Filters for Efficient ConvNets", ICLR 2017) or of the smallest scale of their normalisation (Liu et al., "Learning
    Efficient Convolutional Networks through Network Slimming", ICCV 2017; there over all layers together). How much is pruned, and what
    that leaves for bits, is ours.

    recipe  of the baseline's quantizers
    order   "l1" or "gamma"
    share   of the convolutions' multiplications that is kept; None: as much as lets the bits (w, a) of `uniform_bits` both rise by one
            within the budget
    """

    def __init__(self, recipe: BitRecipe, budget: Budget, order: str = "l1", share: float | None = None) -> None:
        self.recipe, self.budget, self.order, self.share = recipe, budget, order, share
        self.convention = recipe.options.convention

    def limits(self, net: nn.Module) -> dict[str, float]:
        """The budget in numbers, of the network that is not pruned yet."""
        outline = self.recipe.outline(net)
        assert outline.geometry is not None
        return self.budget.limits(outline.geometry, outline.fixed, self.convention)

    def prune(self, net: nn.Module, batches: Sequence[Tensor] = ()) -> tuple[nn.Module, float]:
        """(smaller network, share of the filters that a layer kept). batches: inputs from which normalisations are set anew. Raises
        UnsupportedLayerError for networks that cannot be made slim."""
        model, limits = slim(net, self.recipe.example, order=self.order), self.limits(net)
        widest = max(layer.filters for layer in state_of(model).structure.layers.values())
        if self.share is None:
            w, a = (min(bits + 1, BASELINE_BITS[-1]) for bits in self.bits(net, limits))
            counts = bisect(range(1, widest + 1), 1 + _EXACT, key=lambda count: self._ratio(model, count / widest, w, a, limits))
        else:
            most = self.share * flops(model) * (1 + _EXACT)
            counts = bisect(range(1, widest + 1), most, key=lambda count: flops(model, homogeneous(model, count / widest)))
        kept = max(counts, 1) / widest
        return extract(model, homogeneous(model, kept), batches), kept

    def bits(self, net: nn.Module, limits: Mapping[str, float]) -> tuple[int, int]:
        """Of the uniform network within the limits."""
        outline = self.recipe.outline(net)
        assert outline.geometry is not None
        return uniform_bits(outline.geometry, outline.fixed, limits, self.convention)

    def _ratio(self, model: nn.Module, kept: float, w: int, a: int, limits: Mapping[str, float]) -> float:
        outline = self.recipe.outline(extract(model, homogeneous(model, kept)))
        assert outline.geometry is not None
        return max(ratios(outline.geometry, outline.fixed, w, a, limits, self.convention))

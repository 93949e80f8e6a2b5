"""What a run does with a network where widths are chosen."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from qprune.budget import Budget
from qprune.nn.slim import extract, flops, homogeneous, slim, state_of
from qprune.options import RunOptions
from qprune.policy import Policy
from qprune.search.driver import METHODS, Search
from qprune.search.slimmable import Slimmable


class WidthRecipe:
    """The method that chooses how many filters every convolution keeps."""

    def __init__(self, options: RunOptions, example: Tensor) -> None:
        self.options, self.example, self.budget = options, example, Budget.parse(options.budget)

    def check(self, net: nn.Module) -> None:
        METHODS[self.options.method].check(self._slim(net), self.budget, self.options.convention)

    def prepare(self, net: nn.Module, batches: Sequence[Tensor]) -> nn.Module:
        return self._slim(net)

    def _slim(self, net: nn.Module) -> nn.Module:
        return slim(net, self.example, **self.options.of_network())

    def finish(self, search: Search, policy: Policy, batches: Sequence[Tensor]) -> nn.Module:
        assert isinstance(search.method, Slimmable)
        return extract(search.model, search.method.widths(), batches)

    def uniform(self, net: nn.Module, search: Search, batches: Sequence[Tensor]) -> tuple[str, nn.Module]:
        model = self._slim(net)
        ratio = ratio_above(model, search.limits["macs"])
        return f"uniform width {ratio:.3g}", extract(model, homogeneous(model, ratio), batches)


def ratio_above(model: nn.Module, limit: float) -> float:
    """The share of filters of the narrowest homogeneous network that costs at least the limit, in multiplications of convolutions; 1 if
    all cost less. model: from `slim`."""
    widest = max(layer.filters for layer in state_of(model).structure.layers.values())
    ratios = [count / widest for count in range(1, widest + 1)]
    return next((ratio for ratio in ratios if flops(model, homogeneous(model, ratio)) >= limit), 1.0)

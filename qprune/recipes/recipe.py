"""What a run needs to know of a method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor, nn

from qprune.policy import Policy
from qprune.search.driver import Search


class Recipe(Protocol):
    """batches: a few of real inputs, from which ranges are set."""

    def check(self, net: nn.Module) -> None:
        """Raise InfeasibleBudgetError if nothing that the search could return is within the budget."""

    def prepare(self, net: nn.Module, batches: Sequence[Tensor]) -> nn.Module:
        """The float network in its searchable form; the network itself is not changed."""

    def finish(self, search: Search, policy: Policy, batches: Sequence[Tensor]) -> nn.Module:
        """The network with what was chosen, to be fine-tuned."""

    def uniform(self, net: nn.Module, search: Search, batches: Sequence[Tensor]) -> tuple[str, nn.Module]:
        """(label, network): from the same float network, the cheapest homogeneous one that costs at least the budget."""

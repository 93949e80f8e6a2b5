"""What a run with method "sbs" does with a network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from qprune.options import RunOptions
from qprune.policy import Policy
from qprune.recipes.bits import BitRecipe
from qprune.search.driver import Search
from qprune.silence import silence


class SbsRecipe(BitRecipe):
    """As for the other methods that choose bits. In the network that is fine-tuned, pruned filters say nothing, as in the search; the
    uniform baseline has the same quantizers as the searched network: DoReFa weights with one range per layer."""

    def __init__(self, options: RunOptions, example: Tensor) -> None:
        super().__init__(options, example)
        self.space = replace(self.space, weight_quantizer="dorefa", scales="layer")

    def finish(self, search: Search, policy: Policy, batches: Sequence[Tensor]) -> nn.Module:
        return silence(super().finish(search, policy, batches), policy, self.example)

"""What a run with method "sbs" does with a network."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from qprune.options import RunOptions
from qprune.recipes.bits import BitRecipe


class SbsRecipe(BitRecipe):
    """As for the other methods that choose bits. The uniform baseline has the same quantizers as the searched network: DoReFa weights with
    one range per layer."""

    def __init__(self, options: RunOptions, example: Tensor) -> None:
        super().__init__(options, example)
        self.space = replace(self.space, weight_quantizer="dorefa", scales="layer")

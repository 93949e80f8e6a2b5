"""Which recipe goes with which search method."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from qprune.options import RunOptions
from qprune.recipes import BitRecipe, Recipe, WidthRecipe
from qprune.recipes_annc import CodebookRecipe
from qprune.recipes_sbs import SbsRecipe

RECIPES: dict[str, Callable[[RunOptions, Tensor], Recipe]] = {"slimmable": WidthRecipe, "sbs": SbsRecipe, "annc": CodebookRecipe}
"""Methods that are not here choose bits only: BitRecipe."""


def recipe_for(options: RunOptions, example: Tensor) -> Recipe:
    """example: a batch of inputs for one call, of any values."""
    return RECIPES.get(options.method, BitRecipe)(options, example)

"""What a search run does with a network, by kind of method: how it becomes searchable, what comes out, and what that is compared with."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from qprune.options import RunOptions
from qprune.recipes.annc import CodebookRecipe
from qprune.recipes.bits import BitRecipe
from qprune.recipes.recipe import Recipe
from qprune.recipes.sbs import SbsRecipe
from qprune.recipes.widths import WidthRecipe

RECIPES: dict[str, Callable[[RunOptions, Tensor], Recipe]] = {"slimmable": WidthRecipe, "sbs": SbsRecipe, "annc": CodebookRecipe}
"""Methods that are not here choose bits only: BitRecipe."""


def recipe_for(options: RunOptions, example: Tensor) -> Recipe:
    """example: a batch of inputs for one call, of any values."""
    return RECIPES.get(options.method, BitRecipe)(options, example)


__all__ = ["RECIPES", "BitRecipe", "CodebookRecipe", "Recipe", "SbsRecipe", "WidthRecipe", "recipe_for"]

"""The searches: one file per published method, the loop that they share, and the allocation under the budget."""

from qprune.search.allocate import LayerScores, allocate
from qprune.search.driver import METHODS, Search

__all__ = ["METHODS", "LayerScores", "Search", "allocate"]

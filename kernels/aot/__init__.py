"""Compile every kernel for NVIDIA GPUs without having one, and hold the machine code to budgets: `python -m qprune.kernels.aot`.

One file per kernel module lists the configurations that its launch code can choose; `build.py` says what a configuration and its budget
are, `sass.py` reads the machine code, `table.py` does it for all of them.
"""

from .build import Budget, Build
from .table import FAMILIES, table, violations

__all__ = ["FAMILIES", "Budget", "Build", "table", "violations"]

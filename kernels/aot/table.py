"""All configurations of all kernels, compiled and held to their budgets."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import BackendError
from .build import SHARED_LIMIT, Budget, Build
from .sass import Code

FAMILIES = ("quantize", "multi", "conv", "depthwise", "int8")
"""The modules of this folder that list configurations, each named after the kernels that it compiles."""

Row = dict[str, Any]


def violations(
    use: Mapping[str, Any], budget: Budget, arch: int, missing: tuple[str, ...] = (), forbidden: tuple[str, ...] = ()
) -> list[str]:
    """What the use of a compiled kernel breaks, in words. missing, forbidden: patterns of instructions that do not, or do, occur."""
    bounds = {"registers": min(budget.registers, 255), "stack": 0, "spills": 0, "shared": min(budget.shared, SHARED_LIMIT[arch])}
    found = [f"{name} {use[name]} > {bound:g}" for name, bound in bounds.items() if use[name] > bound]
    if use["registers"] * use["threads"] > 65536:
        found.append(f"{use['registers']} registers in {use['threads']} threads do not fit a multiprocessor")
    if budget.slots is not None and not use["slots"]:
        found.append("no storing loop was found to count slots in")
    elif budget.slots is not None and use["slots"] > budget.slots:
        found.append(f"slots {use['slots']} > {budget.slots:g}")
    return [*found, *(f"no {pattern}" for pattern in missing), *(f"has {pattern}" for pattern in forbidden)]


def measure(build: Build) -> Row:
    """Compile one configuration: what it is, what its machine code uses, and `violations` as a list of words."""
    code = Code(build.compile(), build.itemsize, build.outputs)
    missing = tuple(pattern for pattern in build.budget.require if not code.count(pattern))
    forbidden = tuple(pattern for pattern in build.budget.forbid if code.count(pattern))
    broken = violations(code.use, build.budget, build.arch, missing, forbidden)
    return {"kernel": build.kernel, "case": build.case, "arch": build.arch, **code.use, "violations": broken}


def _check_compiler() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise BackendError("kernels cannot be compiled while TRITON_INTERPRET=1: unset it for this process")
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise BackendError(f"Triton is needed to compile kernels and is not installed ({error}): pip install triton") from error


def table(quick: bool = False, only: str | None = None) -> Iterator[Row]:
    """Compile and measure all configurations, or those of one family; quick: the representative ones.

    Raises BackendError without Triton, or while TRITON_INTERPRET=1.
    """
    _check_compiler()
    for family in FAMILIES if only is None else (only,):
        for build in importlib.import_module(f"{__package__}.{family}").builds(quick):
            yield {"family": family, **measure(build)}

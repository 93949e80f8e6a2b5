"""What the cells of a comparison left in their folders, read back and checked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qprune.errors import CheckpointError
from qprune.plainjson import parse
from qprune.result import get, number
from qprune.usage import MEASURES

RESULT = "result.json"
MOST = 1e30
"""Of any number: sums and means of such are still finite."""
_Place = tuple[str, ...]
_NUMBERS: tuple[_Place, ...] = (
    ("seed",), ("test_accuracy",), ("val_accuracy",), ("bops",), ("macs",), ("size_bits",), ("w_bits",), ("a_bits",),
    ("size", "values"), ("size", "index"), ("size", "codebooks"),
)  # fmt: skip
_USAGE = ("seconds", "cpu_seconds", "memory", "before")


def read_cell(folder: Path) -> dict[str, Any] | None:
    """The result that a cell's folder holds, or None. Raises CheckpointError for a damaged one."""
    return _read(folder / RESULT, [*_NUMBERS, ("pid",)], ["budget", "method", "label", "float_network", "host"])


def read_float(folder: Path, seed: int) -> dict[str, Any] | None:
    """What the float network of a seed took, and its accuracy, or None. Raises CheckpointError for a damaged file."""
    return _read(folder / f"float-{seed}.json", [*_NUMBERS, ("float_epochs",), ("usage", "float", "seconds")], ["label"])


def _read(path: Path, numbers: Sequence[_Place], texts: Sequence[str]) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        found = parse(path.read_text())
        missing = _missing(found, numbers, texts)
        if missing is not None:
            raise ValueError(f"{missing} is missing or no such value")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({' '.join(str(error).split())}); delete it to go on") from None
    return dict(found)


def _missing(found: Any, numbers: Sequence[_Place], texts: Sequence[str]) -> str | None:
    usage = get(found, "usage")
    if not isinstance(usage, dict):
        return "usage"
    of_phases = [("usage", phase, name) for phase in usage for name in _USAGE]
    for place in (*numbers, *of_phases):
        value = number(found, *place)
        if value is None or not 0 <= value < MOST:
            return ".".join(place)
    if not isinstance(found["seed"], int):
        return "seed"
    wrong = [f"usage.{phase}.measure" for phase in usage if get(usage, phase, "measure") not in (*MEASURES,)]
    return next(iter([*wrong, *(name for name in texts if not isinstance(found.get(name), str))]), None)

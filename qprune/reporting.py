"""The report of a folder, whatever command it is of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qprune.errors import CheckpointError
from qprune.files import write_atomically
from qprune.plainjson import parse
from qprune.plainyaml import read_mapping
from qprune.report import write_report as write_run_report
from qprune.resume.folder import OPTIONS, RESULT

_DAMAGES = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)


def write_report(folder: Path) -> Path:
    """Write report.html of a search run, finished or not, a study or a comparison; returns its path. Raises CheckpointError for a folder
    that holds none of these, or is damaged, or whose study or comparison has not reported anything yet."""
    folder = Path(folder)
    result = _result(folder / RESULT)
    kind = result.get("kind") if isinstance(result, Mapping) else _begun(folder / OPTIONS)
    if kind == "train":
        raise CheckpointError(f"{folder} holds a training of qprune train, which has no report; its numbers are in metrics.jsonl")
    if kind not in ("study", "compare"):
        return write_run_report(folder)
    if result is None:
        raise CheckpointError(
            f"{folder} holds a {'study' if kind == 'study' else 'comparison'} that has not reported yet; "
            f"qprune {kind} --config {folder / OPTIONS} --workers 0 --out {folder} writes what is done"
        )
    try:
        page = _page_of(kind)(result)
    except _DAMAGES as error:
        raise CheckpointError(f"{folder / RESULT} is damaged ({type(error).__name__}: {' '.join(str(error).split())[:200]})") from None
    path = folder / "report.html"
    write_atomically(path, page.encode("utf-8", "replace"))
    return path


def _page_of(kind: str) -> Callable[[Mapping[str, Any]], str]:
    if kind == "study":
        from qprune.study.page import study_page

        return study_page
    from qprune.compare.page import compare_page

    return compare_page


def _result(path: Path) -> Any:
    """What it holds; None where it is missing, or cannot be read: the report of a run tells what is wrong then."""
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _begun(path: Path) -> str | None:
    """The command that began in a folder, by the names of its options; None for a search, and where that is not known."""
    try:
        options = read_mapping(path)
    except (OSError, ValueError):
        return None
    signs = {"study": "kind", "compare": "methods", "train": "epochs"}
    return next((command for command, name in signs.items() if name in options), None)

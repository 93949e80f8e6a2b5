"""Reading what a run left in its folder, and asking it for numbers that may be missing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qprune.errors import CheckpointError
from qprune.plainjson import parse

Result = Mapping[str, Any]

FORMAT = 1
NETWORKS = ("float", "searched", "uniform")
PRUNED, FLOAT = 0, 32
MOST_FILTERS = 1 << 20
_SHOWN = ("accuracy_mean", "bops", "size_bits", "w_bits", "a_bits")


def get(item: Any, *keys: str) -> Any:
    """item[key][key]..., or None where something on the way is missing or is no mapping."""
    for key in keys:
        item = item.get(key) if isinstance(item, Mapping) else None
    return item


def number(item: Any, *keys: str) -> float | None:
    """The finite number at that place, or None."""
    value = get(item, *keys)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) else None


def average(values: Sequence[float | None]) -> float | None:
    """The mean, or None when there is nothing, or something is missing: a mean over fewer seeds than the others would mislead."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def si(value: float | None, unit: str = "", digits: int = 3) -> str:
    """12345678 → "12.3 M" + unit; "–" for a missing value."""
    if value is None:
        return "–"
    for scale, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        # From 999.5 up, three digits would round to the next prefix.
        if abs(value) >= 0.9995 * scale:
            return f"{value / scale:.{digits}g}\u00a0{prefix}{unit}"
    return f"{value:.{digits}g}\u00a0{unit}".strip()


def runs_of(result: Result) -> list[Any]:
    runs = get(result, "runs")
    return list(runs) if isinstance(runs, (list, tuple)) else []


def summary(result: Result, network: str, key: str) -> float | None:
    """A number of the summary ("accuracy_mean", "accuracy_ci95", "bops", "size_bits"); w_bits and a_bits are averaged over the runs."""
    value = number(result, "summary", network, key)
    if value is None and key != "accuracy_ci95":
        name = "accuracy" if key == "accuracy_mean" else key
        value = average([number(run, "networks", network, name) for run in runs_of(result)])
    return value


def budget_label(result: Result) -> str:
    """The budget as it was asked for, for example "budget w3a3"."""
    text = get(result, "budget", "text")
    return f"budget {text}" if text is not None else "budget"


def layers_of(result: Result, run: int = 0) -> list[dict[str, Any]]:
    """The layers in network order, each with what one run chose: w (bits of every filter; None if unknown), a (mean bits of the input;
    None if unknown)."""
    rows = []
    policy = get(runs_of(result)[run], "policy") if runs_of(result) else None
    layers = get(result, "layers")
    for layer in layers if isinstance(layers, (list, tuple)) else []:
        chosen = get(policy, str(get(layer, "name")))
        w, a = get(chosen, "w_bits"), number(chosen, "a_bits")
        mean = number(get(runs_of(result)[run], "input_bits"), str(get(layer, "name"))) if policy is not None else None
        a = a if mean is None else mean
        per_filter = isinstance(w, (list, tuple))
        listed = w if per_filter else [w] * int(min(max(1, number(layer, "filters") or 1), MOST_FILTERS))
        if isinstance(policy, Mapping) and chosen is None:
            listed, a = [FLOAT] * len(listed), float(FLOAT)
        bits = [int(b) for b in listed] if listed and all(number({"b": b}, "b") is not None for b in listed) else None
        rows.append({"name": str(get(layer, "name")), "info": layer, "w": bits, "a": a, "per_filter": per_filter})
    return rows


def _read_json(path: Path) -> Any:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}; run the search again, or restore the file") from None


def read_result(folder: Path) -> dict[str, Any]:
    """What result.json holds; for an unfinished run {"metrics": [...], "runs": [...]} from metrics.jsonl. Raises CheckpointError."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; expected the folder of a run")
    path, metrics = folder / "result.json", folder / "metrics.jsonl"
    if path.exists():
        result = _read_json(path)
        if not isinstance(result, dict) or not isinstance(result.get("runs"), list) or not result["runs"]:
            raise CheckpointError(f"{path} is not the result of a run: expected an object with a list 'runs'")
        if result.get("format") != FORMAT:
            raise CheckpointError(f"{path} has format {result.get('format')!r}; this qprune reads format {FORMAT}")
        return result
    if not metrics.exists():
        raise CheckpointError(f"{folder} holds neither result.json nor metrics.jsonl; expected the folder of a run")
    return _read_metrics(metrics)


def check_complete(result: Result, path: Path) -> None:
    """Raise CheckpointError unless a result, read from `path`, has what is told of a finished run: a whole summary, and runs as objects."""
    missing = next(_missing(result), None)
    if missing is not None:
        raise CheckpointError(f"{path} is damaged: {missing} is missing or no such value; restore the file, or run the search again")


def _missing(result: Result) -> Iterator[str]:
    for kind in NETWORKS:
        yield from (f"summary.{kind}.{key}" for key in _SHOWN if number(result, "summary", kind, key) is None)
    texts = [("verdict",), *((kind, "label") for kind in NETWORKS)]
    yield from (f"summary.{'.'.join(keys)}" for keys in texts if not isinstance(get(result, "summary", *keys), str))
    optional = [("search_in_float_epochs",), *((kind, "accuracy_ci95") for kind in NETWORKS)]
    for keys in optional:
        there = keys[-1] in (get(result, "summary", *keys[:-1]) or {})
        if not there or (get(result, "summary", *keys) is not None and number(result, "summary", *keys) is None):
            yield f"summary.{'.'.join(keys)}"
    if not number(result, "summary", "float", "bops"):
        yield "summary.float.bops"
    if not all(isinstance(run, Mapping) for run in runs_of(result)):
        yield "runs"


def _read_metrics(path: Path) -> dict[str, Any]:
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    rows: list[dict[str, Any]] = []
    for index, line in enumerate(lines):
        try:
            row = parse(line) if line.strip() else None
        except ValueError as error:
            # A line without its newline at the end is one that is being written, or was when the run was killed.
            if index == len(lines) - 1:
                continue
            raise CheckpointError(f"{path}, line {index + 1} is damaged: {error}") from None
        if row is not None and not isinstance(row, dict):
            raise CheckpointError(f"{path}, line {index + 1}: expected an object, got {type(row).__name__}")
        rows += [] if row is None else [row]
    search = [row for row in rows if row.get("phase") == "search"]
    seeds = dict.fromkeys(str(row.get("seed")) for row in search)
    runs = [{"seed": seed, "search_history": [row for row in search if str(row.get("seed")) == seed]} for seed in seeds]
    return {"metrics": rows, "runs": runs}

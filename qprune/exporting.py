"""The network of a run in other formats, and whether the files compute what PyTorch computes on the run's test samples."""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qprune.checkpoint import load, save
from qprune.errors import CheckpointError, ExportError, InputError
from qprune.export.onnx import export_onnx
from qprune.export.packed import load_packed, save_packed
from qprune.export.parity import Difference, compare, parity
from qprune.export.plain import deployable
from qprune.export.qonnx import export_qonnx, run_qonnx
from qprune.files import write_atomically
from qprune.report import write_report
from qprune.result import check_complete, read_result
from qprune.resume.folder import RESULT
from qprune.runfolder import FinishedRun, open_run, seeds_of

log = logging.getLogger("qprune")
FILES = {
    "onnx": "model.onnx",
    "qonnx": "model.qonnx.onnx",
    "packed": "model.packed.safetensors",
    "torch": "model.pt2",
    "safetensors": "model.safetensors",
}
QONNX_SAMPLES = 16
"""The qonnx package runs one node and one sample at a time."""


@dataclass(frozen=True)
class Exported:
    """A file, or why there is none.

    operators  how many nodes of each kind; empty for files of tensors alone
    parity     by what ran the file: its outputs against PyTorch's
    samples    test samples that were compared
    """

    format: str
    file: str
    bytes: int = 0
    operators: Mapping[str, int] = field(default_factory=dict)
    parity: Mapping[str, Difference] = field(default_factory=dict)
    samples: int = 0
    error: str | None = None


def formats_of(text: str) -> tuple[str, ...]:
    """ "onnx,packed" → ("onnx", "packed"); "all" for all. Raises InputError for another word."""
    words = tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    if words == ("all",):
        return tuple(FILES)
    unknown = [word for word in words if word not in FILES]
    if unknown or not words:
        raise InputError(f"format: {', '.join(unknown) or 'nothing'} is unknown; expected some of {', '.join(FILES)}, or all")
    return words


def export_run(
    folder: str | Path, formats: Sequence[str], out: str | Path | None = None, seed: int | None = None, samples: int = 64
) -> tuple[Path, list[Exported]]:
    """Write the network of a finished run in these formats, and export.json with what this gives; returns the folder of these files.

    out      folder for the files; None: "export" in the folder of the seed
    seed     None: the first of the run
    samples  of the test data, for the comparison with PyTorch

    A format that fails (a package that is missing, an operator that it has not) does not stop the others: its `error` says why. Raises
    CheckpointError for a folder without a finished run, InputError for a number of samples below 1.
    """
    if samples < 1:
        raise InputError(f"samples: expected at least 1, got {samples}")
    run = open_run(folder, seed)
    place = run.place / "export" if out is None else Path(out)
    made = written(run, formats, place, samples)
    listed = {"run": str(folder), "seed": run.seed, "files": [asdict(file) for file in made]}
    write_atomically(place / "export.json", json.dumps(listed, indent=1).encode())
    return place, made


def written(run: FinishedRun, formats: Sequence[str], place: Path, samples: int) -> list[Exported]:
    """`export_run` without export.json."""
    x = torch.cat([batch for batch, _ in _first(run, samples)])[:samples]
    with torch.no_grad():
        expected = run.model(x)
    made = []
    for name in formats:
        path = place / FILES[name]
        try:
            made.append(_WRITERS[name](run, path, x, expected))
        except ExportError as error:
            made.append(Exported(name, path.name, error=" ".join(str(error).split())))
    return made


def _first(run: FinishedRun, samples: int) -> list[tuple[Tensor, Tensor]]:
    batches: list[tuple[Tensor, Tensor]] = []
    for batch in run.task.loader("test", min(samples, 64)):
        batches.append(batch)
        if sum(len(x) for x, _ in batches) >= samples:
            break
    return batches


def _against(found: Tensor, expected: Tensor) -> Difference:
    return compare([np.asarray(found.detach())], [np.asarray(expected.detach())])


def _exported(name: str, path: Path, x: Tensor, differences: Mapping[str, Difference], operators: Mapping[str, int]) -> Exported:
    counts = dict(sorted(operators.items(), key=lambda item: (-item[1], item[0])))
    return Exported(name, path.name, path.stat().st_size, counts, differences, len(x))


def _onnx(run: FinishedRun, path: Path, x: Tensor, expected: Tensor) -> Exported:
    export_onnx(run.model, path, x[:2])
    report = parity(path, run.model, x)
    return _exported("onnx", path, x, {"onnxruntime": report.optimised, "unoptimised": report.exact}, _nodes(path))


def _qonnx(run: FinishedRun, path: Path, x: Tensor, expected: Tensor) -> Exported:
    export_qonnx(run.model, path, x[:1])
    some = x[:QONNX_SAMPLES]
    found = torch.cat([run_qonnx(path, sample)[0] for sample in some.split(1)])
    return _exported("qonnx", path, some, {"qonnx": _against(found, expected[: len(some)])}, _nodes(path))


def _nodes(path: Path) -> Mapping[str, int]:
    import onnx

    return Counter(node.op_type for node in onnx.load(path).graph.node)


def _packed(run: FinishedRun, path: Path, x: Tensor, expected: Tensor) -> Exported:
    save_packed(run.model, path)
    return _exported("packed", path, x, {"qprune": _against(_outputs(load_packed(path, run.build).eval(), x), expected)}, {})


def _safetensors(run: FinishedRun, path: Path, x: Tensor, expected: Tensor) -> Exported:
    save(run.model, path)
    return _exported("safetensors", path, x, {"qprune": _against(_outputs(load(path, run.build).eval(), x), expected)}, {})


def _torch(run: FinishedRun, path: Path, x: Tensor, expected: Tensor) -> Exported:
    buffer = io.BytesIO()
    batch = torch.export.Dim("batch")
    try:
        with warnings.catch_warnings():
            # of views of one storage, all on the CPU here
            warnings.filterwarnings("ignore", message="No complete tensor found in the group", category=UserWarning)
            warnings.filterwarnings("ignore", message=r".*treespec, LeafSpec", category=FutureWarning)
            program = torch.export.export(deployable(run.model), (torch.cat([x[:1], x[:1]]),), dynamic_shapes=({0: batch},))
            torch.export.save(program, buffer)
    except Exception as error:  # torch.export raises errors of many kinds
        lines = str(error).strip().splitlines()
        raise ExportError(f"torch.export cannot capture this network: {lines[0] if lines else type(error).__name__}") from error
    write_atomically(path, buffer.getvalue())
    loaded = torch.export.load(path)
    operators = Counter(str(node.target) for node in loaded.graph.nodes if node.op == "call_function")
    return _exported("torch", path, x, {"torch.export": _against(_outputs(loaded.module(), x), expected)}, operators)


def _outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        y: Tensor = model(x)
    return y


_WRITERS: dict[str, Callable[[FinishedRun, Path, Tensor, Tensor], Exported]] = {
    "onnx": _onnx,
    "qonnx": _qonnx,
    "packed": _packed,
    "torch": _torch,
    "safetensors": _safetensors,
}


def add_onnx(folder: str | Path, samples: int = 64) -> dict[str, Any]:
    """Write model.onnx beside the network of every seed of a finished run, unless it is there, and list it in result.json, under "files" of
    every run, and in the report; returns result.json's content. Where it cannot be written, one line of the log says why."""
    folder = Path(folder)
    result = read_result(folder)
    check_complete(result, folder / RESULT)
    if all(entry.get("files") for entry in result["runs"]):
        return result
    seeds = seeds_of(folder)
    if len(seeds) != len(result["runs"]):
        raise CheckpointError(
            f"{folder / RESULT} has {len(result['runs'])} runs, and the run was begun with {len(seeds)}; restore the file"
        )
    for entry, seed in zip(result["runs"], seeds, strict=True):
        run = open_run(folder, seed)
        (made,) = written(run, ("onnx",), run.place, samples)
        if made.error is not None:
            log.warning("qprune: no ONNX file: %s", made.error)
            return result
        entry["files"] = [asdict(made)]
    write_atomically(folder / RESULT, json.dumps(result, indent=1).encode())
    write_report(folder)
    return result

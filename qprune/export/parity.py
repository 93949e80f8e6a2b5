"""Whether an ONNX file computes what the PyTorch network computes, on real samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qprune.errors import ExportError
from qprune.export.tracing import require
from qprune.geometry import ExampleInputs, run
from qprune.modes import kept_modes

TOLERANCE = 1e-5


@dataclass(frozen=True)
class Difference:
    """Outputs against PyTorch's.

    largest    absolute difference
    values     how many values were compared
    share      part of the values that differ by more than `tolerance` · max(1, |value|)
    samples    part of the samples (first dimension) in which a value does
    agreement  part of the samples whose largest output of dimension 1 is the same (classes); 1 where there is no such dimension
    """

    largest: float
    values: int
    share: float
    samples: float
    agreement: float


@dataclass(frozen=True)
class ParityReport:
    """exact: with onnxruntime's graph optimisations off; optimised: with all of them, as a session is by default.

    A network that rounds activations may differ by a whole quantum in some values where its input lies at a rounding boundary: two programs
    add in different orders, and the last bit of a sum decides.
    """

    exact: Difference
    optimised: Difference
    tolerance: float = TOLERANCE


def parity(path: str | Path, model: nn.Module, inputs: ExampleInputs, tolerance: float = TOLERANCE) -> ParityReport:
    """Run an ONNX file in onnxruntime, on the CPU, and the model, in eval mode, on the same inputs.

    inputs  for one call: a tensor, a tuple of arguments or a dict of keywords; as many samples as one batch may have

    Raises ExportError where onnxruntime is missing, cannot load or run the file, or gives outputs of other shapes.
    """
    with kept_modes(model), torch.no_grad():
        expected = [leaf.detach().float().cpu().numpy() for leaf in tree_leaves(run(model.eval(), inputs)) if isinstance(leaf, Tensor)]
    exact, optimised = (compare(execute(path, inputs, on), expected, tolerance) for on in (False, True))
    return ParityReport(exact, optimised, tolerance)


def execute(path: str | Path, inputs: ExampleInputs, optimised: bool = True) -> list[np.ndarray[Any, Any]]:
    """The outputs of an ONNX file in onnxruntime on the CPU. Raises ExportError where it cannot load or run the file."""
    require("onnx", "onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimised else levels.ORT_DISABLE_ALL
    options.log_severity_level = 4  # failures are raised as well
    options.intra_op_num_threads = torch.get_num_threads()
    names: list[str] = []
    tensors = [leaf.detach().cpu().numpy() for leaf in _leaves(inputs) if isinstance(leaf, Tensor)]
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        names += [item.name for item in session.get_inputs()]
        if len(names) == len(tensors):
            return [np.asarray(value) for value in session.run(None, dict(zip(names, tensors, strict=True)))]
    except Exception as error:  # onnxruntime's errors have no other base
        raise ExportError(f"onnxruntime cannot run {path}: {str(error).splitlines()[0]}") from error
    raise ExportError(f"{path}: the file has the inputs {', '.join(names)}, got {len(tensors)} tensors")


def _leaves(inputs: ExampleInputs) -> list[Any]:
    return tree_leaves(dict(inputs) if isinstance(inputs, Mapping) else inputs if isinstance(inputs, Tensor) else tuple(inputs))


def compare(found: Sequence[np.ndarray[Any, Any]], expected: Sequence[np.ndarray[Any, Any]], tolerance: float = TOLERANCE) -> Difference:
    """The difference of two lists of outputs. Raises ExportError if their shapes differ."""
    shapes = [[list(value.shape) for value in values] for values in (found, expected)]
    if shapes[0] != shapes[1]:
        raise ExportError(f"the outputs have shapes {shapes[0]}, the network's have {shapes[1]}")
    largest, differing, values, bad, samples, same = 0.0, 0, 0, 0, 0, 0
    for ours, theirs in zip(found, expected, strict=True):
        rows = theirs.shape[0] if theirs.ndim else 1
        difference = np.abs(ours.astype(np.float64) - theirs).reshape(rows, -1)
        # a NaN differs from everything but a NaN
        difference = np.where(np.isnan(ours.reshape(rows, -1)) & np.isnan(theirs.reshape(rows, -1)), 0.0, difference)
        beyond = ~(difference <= tolerance * np.fmax(1.0, np.abs(theirs.reshape(rows, -1))))
        largest = max(largest, float(difference.max(initial=0.0))) if not np.isnan(difference).any() else float("nan")
        differing, values = differing + int(beyond.sum()), values + beyond.size
        bad, samples = bad + int(beyond.any(1).sum()), samples + rows
        same += int((ours.argmax(1) == theirs.argmax(1)).reshape(rows, -1).all(1).sum()) if theirs.ndim > 1 and theirs.size else rows
    return Difference(largest, values, differing / max(values, 1), bad / max(samples, 1), same / max(samples, 1))

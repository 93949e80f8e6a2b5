"""QONNX: arbitrary bits, each as one Quant node of the qonnx package (https://github.com/fastmachinelearning/qonnx).

    qprune.export_qonnx(final, "net.qonnx.onnx", x[:1])

What tools read from the file: a weight is a float initializer behind a Quant with its bits and one scale per filter, an input a Quant with
one scale. Zero points are 0, so that data types can be inferred from the nodes:

    grid                                      Quant
    two's complement ("lsq", signed inputs)   signed
    symmetric ("symmetric", "nice")           signed, narrow
    unsigned inputs                           unsigned
    one bit, two levels ±r/2                  signed, 1 bit: ±scale
    half-integer levels ("dorefa")            signed, narrow, with odd codes, one bit more and half the scale
    learned offsets ("lsq+")                  unsigned, with a zero point that is no integer: tools take such a tensor for float32

Weights of "uniq" and of codebooks are float initializers, "uniq" activations plain operations.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qprune.checkpoint import policy_of
from qprune.errors import ExportError, InputError
from qprune.export.copies import deployed
from qprune.export.onnxfile import finish
from qprune.export.quantnodes import QonnxParts, split
from qprune.export.tracing import require, to_onnx
from qprune.geometry import ExampleInputs

OPSET = 18


def export_qonnx(model: nn.Module, path: str | Path, example_inputs: ExampleInputs, split_widths: bool = True) -> Path:
    """Write a converted (or float) network as QONNX, cleaned and with all shapes as qonnx's tools want it; returns the path.

    example_inputs  for one call, float32: they fix all shapes, the batch size among them, as qonnx needs it. For costs per sample use a
                    batch of 1
    split_widths    True: a layer whose filters differ in bits is one layer per width, and none for filters at 0 bits, so that tools, which
                    know one data type per tensor, see every filter at its own bits. Grouped convolutions stay whole, unless depthwise.
                    False: its weight is one Quant per width, concatenated (the widest first) and put in order; tools take the whole
                    weight for as wide as the widest, and filters at 0 bits are zeros in it

    After the removal of pruned filters qonnx.util.inference_cost(path, discount_sparsity=False) counts the bit operations of qprune.cost
    for grids with integer levels and inputs that are quantized per layer. It counts one bit more for every weight of half-integer levels,
    32 for inputs with learned offsets, and the widest channel of inputs that their producer has quantized.

    The model is not changed. Raises ExportError for a network that is still being searched, or that torch.export or torch.onnx cannot take
    (it names the operators), and where a package is missing.
    """
    require("qonnx", "onnx", "onnxscript", "qonnx")
    import onnx_ir as ir
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.util.cleanup import cleanup_model

    wrong = next((f"{name} is {value.dtype}" for name, value in model.named_parameters() if value.dtype != torch.float32), None)
    if wrong is not None:
        raise ExportError(f"export_qonnx: expected parameters of torch.float32, but {wrong}; use model.float()")
    copy = split(deployed(model, QonnxParts(split_widths)))
    traced = to_onnx(copy, example_inputs, OPSET)
    # qonnx takes the first opset for that of the standard operators
    opsets = sorted(traced.opset_import, key=lambda opset: opset.domain)
    del traced.opset_import[:]
    traced.opset_import.extend(opsets)
    with executable():
        cleaned = cleanup_model(ModelWrapper(traced)).model
    return finish(ir.from_proto(cleaned), Path(path), {"qprune.policy": json.dumps(json.loads(policy_of(model).to_json())["layers"])})


def run_qonnx(path: str | Path, *inputs: Tensor) -> list[Tensor]:
    """The outputs of a QONNX file, executed node by node by the qonnx package, for inputs of the shapes that the file was written with.

    Raises ExportError where a package is missing, InputError for other inputs.
    """
    require("qonnx", "onnx", "onnxruntime", "qonnx")
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx

    model = ModelWrapper(str(path))
    shapes = [tuple(model.get_tensor_shape(item.name)) for item in model.graph.input]
    if shapes != [tuple(x.shape) for x in inputs]:
        raise InputError(f"{path}: expected inputs of the shapes {shapes}, got {[tuple(x.shape) for x in inputs]}")
    named = {item.name: x.detach().cpu().numpy() for item, x in zip(model.graph.input, inputs, strict=True)}
    with executable():
        found = execute_onnx(model, named)
    return [torch.from_numpy(found[item.name]) for item in model.graph.output]


@contextmanager
def executable() -> Iterator[None]:
    """A `with` block in which qonnx executes nodes whatever onnx is installed: it wraps each in a model of onnx's newest IR version, which
    may be newer than what onnxruntime reads (1.31 does not read that of onnx 1.23)."""
    import onnx
    from qonnx.core import onnx_exec

    make = onnx_exec.qonnx_make_model
    readable = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", OPSET)])

    def made(*args: Any, **kwargs: Any) -> onnx.ModelProto:
        model = make(*args, **kwargs)
        model.ir_version = min(model.ir_version, readable)
        return model

    onnx_exec.qonnx_make_model = made
    try:
        yield
    finally:
        onnx_exec.qonnx_make_model = make

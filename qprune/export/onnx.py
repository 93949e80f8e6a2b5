"""ONNX files of standard operators: integers where the policy has integers, QuantizeLinear and DequantizeLinear around them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from qprune.checkpoint import policy_of
from qprune.errors import ExportError
from qprune.export.barriers import add_barriers
from qprune.export.copies import deployed
from qprune.export.onnxfile import any_batch, finish
from qprune.export.qdq import OPSETS, TYPE_KEY, QDQParts
from qprune.export.tracing import require, to_onnx
from qprune.geometry import ExampleInputs

if TYPE_CHECKING:
    import onnx_ir as ir


def export_onnx(
    model: nn.Module,
    path: str | Path,
    example_inputs: ExampleInputs,
    dynamic_batch: bool = True,
    opset: int | None = None,
    output_names: Sequence[str] | None = None,
) -> Path:
    """Write a converted (or float) network as ONNX, of standard operators only; returns the path.

    example_inputs  for one call: a tensor, a tuple of arguments or a dict of keywords, float32
    dynamic_batch   let the first dimension of the inputs vary; False: fix it to the example's
    opset           None: the oldest that has the integers that are needed: 18 for 8 bits, 21 for 4, 25 for 2. An older one stores narrow
                    codes in wider integers

    Weights are integer initializers, packed: 1 and 2 bits in INT2, 3 and 4 in INT4, 5 to 8 in INT8, where the widest filter of a layer
    decides, with one scale per filter and zero point 0; filters of 32 bits beside others stay float32. Activations of as many bits are
    QuantizeLinear and DequantizeLinear with zero point 0, unsigned or signed, behind a Clip where the integer type has more levels than the
    bits. Levels that are not equidistant ("uniq", codebooks) stay float32. The bits of every layer are in the file's metadata,
    "qprune.policy".

    The model is not changed. Raises ExportError for a network that is still being searched, or that torch.export or torch.onnx cannot take
    (it names the operators), and where onnx and onnxscript are missing.
    """
    require("onnx", "onnx", "onnxscript")
    import onnx_ir as ir

    if opset is not None and opset < OPSETS[8]:
        raise ExportError(f"opset: expected {OPSETS[8]} or newer, got {opset}")
    wrong = next((f"{name} is {value.dtype}" for name, value in model.named_parameters() if value.dtype != torch.float32), None)
    if wrong is not None:
        raise ExportError(f"export_onnx: expected parameters of torch.float32, but {wrong}; use model.float()")
    parts = QDQParts(tuple(width for width, first in OPSETS.items() if opset is None or first <= opset))
    copy = deployed(model, parts)
    opset = opset or max((OPSETS[width] for width in parts.used), default=OPSETS[8])
    inputs, shapes = any_batch(example_inputs) if dynamic_batch else (example_inputs, None)
    names = {} if output_names is None else {"output_names": output_names}
    made = ir.from_proto(to_onnx(copy, inputs, opset, shapes, names))
    if dynamic_batch and not any(value.shape is not None and not value.shape.is_static() for value in made.graph.inputs):
        raise ExportError("this network computes with the batch size of its example; dynamic_batch=False fixes it")
    narrow(made)
    add_barriers(made)
    return finish(made, Path(path), {"qprune.policy": json.dumps(json.loads(policy_of(model).to_json())["layers"])})


def narrow(model: ir.Model) -> None:
    """Give codes and zero points the integer types that their nodes ask for, and initializers their packed form."""
    import onnx_ir as ir

    made: dict[tuple[str, str], ir.Value] = {}

    def retyped(value: ir.Value, kind: str) -> ir.Value:
        """The initializer in type `kind`: a new one, as others may share the old."""
        assert value.name is not None and value.const_value is not None
        key = value.name, kind
        if key not in made:
            dtype = ir.DataType[kind]
            tensor = ir.tensor(value.const_value.numpy().astype(dtype.numpy()), dtype=dtype, name=f"{value.name}.{kind.lower()}")
            made[key] = ir.Value(name=tensor.name, type=ir.TensorType(dtype), shape=value.shape, const_value=tensor)
            model.graph.initializers[f"{tensor.name}"] = made[key]
        return made[key]

    for node in model.graph:
        kind = node.metadata_props.get(TYPE_KEY)
        if kind is None or kind.endswith("8"):
            continue
        for i in (0, 2) if node.op_type == "DequantizeLinear" else (2,):
            value = node.inputs[i]
            assert value is not None
            if value.is_initializer():
                node.replace_input_with(i, retyped(value, kind))
            else:
                value.type = ir.TensorType(ir.DataType[kind])
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]

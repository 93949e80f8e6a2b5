"""What keeps onnxruntime's optimisations from changing what a file computes, or from refusing it.

With graph optimisations on, onnxruntime 1.31 joins DequantizeLinear, an operator and QuantizeLinear to the operator's integer form, and
moves QuantizeLinear and DequantizeLinear across others, whatever the integer type. Below 8 bits there are no such kernels: the session does
not start, or a rectifier in front of signed codes is lost. A matrix product of floating-point inputs and integer weights rounds its inputs
to 8 bits of its own. A Min with the largest float32 changes no value, and nothing is fused across it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx_ir as ir

_RECTIFIERS = ("Relu", "Clip", "LeakyRelu")


def add_barriers(model: ir.Model) -> None:
    """Put a Min before every QuantizeLinear to less than 8 bits, or behind an operator that reads less than 8 bits; behind a weight of a
    matrix product that reads floating-point inputs, or less than 4 bits; behind codes of less than 8 bits that others read than
    convolutions and matrix products. Networks of 8 bits throughout stay as they are."""
    import onnx_ir as ir

    largest = ir.tensor(np.array(np.finfo(np.float32).max), name="largest")
    limit = ir.Value(name="largest", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(()), const_value=largest)
    guarded: dict[ir.Value, ir.Value] = {}

    def guard(reader: ir.Node, i: int) -> None:
        value = reader.inputs[i]
        assert value is not None
        if value not in guarded:
            name = f"{value.name}.min"
            kept = ir.Node("", "Min", [value, limit], version=model.opset_imports[""])
            kept.metadata_props.update(reader.metadata_props)
            kept.outputs[0].name, kept.outputs[0].type, kept.outputs[0].shape = name, value.type, value.shape
            producer = value.producer()
            if producer is None:
                model.graph.insert_before(model.graph[0], kept)
            else:
                model.graph.insert_after(producer, kept)
            guarded[value] = kept.outputs[0]
        reader.replace_input_with(i, guarded[value])

    for node in list(model.graph):
        if node.op_type == "QuantizeLinear":
            source = _producer(node)
            if source is not None and source.op_type not in ("Min", "Max") and (_bits(node) < 8 or _narrow(_behind_rectifier(source))):
                guard(node, 0)
        elif node.op_type in ("MatMul", "Gemm"):
            found = _weight_of(node)
            source = _producer(node)
            quantized = source is not None and source.op_type == "DequantizeLinear" and _bits(source) >= 4
            if found is not None and not (quantized and found[0] >= 4):
                guard(*found[1:])
        elif node.op_type not in ("Conv", "DequantizeLinear", "Min", "Max"):
            for i, value in enumerate(node.inputs):
                source = None if value is None else value.producer()
                if source is not None and source.op_type == "DequantizeLinear" and _bits(source) < 8 and not _is_weight(source):
                    guard(node, i)
    if guarded:
        model.graph.initializers["largest"] = limit


def _producer(node: ir.Node) -> ir.Node | None:
    value = node.inputs[0]
    return None if value is None else value.producer()


def _behind_rectifier(node: ir.Node) -> ir.Node:
    source = _producer(node) if node.op_type in _RECTIFIERS else None
    return node if source is None else source


def _bits(node: ir.Node) -> int:
    """Bits of the codes of a QuantizeLinear or DequantizeLinear."""
    zero_point = node.inputs[2]
    assert zero_point is not None and zero_point.dtype is not None
    return zero_point.dtype.bitwidth


def _is_weight(node: ir.Node) -> bool:
    value = node.inputs[0]
    return value is not None and value.is_initializer()


def _narrow(node: ir.Node) -> bool:
    """True if the node reads codes of less than 8 bits."""
    sources = [value.producer() for value in node.inputs if value is not None]
    return any(source is not None and source.op_type == "DequantizeLinear" and _bits(source) < 8 for source in sources)


def _weight_of(node: ir.Node) -> tuple[int, ir.Node, int] | None:
    """The bits of the integer weight of a matrix product, and which input of which node reads it."""
    reader, i = node, 1
    value = node.inputs[1]
    source = None if value is None else value.producer()
    if source is not None and source.op_type == "Transpose":
        reader, i, source = source, 0, _producer(source)
    return (_bits(source), reader, i) if source is not None and source.op_type == "DequantizeLinear" else None

"""The last steps to an ONNX file: any batch size, and no traces of this machine."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from qprune._version import __version__
from qprune.errors import ExportError, InputError
from qprune.files import write_atomically
from qprune.geometry import ExampleInputs

if TYPE_CHECKING:
    import onnx_ir as ir

BATCH = "batch"


def any_batch(example_inputs: ExampleInputs) -> tuple[ExampleInputs, Any]:
    """Example inputs that torch.export takes for a batch of any size, and their dynamic shapes: the first dimension of every tensor that
    has as many entries there as the first one. A batch of 1 is doubled, since torch.export takes it for a constant."""
    if not isinstance(example_inputs, Tensor | Mapping | Sequence) or isinstance(example_inputs, str):
        kind = type(example_inputs).__name__
        raise InputError(f"example_inputs: expected a tensor, a tuple of arguments or a dict of keywords, got {kind}")
    inputs = dict(example_inputs) if isinstance(example_inputs, Mapping) else example_inputs
    inputs = inputs if isinstance(inputs, Tensor | dict) else tuple(inputs)
    size = next((value.size(0) for value in tree_leaves(inputs) if isinstance(value, Tensor) and value.dim()), 0)
    batch = torch.export.Dim(BATCH)

    def follows(value: Any) -> bool:
        return isinstance(value, Tensor) and value.dim() > 0 and value.size(0) == size

    shapes = tree_map(lambda value: {0: batch} if follows(value) else None, inputs)
    inputs = tree_map(lambda value: torch.cat([value, value]) if size == 1 and follows(value) else value, inputs)
    return inputs, (shapes,) if isinstance(inputs, Tensor) else shapes


def finish(model: ir.Model, path: Path, properties: Mapping[str, str]) -> Path:
    """Write the model to one file, atomically: qprune as its producer, the oldest IR version that its operators allow, no names of modules
    or files of this machine. Raises ExportError for more than 2 GiB, which ONNX keeps in several files."""
    import onnx
    import onnx_ir as ir

    _name_nodes(model.graph)
    for node in model.graph.all_nodes():
        _tidy(node)
        for value in node.outputs:
            _tidy(value)
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        _tidy(value)
    _tidy(model.graph)
    model.metadata_props.clear()
    model.metadata_props.update(properties)
    model.producer_name, model.producer_version, model.graph.name = "qprune", __version__, "qprune"
    opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in model.opset_imports.items()]
    model.ir_version = onnx.helper.find_min_ir_version_for(opsets, ignore_unknown=True)
    try:
        content = ir.to_proto(model).SerializeToString()
    except ValueError as error:
        raise ExportError(f"{path}: this network does not fit into one ONNX file, which holds 2 GiB ({error})") from error
    write_atomically(path, content)
    return path


def _name_nodes(graph: ir.Graph) -> None:
    """Name every node "module/Operator", with a number where a module has several, and what torch.onnx calls "_symbolic" after its node."""
    taken: Counter[str] = Counter()
    for node in graph:
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
        # the last one is the operation's own name
        module = "" if scopes is None else ast.literal_eval(scopes)[-2]
        name = f"{module}/{node.op_type}" if module else node.op_type
        taken[name] += 1
        node.name = name if taken[name] == 1 else f"{name}_{taken[name]}"
        for value in node.outputs:
            if value.name is not None and value.name.startswith("_symbolic") and not value.is_graph_output():
                value.name = node.name


def _tidy(item: ir.Node | ir.Value | ir.Graph) -> None:
    item.metadata_props.clear()
    item.doc_string = None

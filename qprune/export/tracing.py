"""A module as an ONNX model, through torch.onnx (dynamo), with failures that say which operator or which line of the model it was."""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qprune.errors import ExportError, InputError
from qprune.geometry import ExampleInputs

if TYPE_CHECKING:
    import onnx

_LOGGERS = ("torch.onnx", "torch.export", "torch._export.non_strict_utils", "torch.fx.experimental.symbolic_shapes")


def require(extra: str, *packages: str) -> None:
    """Raise ExportError, naming the extra to install, unless all packages can be imported."""
    import importlib

    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            message = f"this export needs the package {package!r}, which cannot be imported ({error}): pip install 'qprune[{extra}]'"
            raise ExportError(message) from error


def to_onnx(
    model: nn.Module,
    example_inputs: ExampleInputs,
    opset: int,
    dynamic_shapes: Any = None,
    names: Mapping[str, Sequence[str]] | None = None,
) -> onnx.ModelProto:
    """The model, in eval mode on the CPU, as torch.onnx.export traces it.

    names  {"input_names": […], "output_names": […]}, either may be missing

    Raises ExportError for a model that cannot be traced, and for operators that ONNX has not.
    """
    args, kwargs = _arguments(example_inputs)
    noise = io.StringIO()  # torch prints the graphs of a failed trace
    try:
        with _quiet(), redirect_stderr(noise), torch.no_grad():
            program = torch.onnx.export(
                model,
                args,
                kwargs=kwargs,
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=dynamic_shapes,
                input_names=None if names is None else names.get("input_names"),
                output_names=None if names is None else names.get("output_names"),
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise ExportError(f"this model cannot be exported: {_reason(error)}") from error
    assert program is not None
    return program.model_proto


def _arguments(example_inputs: ExampleInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def move(value: Any) -> Any:
        value = value.detach().cpu() if isinstance(value, Tensor) else value
        return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value

    if isinstance(example_inputs, Tensor):
        return (move(example_inputs),), {}
    if isinstance(example_inputs, Mapping):
        return (), {name: move(value) for name, value in example_inputs.items()}
    if isinstance(example_inputs, Sequence) and not isinstance(example_inputs, str):
        return tuple(move(value) for value in example_inputs), {}
    raise InputError(f"example_inputs: expected a tensor, a tuple of arguments or a dict of keywords, got {type(example_inputs).__name__}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warnings of its own doing: of its deprecated calls, and of torchvision, which is not there."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, message=".*LeafSpec.*")
            warnings.filterwarnings("ignore", category=UserWarning, message=".*The axis name: .* shares the same shape constraints")
            warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\.|onnxscript|onnx_ir|onnx|copyreg|ast")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _reason(error: BaseException) -> str:
    """What torch's chain of errors says of the cause, in one line: the operators, and the line of the model."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    text = "\n".join(str(item) for item in chain)
    missing = sorted(set(re.findall(r"No ONNX function found for <OpOverload\(op='([^']+)'", text)))
    if missing:
        return f"ONNX has no operator for {', '.join(name.replace('.', '::') + _callers(chain, name) for name in missing)}"
    lines = re.findall(r'File "([^"]+)", line (\d+), in (\w+)\n\s*(.+)', text)
    where = f" ({lines[-1][0]}, line {lines[-1][1]}: {lines[-1][3].strip()})" if lines else ""
    first = str(chain[-1]).strip().splitlines()
    return f"{first[0] if first else type(chain[-1]).__name__}{where}"


def _callers(chain: Sequence[BaseException], operator: str) -> str:
    """' (in module a, b)' for the modules whose code calls the operator, as far as the errors' frames tell."""
    names = []
    for error in chain:
        frame = error.__traceback__
        while frame is not None:
            node = frame.tb_frame.f_locals.get("node")
            if isinstance(node, torch.fx.Node) and operator in str(node.target):
                names += [name for name, _ in (node.meta.get("nn_module_stack") or {}).values()][-1:]
            frame = frame.tb_next
    found = [name or "the network itself" for name in dict.fromkeys(names)]
    return f" (in module {', '.join(found)})" if found else ""

"""Folded networks, negative scales among theirs, in the formats and runtimes that take them."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from test_folding import X, season, unit
from torch import Tensor, nn

from qprune import calibrate, export_onnx, export_qonnx, fold, verify
from qprune.codes import weight_codes
from qprune.export.qonnx import run_qonnx
from qprune.nn import QuantConv2d


def folded(kind: str, bits: object) -> nn.Module:
    """conv → norm, folded; some scales are negative, some codes the lowest of two's complement."""
    done = fold(unit(kind, bits), X)
    assert (weight_codes(done[0]).scale < 0).any()
    return done


def folded_chain() -> nn.Module:
    """conv → norm → ReLU → conv → norm, folded: what the second reads may come to lie on another side between two levels by rounding."""
    second = QuantConv2d(16, 8, 3, w_bits=4, a_bits=8)
    whole = nn.Sequential(*unit("lsq", 8), nn.ReLU(), second, season(nn.BatchNorm2d(8))).eval()
    return fold(calibrate(whole, [X]), X)


def run_onnx(path: Path, level: str = "ORT_DISABLE_ALL") -> Tensor:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    return torch.from_numpy(y)


@pytest.mark.parametrize(("kind", "bits"), [("lsq", (2, 4, 8, 3) * 4), ("dorefa", (1, 2, 3, 8) * 4)])
def test_onnxruntime(kind: str, bits: object, tmp_path: Path) -> None:
    done = folded(kind, bits)
    export_onnx(done, tmp_path / "net.onnx", X)
    with torch.no_grad():
        torch.testing.assert_close(run_onnx(tmp_path / "net.onnx"), done(X), rtol=1e-5, atol=1e-5)


def test_onnxruntime_computes_in_integers(tmp_path: Path) -> None:
    """Without a normalisation in between it takes the first convolution for one of integers; one code may come out differently."""
    done = folded_chain()
    export_onnx(done, tmp_path / "net.onnx", X)
    with torch.no_grad():
        difference = (run_onnx(tmp_path / "net.onnx", "ORT_ENABLE_ALL") - done(X)).abs()
        assert difference.mean() < 0.01 * done(X).std()


def test_scales_are_positive_where_codes_can_take_the_sign(tmp_path: Path) -> None:
    export_onnx(folded("symmetric", (2, 4, 8, 8) * 4), tmp_path / "net.onnx", X)
    file = onnx.load(tmp_path / "net.onnx")
    tensors = {tensor.name: tensor for tensor in file.graph.initializer}
    scales = [numpy_helper.to_array(tensors[node.input[1]]) for node in file.graph.node if node.op_type == "DequantizeLinear"]
    assert len(scales) == 2 and all((scale > 0).all() for scale in scales)


@pytest.mark.parametrize(("kind", "bits"), [("lsq", (2, 4, 8, 3) * 4), ("symmetric", 4), ("dorefa", (1, 2, 3, 8) * 4)])
def test_qonnx(kind: str, bits: object, tmp_path: Path) -> None:
    done = folded(kind, bits)
    export_qonnx(done, tmp_path / "net.onnx", X)
    with torch.no_grad():
        expected = done(X)
    (found,) = run_qonnx(tmp_path / "net.onnx", X)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["lsq", "dorefa"])
def test_integer_arithmetic(kind: str) -> None:
    checked = verify(folded(kind, (2, 4, 8, 3) * 4), [X])
    assert checked.ok, checked

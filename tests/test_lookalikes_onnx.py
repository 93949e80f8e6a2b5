"""ONNX files of the networks that people bring: pruned filters removed, normalisations folded, compared in onnxruntime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from lookalikes import SHAPE
from lookalikes.policies import X, outputs, prepared, random_policy

from qprune import ExportError, convert, export_onnx, fold


@pytest.mark.parametrize("name", ["mobilenet_v3", "shufflenet_v2", "split_attention"])
def test_onnxruntime_computes_the_same(name: str, tmp_path: Path) -> None:
    model = prepared(name).float()
    final = fold(convert(model, random_policy(model, seed=7, whole=True)), X)
    export_onnx(final, tmp_path / "net.onnx", X)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", options, providers=["CPUExecutionProvider"])
    for x in (X, torch.randn(5, *SHAPE[1:])):
        found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        for here, there in zip(found, outputs(final, x), strict=True):
            np.testing.assert_allclose(here, there.numpy(), rtol=1e-5, atol=1e-5)


def test_a_network_whose_way_depends_on_the_data_is_refused(tmp_path: Path) -> None:
    model = prepared("branching").float()
    with pytest.raises(ExportError, match="idioms"):
        export_onnx(convert(model, random_policy(model, seed=7)), tmp_path / "net.onnx", X)

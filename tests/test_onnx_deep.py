"""The deep networks of qprune.tasks in ONNX, with mixed bits per layer."""

from __future__ import annotations

from pathlib import Path

import pytest
from onnx_cases import assert_parity, codes_of, converted, images

from qprune.export.onnx import export_onnx
from qprune.tasks import models


@pytest.mark.parametrize("name", ["resnet20", "resnet56"])
def test_a_mixed_network(name: str, tmp_path: Path) -> None:
    model = converted(models.get(name), images(16, 3, 4), (2, 3, 4, 5, 8, 32), per_filter=False)
    path = export_onnx(model, tmp_path / f"{name}.onnx", images(16, 3, 1))
    assert len(codes_of(path)) > 0.6 * int(name.removeprefix("resnet"))
    assert_parity(path, model, images(16, 3, 4, seed=1))

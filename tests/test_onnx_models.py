"""The shallow networks of qprune.tasks in ONNX, with mixed bits per filter and per layer, pruned filters among them."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx_cases import assert_parity, codes_of, converted, images

from qprune.export.onnx import export_onnx
from qprune.geometry import weighted_layers
from qprune.nn.quantizing import Quantizing
from qprune.tasks import models

BITS = (0, 2, 3, 4, 5, 8, 32)
SIZE = 16
NETWORKS = {name: models.get(name) for name in models.names()} | {"lenet5": lambda: models.lenet5(image_size=SIZE)}


@pytest.mark.parametrize(
    ("name", "per_filter"), [("lenet5", True), ("lenet5", False), ("resnet8", True), ("thin_resnet", True), ("mobilenet", False)]
)
def test_a_mixed_network(name: str, per_filter: bool, tmp_path: Path) -> None:
    channels = 1 if name == "lenet5" else 3
    model = converted(NETWORKS[name], images(SIZE, channels, 8), BITS, per_filter)
    path = export_onnx(model, tmp_path / f"{name}.onnx", images(SIZE, channels, 1))
    onnx.checker.check_model(str(path), full_check=True)
    assert_parity(path, model, images(SIZE, channels, 8, seed=1))
    quantized = {layer: module for layer, module in weighted_layers(model) if isinstance(module, Quantizing)}
    assert codes_of(path).keys() == {layer for layer, module in quantized.items() if set(module.w_bits) != {32}}


def test_a_file_is_as_small_as_its_bits(tmp_path: Path) -> None:
    """The weights of 2 and 4 bits take 2 and 4 bits; names, scales and operators the rest."""
    for bits in (2, 4):
        model = converted(NETWORKS["lenet5"], images(SIZE, 1, 4), (bits,), False, (8,))
        size = export_onnx(model, tmp_path / f"{bits}.onnx", images(SIZE, 1, 1)).stat().st_size
        weights = sum(p.numel() for name, p in model.named_parameters() if name.endswith("weight"))
        assert 0 <= size - weights * bits / 8 < 12_000

"""ONNX files with QuantizeLinear and DequantizeLinear: what they hold, and what onnxruntime computes with them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from onnx_cases import Wired, assert_parity, codes_of, converted, images
from torch import Tensor, nn

import qprune
from qprune.codes import weight_codes
from qprune.errors import ExportError
from qprune.export.onnx import export_onnx
from qprune.export.parity import compare, execute, parity

TYPES = {"INT2": 2, "INT4": 4, "INT8": 8}

CASES = {
    "filters": {},
    "layers": {"per_filter": False},
    "w2a2": {"bits": (2,), "a_bits": (2,)},
    "w4a4": {"bits": (4,), "a_bits": (4,)},
    "w8a8": {"bits": (8,), "a_bits": (8,), "weight_quantizer": "symmetric"},
    "w1a1": {"bits": (1,), "a_bits": (1,), "scales": "layer"},
    "pruned": {"bits": (0, 2, 4, 8)},
    "halves": {"bits": (1, 2, 4, 8, 32), "weight_quantizer": "dorefa", "input_quantizer": "lsq+"},
    "outputs": {"bits": (2, 3, 8, 32), "placement": "output", "input_quantizer": "nice", "weight_quantizer": "nice"},
    "outputs-4": {"bits": (4,), "placement": "output", "input_quantizer": "pact"},
    "quantiles": {"bits": (2, 4, 32), "placement": "output", "input_quantizer": "uniq", "weight_quantizer": "uniq"},
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """name of a case → (model, path of its file), made once."""
    made: dict[str, tuple[nn.Module, Path]] = {}
    folder = tmp_path_factory.mktemp("onnx")

    def get(name: str) -> tuple[nn.Module, Path]:
        if name not in made:
            model = converted(Wired, images(), **CASES[name])
            made[name] = model, export_onnx(model, folder / f"{name}.onnx", images(batch=1))
        return made[name]

    return get


@pytest.mark.parametrize("name", CASES)
def test_onnxruntime_computes_what_the_network_computes(name: str, exported: Any) -> None:
    model, path = exported(name)
    onnx.checker.check_model(str(path), full_check=True)
    assert_parity(path, model, images(batch=32, seed=3))


@pytest.mark.parametrize("name", ["layers", "w2a2", "w4a4", "w8a8", "w1a1"])
def test_codes_are_stored_in_the_smallest_type_that_holds_the_bits(name: str, exported: Any) -> None:
    model, path = exported(name)
    stored = codes_of(path)
    layers = {key: layer for key, layer in model.named_modules() if isinstance(layer, qprune.nn.QuantConv2d | qprune.nn.QuantLinear)}
    checked = 0
    for key, layer in layers.items():
        bits = max(layer.w_bits)
        if bits == 32:
            assert key not in stored
            continue
        width = next(w for w in (2, 4, 8) if w >= bits)
        assert TYPES[TensorProto.DataType.Name(stored[key].data_type)] == width
        assert len(stored[key].raw_data) == -(-layer.weight.numel() * width // 8)
        codes = onnx.numpy_helper.to_array(stored[key]).astype(np.int32)
        assert np.array_equal(codes, weight_codes(layer).signed()[0].numpy())
        checked += 1
    assert checked


@pytest.mark.parametrize(("name", "opset", "ir"), [("w8a8", 18, 8), ("w4a4", 21, 10), ("w2a2", 25, 13)])
def test_the_oldest_opset_that_has_the_types(name: str, opset: int, ir: int, exported: Any) -> None:
    proto = onnx.load(exported(name)[1])
    assert [(item.domain, item.version) for item in proto.opset_import] == [("", opset)]
    assert proto.ir_version == ir


def test_an_older_opset_has_wider_integers(tmp_path: Path, exported: Any) -> None:
    model, _ = exported("w2a2")
    path = export_onnx(model, tmp_path / "old.onnx", images(batch=1), opset=18)
    assert onnx.load(path).opset_import[0].version == 18
    assert {item.data_type for item in codes_of(path).values()} == {TensorProto.INT8}
    assert_parity(path, model, images(seed=4))


def test_half_integer_grids_take_no_wider_type(exported: Any) -> None:
    """Filters of 8 bits among others: codes c stand for c + 1/2, within INT8."""
    model, path = exported("halves")
    stored = codes_of(path)["left"]
    assert stored.data_type == TensorProto.INT8
    codes = weight_codes(model.get_submodule("left"))
    rows = [f for f, b in enumerate(codes.bits) if b == 8]
    quantized = [f for f, b in enumerate(codes.bits) if b != 32]
    kept = onnx.numpy_helper.to_array(stored).astype(np.int32)[[quantized.index(f) for f in rows]]
    assert np.array_equal(kept, codes.levels[rows].numpy() - 128)


def test_activations_have_the_types_of_their_bits(exported: Any) -> None:
    for name, kinds in (("w2a2", {"INT2", "UINT2"}), ("w4a4", {"INT4", "UINT4"}), ("w8a8", {"INT8", "UINT8"})):
        proto = onnx.shape_inference.infer_shapes(onnx.load(exported(name)[1]))
        types = {item.name: item.type.tensor_type.elem_type for item in proto.graph.value_info}
        found = {TensorProto.DataType.Name(types[node.output[0]]) for node in proto.graph.node if node.op_type == "QuantizeLinear"}
        assert found == kinds, "the image is signed, what comes behind a rectifier is not"


def test_any_batch_size(exported: Any) -> None:
    model, path = exported("filters")
    for batch in (1, 2, 7):
        x = images(batch=batch, seed=batch)
        assert execute(path, x)[0].shape == (batch, 5)
        assert_parity(path, model, x)


def test_a_fixed_batch_size(tmp_path: Path, exported: Any) -> None:
    model, _ = exported("w8a8")
    path = export_onnx(model, tmp_path / "fixed.onnx", images(batch=3), dynamic_batch=False, output_names=["scores"])
    proto = onnx.load(path)
    assert [d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim] == [3, 3, 12, 12]
    assert [item.name for item in proto.graph.output] == ["scores"]
    assert_parity(path, model, images(batch=3))
    with pytest.raises(ExportError, match=r"fixed\.onnx"):
        execute(path, images(batch=2))


def test_the_file_names_its_layers_and_no_files_of_this_machine(exported: Any) -> None:
    _, path = exported("filters")
    proto = onnx.load(path)
    assert (proto.producer_name, proto.producer_version) == ("qprune", qprune.__version__)
    names = [node.name for node in proto.graph.node]
    assert {"stem/Conv", "stem.weight/DequantizeLinear", "act1/Relu"} <= set(names)
    assert len(set(names)) == len(names)
    policy = json.loads(next(item.value for item in proto.metadata_props if item.key == "qprune.policy"))
    assert len(policy["stem"]["w_bits"]) == 8
    content = path.read_bytes()
    assert b".py" not in content and b"torch" not in content
    assert {item.domain for item in proto.opset_import} == {""}


def test_the_model_stays_as_it_was(tmp_path: Path) -> None:
    model = converted(Wired, images(), (4,), a_bits=(8,)).train()
    model.stem.eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    path = export_onnx(model, tmp_path / "net.onnx", images(batch=2))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert all(p.requires_grad for p in model.parameters())
    parity(path, model, images(batch=2))
    assert [module.training for module in model.modules()] == modes


def test_a_layer_made_by_hand_with_filters_of_0_bits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = qprune.nn.QuantConv2d(3, 6, 3, w_bits=(0, 2, 4, 32, 0, 1), a_bits=3).to(memory_format=torch.channels_last)
    net = nn.Sequential(layer, nn.ReLU()).train()
    net(images())
    with torch.no_grad():
        layer.weight[[0, 4]] = 0
    path = export_onnx(net, tmp_path / "net.onnx", images(batch=1))
    scale = next(item for item in onnx.load(path).graph.initializer if item.name == "0.weight.scale")
    assert (onnx.numpy_helper.to_array(scale) > 0).all()
    assert_parity(path, net.eval(), images(seed=2))


def test_a_layer_without_filters_beside_a_residual_path(tmp_path: Path) -> None:
    x = images()
    net = Wired().train()
    net(x)
    names = ("stem", "depthwise", "head", "fc")
    policy = qprune.Policy({"left": (0, 4), **dict.fromkeys(names, (4, 4))})
    model = qprune.prepare(net, qprune.SearchSpace((0, 4), (4,)), example_inputs=x)
    qprune.calibrate(model, [x])
    final = qprune.convert(model, policy).eval()
    path = export_onnx(final, tmp_path / "net.onnx", x[:1])
    assert codes_of(path).keys() == set(names)
    assert_parity(path, final, images(seed=2))


class TwoInputs(nn.Module):
    """A linear layer over the last of three dimensions, whose product onnxruntime fuses differently, and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, first: Tensor, second: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        hidden = self.mix(first + second).relu()
        return {"scores": self.last(hidden), "hidden": hidden * scale}


@pytest.mark.parametrize(("bits", "a_bits"), [(2, 2), (4, 4), (4, 32), (8, 2)])
def test_keyword_inputs_three_dimensions_and_several_outputs(bits: int, a_bits: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = {"first": torch.randn(4, 5, 6), "second": torch.randn(4, 5, 6)}
    model = qprune.prepare(TwoInputs(), qprune.SearchSpace(w_bits=(bits,), a_bits=(a_bits,)))
    model.train()(**x)
    final = qprune.convert(model, qprune.Policy({"mix": (bits, a_bits), "last": (bits, a_bits)})).eval()
    path = export_onnx(final, tmp_path / "two.onnx", {name: value[:1] for name, value in x.items()})
    report = parity(path, final, x)
    assert report.exact.values == 4 * 5 * (3 + 8)
    assert report.exact.largest < 1e-5 and report.optimised.largest < 1e-5


class Bessel(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.i1(x)


class OwnBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.ones(2, 1, 1, 1)


@pytest.mark.parametrize(
    ("model", "error"),
    [
        (OwnBatch, "dynamic_batch=False"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), Bessel()), r"prims::bessel_i1 \(in module 1\)"),
        (lambda: qprune.prepare(Wired(), qprune.SearchSpace()), r"stem.*MixedConv2d.*convert"),
        (lambda: Wired().double(), r"stem\.weight is torch\.float64.*float\(\)"),
    ],
    ids=["batch", "operator", "searched", "float64"],
)
def test_what_cannot_be_exported_is_named(model: Any, error: str, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(b"before")
    with pytest.raises(ExportError, match=error):
        export_onnx(model(), path, images(batch=2))
    assert path.read_bytes() == b"before"


def test_an_opset_that_torch_does_not_write(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="18 or newer, got 13"):
        export_onnx(Wired(), tmp_path / "net.onnx", images(), opset=13)


def test_missing_packages_are_named_with_their_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ExportError, match=r"onnxscript.*qprune\[onnx\]"):
        export_onnx(Wired(), tmp_path / "net.onnx", images())


def test_parity_finds_a_wrong_scale(tmp_path: Path, exported: Any) -> None:
    model, path = exported("w8a8")
    proto = onnx.load(path)
    scale = next(item for item in proto.graph.initializer if item.name == "left.weight.scale")
    values = onnx.numpy_helper.to_array(scale).copy()
    values[3] *= 1.5
    scale.CopyFrom(onnx.numpy_helper.from_array(values, scale.name))
    onnx.save(proto, tmp_path / "wrong.onnx")
    assert parity(path, model, images()).exact.share == 0
    report = parity(tmp_path / "wrong.onnx", model, images())
    assert report.exact.share > 0.9 and report.exact.samples == 1 and report.exact.largest > 1e-5


def test_difference_counts_values_samples_and_classes() -> None:
    expected = [np.array([[1.0, 2.0, 0.0], [5.0, 4.0, 0.0], [np.nan, 0.0, 0.0]], np.float32)]
    found = [np.array([[1.0, 2.5, 0.0], [3.9, 4.0, 0.0], [np.nan, 0.0, 1e-6]], np.float32)]
    difference = compare(found, expected)
    assert difference.largest == pytest.approx(1.1) and difference.values == 9
    assert difference.share == pytest.approx(2 / 9) and difference.samples == pytest.approx(2 / 3)
    assert difference.agreement == pytest.approx(2 / 3)
    assert compare([np.full((1, 2), np.nan)], [np.zeros((1, 2))]).share == 1
    with pytest.raises(ExportError, match=r"\[\[2\]\].*\[\[3\]\]"):
        compare([np.zeros(2)], [np.zeros(3)])

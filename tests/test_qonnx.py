"""QONNX files against the networks that they were made of, executed and counted by the qonnx package."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from qonnx.core.modelwrapper import ModelWrapper
from qonnx.util.inference_cost import inference_cost
from torch import Tensor, nn

import qprune
from qprune.cost import geometry_of
from qprune.errors import ExportError, InputError
from qprune.export.qonnx import executable, export_qonnx, run_qonnx
from qprune.nn import QuantActivation, QuantConv2d, QuantLinear
from qprune.nn.codebook import CodebookConv2d
from qprune.policy import LayerBits, Policy
from qprune.tasks import models

BITS = (0, 2, 3, 4, 5, 8, 32)


class Images:
    in_channels, image_size, num_classes = 1, 16, 10


class Small(nn.Module):
    """Every kind of layer, on 1 x 6 x 6."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.grouped = nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1, groups=2)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        x = torch.relu(x + self.grouped(x))
        return self.fc(torch.relu(self.depthwise(x)).amax((2, 3)))


def inputs(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def converted(
    build: Callable[[], nn.Module], x: Tensor, bits: Sequence[int] = BITS, per_filter: bool = True, remove: bool = True, **space: Any
) -> nn.Module:
    """The network with random weights and bits, calibrated on x. Bits are drawn per filter, or per layer without 0."""
    draw = random.Random(3)
    torch.manual_seed(5)
    net = build()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    a_bits = tuple(b for b in bits if b)
    mixed = qprune.prepare(net, qprune.SearchSpace(tuple(bits), a_bits, granularity="filter", **space), example_inputs=x)
    qprune.calibrate(mixed, [x])
    geometry = geometry_of(mixed)
    layers = {}
    for name, layer in geometry.layers.items():
        w_bits = tuple(draw.choice(bits) for _ in range(layer.filters)) if per_filter else draw.choice(a_bits)
        layers[name] = LayerBits(w_bits, draw.choice(a_bits))
    return qprune.convert(mixed, Policy(layers, geometry), remove=remove).eval()


def outputs(model: nn.Module, path: Path, x: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """What the network and its file give for every sample of x, one at a time."""
    export_qonnx(model, path, x[:1], **options)
    with torch.no_grad():
        return model(x), torch.cat([run_qonnx(path, sample)[0] for sample in x.split(1)])


def counted(path: Path) -> float:
    """Bit operations as the qonnx package counts them."""
    with executable():
        return float(inference_cost(str(path), discount_sparsity=False)["total_cost"]["total_bops"])


def quants(path: Path) -> list[tuple[int, int, int]]:
    """(bits, signed, narrow) of the Quant nodes."""
    model = ModelWrapper(str(path))
    found = []
    for node in model.get_nodes_by_op_type("Quant"):
        attributes = {item.name: item.i for item in node.attribute}
        found.append((int(model.get_initializer(node.input[3])), attributes["signed"], attributes["narrow"]))
    return found


@pytest.mark.parametrize(
    ("name", "bits", "per_filter"),
    [
        ("lenet5", BITS, True),
        ("resnet8", (0, 3, 32), True),
        ("thin_resnet", BITS, False),
        ("resnet20", (2, 3, 5, 32), False),
        ("mobilenet", (4, 8), False),
    ],
)
def test_networks_and_their_cost(name: str, bits: tuple[int, ...], per_filter: bool, tmp_path: Path) -> None:
    x = inputs(2, 1, 16, 16)
    final = converted(lambda: models.for_task(name, Images()), x, bits, per_filter)
    expected, found = outputs(final, tmp_path / "net.onnx", x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.01
    assert counted(tmp_path / "net.onnx") == qprune.cost(final).bops


@pytest.mark.parametrize(("kind", "split_widths"), [("lsq", False), ("symmetric", True), ("dorefa", True)])
def test_grids_and_masked_filters(kind: str, split_widths: bool, tmp_path: Path) -> None:
    x = inputs(2, 1, 6, 6)
    final = converted(Small, x, (0, 1, 3, 32), remove=False, weight_quantizer=kind)
    expected, found = outputs(final, tmp_path / "net.onnx", x, split_widths=split_widths)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_one_grid_for_the_layer(tmp_path: Path) -> None:
    x = inputs(2, 1, 6, 6)
    final = converted(Small, x, (1, 3, 8), per_filter=False, scales="layer")
    expected, found = outputs(final, tmp_path / "net.onnx", x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_what_the_file_says_of_every_grid(tmp_path: Path) -> None:
    layers = [QuantLinear(3, 3, w_bits=4, a_bits=32, weight_quantizer=kind) for kind in ("lsq", "symmetric", "dorefa")]
    layers += [QuantLinear(3, 3, w_bits=1, a_bits=7), QuantLinear(3, 3, w_bits=1, a_bits=6)]
    layers[3].input_quantizer.calibrate(inputs(8, 3))
    layers[4].input_quantizer.calibrate(inputs(8, 3).abs())
    export_qonnx(nn.Sequential(*layers), tmp_path / "net.onnx", inputs(1, 3))
    weights, activations = [(4, 1, 0), (4, 1, 1), (5, 1, 1), (1, 1, 0), (1, 1, 0)], [(7, 1, 0), (6, 0, 0)]
    assert sorted(quants(tmp_path / "net.onnx")) == sorted(weights + activations)


def test_without_splitting_the_widest_filter_counts(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    layer = QuantConv2d(2, 4, 3, w_bits=(2, 0, 5, 3), a_bits=4)
    macs_of_a_filter = 2 * 9 * 3 * 3
    export_qonnx(layer, path, inputs(1, 2, 5, 5), split_widths=False)
    assert counted(path) == 4 * macs_of_a_filter * 5 * 4
    export_qonnx(layer, path, inputs(1, 2, 5, 5))
    assert counted(path) == macs_of_a_filter * (2 + 5 + 3) * 4


def test_half_integer_levels_count_one_bit_more(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    layer = QuantConv2d(2, 4, 3, w_bits=(2, 2, 1, 1), a_bits=4, weight_quantizer="dorefa")
    export_qonnx(layer, path, inputs(1, 2, 5, 5))
    assert counted(path) == 2 * 2 * 9 * 3 * 3 * (3 + 1) * 4


@pytest.mark.parametrize("kind", ["pact", "lsq+"])
@pytest.mark.parametrize("bits", [1, 5])
def test_signed_inputs(kind: str, bits: int, tmp_path: Path) -> None:
    x = inputs(4, 1, 6, 6)
    x[:, :, 2] = 0  # one signed bit has no level there
    layer = QuantConv2d(1, 3, 3, w_bits=4, a_bits=bits, input_quantizer=kind, padding=1).eval()
    layer.input_quantizer.calibrate(x)
    expected, found = outputs(layer, tmp_path / "net.onnx", x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert counted(tmp_path / "net.onnx") == 3 * 9 * 36 * 4 * (32 if kind == "lsq+" else bits)


def test_an_input_of_0_bits_and_padding_that_is_not_zero(tmp_path: Path) -> None:
    x = inputs(2, 1, 6, 6)
    layers = (QuantConv2d(1, 3, 3, w_bits=(2, 4, 0), padding=1, padding_mode="reflect"), nn.Flatten(2), QuantLinear(36, 2, a_bits=0))
    expected, found = outputs(nn.Sequential(*layers).eval(), tmp_path / "net.onnx", x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["nice", "pact", "uniq"])
def test_activations_with_bits_per_channel(kind: str, tmp_path: Path) -> None:
    x = inputs(4, 5, 4, 4)
    activation = QuantActivation((2, 8, 3, 32, 2), kind, limit=6.0)
    activation.quantizer.calibrate(x)
    expected, found = outputs(activation.eval(), tmp_path / "net.onnx", x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_layers_without_integer_codes_are_float(tmp_path: Path) -> None:
    x = inputs(2, 2, 5, 5)
    uniq = QuantConv2d(2, 3, 3, w_bits=3, a_bits=32, weight_quantizer="uniq", placement="output")
    book = CodebookConv2d(2, 3, 3)
    book.setup_codebook(torch.rand(3, 2, 3, 3) > 0.3, torch.tensor([-0.2, 0.0, 0.1, 0.3]), a_bits=4)
    book.input_quantizer.calibrate(x)
    for layer, nodes in ((uniq, []), (book, [(4, 1, 0)])):
        expected, found = outputs(layer.eval(), tmp_path / "net.onnx", x)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        assert quants(tmp_path / "net.onnx") == nodes


def test_a_float_network(tmp_path: Path) -> None:
    x = inputs(2, 1, 6, 6)
    expected, found = outputs(Small().eval(), tmp_path / "net.onnx", x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_the_model_stays_as_it_was(tmp_path: Path) -> None:
    layer = QuantConv2d(2, 4, 3, w_bits=(2, 0, 5, 3), a_bits=4).train()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    export_qonnx(layer, tmp_path / "net.onnx", inputs(1, 2, 5, 5))
    assert layer.training and layer.weight.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_what_else_the_file_says(tmp_path: Path) -> None:
    path = export_qonnx(QuantConv2d(2, 4, 3, w_bits=(2, 0, 5, 3), a_bits=4), tmp_path / "a" / "net.onnx", inputs(1, 2, 5, 5))
    made = onnx.load(path)
    assert (made.producer_name, made.producer_version) == ("qprune", qprune.__version__)
    assert {item.key for item in made.metadata_props} == {"qprune.policy"}
    assert made.opset_import[0].domain == "" and made.ir_version <= 10
    known = (*made.graph.value_info, *made.graph.input, *made.graph.output)
    assert all(dim.dim_value for value in known for dim in value.type.tensor_type.shape.dim)
    assert str(Path.cwd()).encode() not in path.read_bytes()


class Eigen(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvals(x).real


def test_what_cannot_be_exported_is_one_line(tmp_path: Path) -> None:
    path, x = tmp_path / "net.onnx", inputs(1, 1, 6, 6)
    with pytest.raises(ExportError, match=r"'stem'.*candidates"):
        export_qonnx(qprune.prepare(Small(), qprune.SearchSpace()), path, x)
    with pytest.raises(ExportError, match=r"linalg_eig") as caught:
        export_qonnx(Eigen(), path, x)
    assert "\n" not in str(caught.value)
    with pytest.raises(ExportError, match=r"float64.*model\.float"):
        export_qonnx(Small().double(), path, x)
    with pytest.raises(InputError, match="example_inputs"):
        export_qonnx(Small(), path, 3)  # type: ignore[arg-type]
    assert not path.exists()


def test_inputs_of_another_shape_are_refused(tmp_path: Path) -> None:
    path = export_qonnx(Small(), tmp_path / "net.onnx", inputs(1, 1, 6, 6))
    with pytest.raises(InputError, match=r"\(1, 1, 6, 6\).*\(2, 1, 6, 6\)"):
        run_qonnx(path, inputs(2, 1, 6, 6))


def test_a_missing_package_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "qonnx", None)
    with pytest.raises(ExportError, match=r"'qonnx'.*qprune\[qonnx\]"):
        export_qonnx(Small(), tmp_path / "net.onnx", inputs(1, 1, 6, 6))

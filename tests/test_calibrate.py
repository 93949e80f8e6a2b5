"""Calibration: which inputs are signed, and where the ranges of inputs start, judged by the float network."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qprune.errors import InputError
from qprune.nn import MixedActivation, MixedConv2d
from qprune.nn.quant import QuantConv2d
from qprune.prepare import calibrate, prepare
from qprune.quantizers import InputQuantizer
from qprune.space import SearchSpace
from qprune.tasks import models

SPACE = SearchSpace((2, 8), (4, 8))
IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1])


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tensors this small are not worth waking other threads for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Bottleneck(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.expand, self.project, self.head = (nn.Conv2d(a, b, 1) for a, b in ((3, 8), (8, 8), (8, 4), (4, 4)))
        self.act, self.fc = MixedActivation((4,)), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.expand(self.stem(x).relu()).relu()
        return self.fc(self.act(self.head(self.project(x)) + 0.0).mean((2, 3)))


def test_signs_are_those_of_the_float_network() -> None:
    model = prepare(Bottleneck(), SearchSpace.fixed(0, 0), example_inputs=IMAGE)
    layers = {name: bool(getattr(model, name).input_quantizer.signed) for name in ("stem", "expand", "project", "head", "fc")}
    assert layers == {"stem": True, "expand": False, "project": False, "head": True, "fc": True}
    assert bool(model.act.quantizer.signed)


def test_signs_of_linear_bottlenecks() -> None:
    """The image and what follows a bottleneck without ReLU are signed, everything after a ReLU6 is not."""
    model = prepare(models.get("mobilenet")(num_classes=4), SPACE, example_inputs=IMAGE)
    signed = {name for name, quantizer in input_quantizers(model).items() if quantizer.signed}
    assert {name.removesuffix(".input_quantizer") for name in signed} == {"conv1", "conv2"} | {
        name for name, module in model.named_modules() if name.endswith("expand") and isinstance(module, MixedConv2d)
    }
    assert len(signed) == 8


def input_quantizers(model: nn.Module) -> dict[str, InputQuantizer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, InputQuantizer)}


def test_calibrate_sees_the_float_network_and_changes_nothing_else() -> None:
    net = Bottleneck()
    model = prepare(net, SPACE)
    state = copy.deepcopy({name: value for name, value in model.state_dict().items() if "input_quantizer" not in name})
    assert calibrate(model, [(IMAGE, LABELS), (3 * IMAGE, LABELS)]) is model
    assert len(input_quantizers(model)) == 6 and all(quantizer.calibrated for quantizer in input_quantizers(model).values())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items() if not name.startswith("act"))
    assert all(module.training for module in model.modules())
    x = torch.cat([IMAGE, 3 * IMAGE])
    with torch.no_grad():
        inputs = {"stem": x, "expand": net.stem(x).relu()}
        inputs["head"] = net.project(net.expand(inputs["expand"]).relu())
        inputs["act"] = net.head(inputs["head"])
    for name, values in inputs.items():
        layer: Any = getattr(model, name)
        quantizer = layer.quantizer if name == "act" else layer.input_quantizer
        own = InputQuantizer("pact", quantizer.bits)
        own.calibrate(values)
        torch.testing.assert_close(own.log_range, quantizer.log_range)
        assert own.signed == quantizer.signed


BATCHES: dict[str, Any] = {
    "tensors": [IMAGE, IMAGE],
    "pairs": [(IMAGE, LABELS)],
    "lists": [[IMAGE, LABELS]],
    "keywords": [{"x": IMAGE}],
    "loader": torch.utils.data.DataLoader(torch.utils.data.TensorDataset(IMAGE, LABELS), batch_size=2),
}


@pytest.mark.parametrize("batches", BATCHES)
def test_calibrate_takes_batches_of_any_kind(batches: str) -> None:
    model = prepare(Bottleneck(), SPACE, example_inputs=IMAGE)
    calibrate(model, BATCHES[batches])
    reference = calibrate(prepare(Bottleneck(), SPACE), [IMAGE])
    first, second = (m.stem.input_quantizer.log_range for m in (model, reference))
    torch.testing.assert_close(first, second, rtol=1e-3, atol=0)


def test_calibrate_refuses_no_batches() -> None:
    with pytest.raises(InputError, match=r"^calibrate: no batches were given$"):
        calibrate(prepare(Bottleneck(), SPACE), [])


def test_calibrates_fixed_layers_and_agrees_with_the_first_batch() -> None:
    layer = QuantConv2d(3, 4, 3, w_bits=4, a_bits=4)
    once = copy.deepcopy(layer)
    calibrate(layer, [IMAGE])
    once(IMAGE)
    assert torch.equal(layer.input_quantizer.log_range, once.input_quantizer.log_range) and layer.input_quantizer.signed


def test_calibration_is_repeatable_and_a_layer_without_candidates_needs_none() -> None:
    model = prepare(Bottleneck(), SPACE, rules={"fc": SearchSpace.fixed(4, 32), "stem": None})
    first = copy.deepcopy(calibrate(model, [IMAGE]).state_dict())
    calibrate(model, [IMAGE])
    assert all(torch.equal(value, first[name]) for name, value in model.state_dict().items())
    assert len(input_quantizers(model)) == 5

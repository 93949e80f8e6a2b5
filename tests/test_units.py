"""Units: which normalisation and rectifier belong to which layer, and what `prepare` makes of them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qprune.errors import RuleError, UnsupportedLayerError
from qprune.geometry import Unit
from qprune.nn import MixedConv2d, MixedLinear
from qprune.nn.filterwise import FilterConv2d
from qprune.nn.unitparts import FilterActivation, FilterBatchNorm2d
from qprune.policy import LayerBits
from qprune.prepare import calibrate, prepare
from qprune.record import record_of
from qprune.space import SearchSpace
from qprune.tasks import models
from qprune.units import find_units

PAIRS = ((2, 2), (2, 4), (3, 3), (8, 8))
SPACE = SearchSpace(pairs=PAIRS, granularity="filter", placement="output", weight_quantizer="nice", input_quantizer="nice")
WEIGHTS_ONLY = SearchSpace((2, 4), (32,), placement="output", weight_quantizer="nice", input_quantizer="nice")
IMAGES = torch.randn(2, 3, 16, 16)


class Block(nn.Module):
    """A residual block as torchvision writes it: one rectifier module, used twice, in place."""

    def __init__(self, shared: bool, functional: bool = False, inplace: bool = True) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.downsample = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.relu = nn.ReLU(inplace)
        self.relu2 = self.relu if shared else nn.ReLU(inplace)
        self.functional = functional

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += self.downsample(x)
        return F.relu(y) if self.functional else self.relu2(y)


def test_residual_network() -> None:
    units = find_units(models.resnet8(), IMAGES)
    assert units["conv1"] == Unit("bn1", "relu1", None)
    assert units["layer2.0.conv1"] == Unit("layer2.0.bn1", "layer2.0.relu1", "layer1.0.conv2")
    assert units["layer2.0.conv2"] == Unit("layer2.0.bn2", "layer2.0.relu2", "layer2.0.conv1")
    assert units["layer2.0.shortcut"] == Unit("layer2.0.shortcut_bn", None, "layer1.0.conv2")
    assert units["layer3.0.conv1"].source == "layer2.0.conv2"
    assert units["fc"] == Unit(None, None, "layer3.0.conv2")
    assert len(units) == 10


def test_every_convolution_of_resnet20_but_the_shortcuts_has_an_activation() -> None:
    units = find_units(models.resnet20(), IMAGES)
    without = [name for name, unit in units.items() if unit.activation is None]
    assert sorted(without) == ["fc", "layer2.0.shortcut", "layer3.0.shortcut"]
    assert len({unit.activation for unit in units.values()}) == 20


def test_linear_bottlenecks_and_what_reads_them() -> None:
    units = find_units(models.mobilenet(), IMAGES)
    assert units["layer2.0.depthwise"] == Unit("layer2.0.bn2", "layer2.0.relu2", "layer2.0.expand")
    assert units["layer2.0.project"] == Unit("layer2.0.bn3", None, "layer2.0.depthwise")
    assert units["layer2.1.expand"].source is None
    assert units["fc"].source == "conv2"


def test_without_normalisation_and_through_pooling_and_flattening() -> None:
    units = find_units(models.lenet5(image_size=16), torch.randn(2, 1, 16, 16))
    assert units == {
        "conv1": Unit(None, "relu1", None),
        "conv2": Unit(None, "relu2", "conv1"),
        "fc1": Unit(None, "relu3", "conv2"),
        "fc2": Unit(None, None, "fc1"),
    }


@pytest.mark.parametrize("inplace", [True, False])
def test_the_longest_branch_owns_the_rectifier(inplace: bool) -> None:
    units = find_units(Block(shared=False, inplace=inplace), IMAGES)
    assert units["conv2"] == Unit("bn2", "relu2", "conv1")
    assert units["downsample.0"] == Unit("downsample.1", None, None)


def test_of_equal_branches_the_last_called_owns_the_rectifier() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.relu = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            right = self.right(x)
            return self.relu(self.left(x) + right)

    units = find_units(Net(), IMAGES)
    assert units["left"].activation == "relu" and units["right"].activation is None


def test_a_rectifier_used_twice_is_refused_by_name() -> None:
    block = Block(shared=True)
    with pytest.raises(UnsupportedLayerError, match=r"layer conv1: .*relu.*called more than once.*nn.ReLU of its own"):
        find_units(block, IMAGES, ["conv1"])
    assert find_units(block, IMAGES)["conv2"] == Unit("bn2", None, None)


def test_a_rectifier_that_is_a_function_is_refused_where_its_bits_are_asked_for() -> None:
    block = Block(shared=False, functional=True)
    with pytest.raises(UnsupportedLayerError, match=r"layer conv2: .*F\.relu.*nn\.ReLU module"):
        prepare(block, SPACE, example_inputs=IMAGES)
    prepared = prepare(block, WEIGHTS_ONLY, example_inputs=IMAGES)
    assert isinstance(prepared.conv2, FilterConv2d) and not prepared.conv2.produces


@pytest.mark.parametrize("layer", ["conv1", "layer1.0.conv2"])
def test_preactivation_is_refused(layer: str) -> None:
    with pytest.raises(UnsupportedLayerError, match=f"layer {layer}: .*pre-activation"):
        find_units(models.resnet8(preactivation=True), IMAGES, [layer])


def test_a_second_reader_of_the_pre_activation_is_refused() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.relu = nn.Conv2d(3, 3, 1), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x) + x
            return self.relu(y) * torch.sigmoid(y)

    with pytest.raises(UnsupportedLayerError, match="something besides relu reads"):
        find_units(Net(), IMAGES, ["conv"])


def test_a_layer_called_twice_is_refused() -> None:
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())
    with pytest.raises(UnsupportedLayerError, match="called more than once"):
        find_units(nn.Sequential(net, net), IMAGES, ["0.0"])


def test_nothing_of_the_model_changes() -> None:
    model = models.resnet8().train()
    model.bn1.eval()
    model.conv1.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    find_units(model, IMAGES)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training and not model.bn1.training and not model.conv1.weight.requires_grad


def test_prepare_swaps_whole_units() -> None:
    prepared = prepare(models.resnet8(), SPACE, example_inputs=IMAGES)
    assert all(type(m) is not nn.ReLU and type(m) is not nn.BatchNorm2d and type(m) is not nn.Conv2d for m in prepared.modules())
    assert type(prepared.fc) is nn.Linear
    block = prepared.layer2[0]
    assert block.conv2.candidates == PAIRS and block.conv2.produces and block.conv2.input_bits == 32
    assert block.shortcut.candidates == ((2, 32), (3, 32), (8, 32)) and not block.shortcut.produces
    assert block.bn2.gate is block.conv2.gate is block.relu2.gate is not block.conv1.gate
    assert prepared.conv1.input_bits == 8 and prepared.conv1.input_quantizer.signed == 1
    assert record_of(prepared).geometry.units["conv1"] == Unit("bn1", "relu1", None)


def test_units_need_example_inputs() -> None:
    with pytest.raises(RuleError, match="placement='output' needs example_inputs"):
        prepare(models.resnet8(), SPACE)


@pytest.mark.parametrize("pattern", ["fc", "f*"])
def test_linear_layers_are_no_units(pattern: str) -> None:
    with pytest.raises(UnsupportedLayerError, match=r"layer fc: .*SearchSpace.fixed\(8, 8\)"):
        prepare(models.resnet8(), SPACE, {pattern: SPACE}, IMAGES)
    prepared = prepare(models.resnet8(), SPACE, {pattern: SearchSpace.fixed(8, 8)}, IMAGES)
    assert isinstance(prepared.fc, MixedLinear)


def test_a_fixed_layer_among_units_keeps_its_weight_bits_and_has_its_activation_searched() -> None:
    fixed = SearchSpace.fixed(6, 5)
    prepared = prepare(models.resnet8(), SPACE, {"conv1": fixed, "layer2.0.conv2": fixed}, IMAGES)
    assert prepared.conv1.candidates == ((6, 2), (6, 4), (6, 3), (6, 8)) and prepared.conv1.input_bits == 5
    assert prepared.layer2[0].conv2.candidates == prepared.conv1.candidates and prepared.layer2[0].conv2.input_bits == 32
    assert record_of(prepared).fixed == {"conv1": LayerBits(6, 5), "fc": None}


def test_a_unit_with_one_candidate_is_fixed() -> None:
    one = SearchSpace(pairs=((3, 4),), placement="output", weight_quantizer="nice", input_quantizer="nice")
    prepared = prepare(models.resnet8(), SPACE, {"conv1": one, "layer2.0.shortcut": one}, IMAGES)
    fixed = record_of(prepared).fixed
    assert fixed["conv1"] == LayerBits(3, 8, 4) and fixed["layer2.0.shortcut"] == LayerBits(3, 32)


def test_what_reads_a_layer_that_is_no_unit_quantizes_its_input() -> None:
    prepared = prepare(models.resnet8(), SPACE, {"conv1": None, "layer2.0.conv1": SearchSpace((2, 4), (2, 4))}, IMAGES)
    assert type(prepared.conv1) is nn.Conv2d and type(prepared.relu1) is nn.ReLU
    assert isinstance(prepared.layer2[0].conv1, MixedConv2d)
    assert prepared.layer1[0].conv1.input_bits == prepared.layer2[0].conv2.input_bits == 8
    assert prepared.layer2[0].shortcut.input_bits == 32


def test_preparing_again_keeps_units_and_takes_them_apart() -> None:
    prepared = prepare(models.resnet8(), SPACE, example_inputs=IMAGES)
    with torch.no_grad():
        prepared.layer1[0].conv1.gate.logits.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    again = prepare(prepared, SPACE, {"conv1": SearchSpace.fixed(8, 8), "layer3.*": SearchSpace((2, 4), (4,))}, IMAGES)
    assert torch.equal(again.layer1[0].conv1.gate.logits, prepared.layer1[0].conv1.gate.logits)
    assert {w for w, _ in again.conv1.candidates} == {8} and again.bn1.gate is again.conv1.gate is again.relu1.gate
    assert record_of(again).geometry.layers == record_of(prepared).geometry.layers
    last = again.layer3[0]
    assert isinstance(last.conv1, MixedConv2d) and type(last.bn1) is nn.BatchNorm2d and type(last.relu2) is nn.ReLU
    assert isinstance(again.layer2[0].bn2, FilterBatchNorm2d) and isinstance(again.layer2[0].relu2, FilterActivation)


def test_calibrate_sets_clips_from_the_pre_activations_of_the_float_network() -> None:
    model = models.lenet5(image_size=16)
    images = [torch.randn(4, 1, 16, 16) for _ in range(2)]
    prepared = calibrate(prepare(model, SPACE, example_inputs=images[0]), images)
    mean, deviation, weight = 0.0, 0.0, 0.0
    for x in images:
        z = model.conv1(x)
        mean, deviation, weight = 0.9 * mean + 0.1 * z.mean(), 0.9 * deviation + 0.1 * z.std(), 0.9 * weight + 0.1
    clip = prepared.relu1.quantizer.learned_range()
    torch.testing.assert_close(clip.flatten(), ((mean + 5 * deviation) / weight).detach().reshape(1), rtol=1e-5, atol=0)
    assert prepared.conv1.input_quantizer.calibrated


def test_six_is_kept_as_the_limit() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU6())
    space = SearchSpace((4, 8), (32,), placement="output", weight_quantizer="nice", input_quantizer="nice")
    prepared = calibrate(prepare(net, space, example_inputs=IMAGES), [100 * IMAGES]).eval()
    assert prepared(100 * IMAGES).max().item() == pytest.approx(6)
